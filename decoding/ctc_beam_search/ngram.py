"""Word n-grams in ARPA files: p(word | words before it), by backing off."""

from __future__ import annotations

import codecs
import gzip
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

START, UNKNOWN = "<s>", "<unk>"
UNKNOWN_LOG10_PROB = -100.0
"""Of words that the model does not know, where it has no <unk>; as in KenLM."""

IMPOSSIBLE = -99.0
"""The log10 probability of what never comes, such as <s>; some programs write -inf."""

NUM_FIRST_WORDS = 10_000
"""Of a file, that tell what kind of words it is of."""
SENTENCE_MARKS = (START, "</s>", UNKNOWN)

_BLOCK_BYTES = 1 << 22
_KENLM_BINARY = b"mmap lm http://kheafield.com"
_OTHER_COMPRESSIONS = {"bzip2": b"BZh", "xz": b"\xfd7zXZ", "zstd": b"\x28\xb5\x2f\xfd"}


class Ngram(ABC):
    """A back-off n-gram of words.

    Attributes:
        order: words in the longest n-gram.
        num_words: that it knows, the marks of a sentence included.
        path: of its file.
        first_words: that stand first in it, see the function of that name.
    """

    order: int
    num_words: int
    path: Path
    first_words: list[str]

    @abstractmethod
    def __contains__(self, word: str) -> bool:
        """Whether the model knows a word; it does not know <unk>."""

    @abstractmethod
    def log10_probs(self, words: Sequence[str], in_sentence: bool = True) -> list[float]:
        """Log10 probability of each word after those before it and, if so, a sentence's start."""


State = tuple[str, ...]
"""The latest words, as far as they can matter."""


class ReferenceNgram(Ngram):
    """The definition, in Python: the compiled one is tested against it.

    Args:
        path: an ARPA file, plain or gzip.

    Raises:
        ValueError: not an ARPA file, or a damaged one.
    """

    def __init__(self, path: str | Path) -> None:
        self._log_probs: dict[State, float] = {}
        self._log_backoffs: dict[State, float] = {}
        self.path = Path(path)
        try:
            self._read(_lines(arpa_blocks(path)))
        except _Damage as error:
            raise damaged(path, error) from None
        self._words = {words[0] for words in self._log_probs if len(words) == 1} - {UNKNOWN}
        self._prefixes = {word[:end] for word in self._words for end in range(1, len(word) + 1)}
        self._log_probs.setdefault((UNKNOWN,), UNKNOWN_LOG10_PROB)
        self.num_words = len(self._words)
        self.first_words = first_words(path)

    def __contains__(self, word: str) -> bool:
        return word in self._words

    def is_prefix(self, characters: str) -> bool:
        """Whether a word of the model begins so."""
        return characters in self._prefixes

    def start(self, in_sentence: bool) -> State:
        """The state before the first word, of a sentence or of nothing."""
        return (START,) if in_sentence and START in self._words else ()

    def score(self, state: State, word: str) -> tuple[float, State]:
        """Log10 probability of ``word`` after ``state``, and the state after it."""
        words = (*state, word if word in self._words else UNKNOWN)
        log_backoff, found = 0.0, words[max(0, len(words) - self.order) :]
        while found not in self._log_probs:
            log_backoff += self._log_backoffs.get(found[:-1], 0.0)
            found = found[1:]
        return log_backoff + self._log_probs[found], words[max(0, len(words) - self.order + 1) :]

    def log10_probs(self, words: Sequence[str], in_sentence: bool = True) -> list[float]:
        state, log_probs = self.start(in_sentence), []
        for word in words:
            log_prob, state = self.score(state, word)
            log_probs.append(log_prob)
        return log_probs

    def _read(self, lines: Iterable[bytes]) -> None:
        counts: list[int] = []
        section, entries = None, 0  # None before \data\, 0 in it, then the length of the n-grams
        for number, line in enumerate(lines, start=1):
            line = line.strip()
            if section is None:
                section = 0 if line == b"\\data\\" else None
            elif line.startswith(b"\\"):
                if section and entries != counts[section - 1]:
                    raise _Damage(
                        f"it has {entries} {section}-grams and announces {counts[section - 1]}"
                    )
                section, entries = section + 1, 0
                if section > len(counts) > 0 and line == b"\\end\\":
                    self.order = len(counts)
                    return
                if section > len(counts) or line != b"\\%d-grams:" % section:
                    raise _Damage(f"line {number} is {_shown(line)}")
            elif line and section == 0:
                announced = re.fullmatch(rb"ngram\s*%d\s*=\s*(\d+)" % (len(counts) + 1), line)
                if announced is None:
                    raise _Damage(f"line {number} is {_shown(line)}")
                counts.append(int(announced[1]))
            elif line:
                try:
                    self._add(line.split(), section)
                except ValueError:
                    raise _Damage(f"line {number} is no {section}-gram: {_shown(line)}") from None
                entries += 1
        raise _Damage("it has no \\data\\" if section is None else "it ends before \\end\\")

    def _add(self, fields: list[bytes], length: int) -> None:
        numbers = [_log10(x) for x in (fields[0], *fields[length + 1 :])]
        words = tuple(map(_decoded, fields[1 : length + 1]))
        if len(words) < length or len(numbers) > 2 or not np.isfinite(numbers).all():
            raise ValueError
        if length > 1 and any((word,) not in self._log_probs for word in words):
            raise ValueError
        self._log_probs[words] = numbers[0]
        self._log_backoffs[words] = numbers[1] if len(numbers) == 2 else 0.0


class _Damage(Exception):
    """What is wrong with a file."""


def damaged(path: str | Path, how: object) -> ValueError:
    """The error of a file that is not what it should be."""
    return ValueError(f"{path} is no ARPA file, or a damaged one: {how}")


def arpa_blocks(path: str | Path) -> Iterator[bytes]:
    """The text of an ARPA file, plain or gzip, in blocks of some megabytes.

    Raises:
        ValueError: a binary of KenLM's, another or a damaged compression, or no UTF-8.
    """
    with Path(path).open("rb") as file:
        magic = file.read(len(_KENLM_BINARY))
        file.seek(0)
        if magic == _KENLM_BINARY:
            raise ValueError(
                f"{path} is a binary of KenLM's, whose layout only KenLM reads: give the ARPA file "
                "that it was built from (plain or .gz)."
            )
        for program, first_bytes in _OTHER_COMPRESSIONS.items():
            if magic.startswith(first_bytes):
                raise ValueError(
                    f"{path} is compressed with {program}: unpack it, or compress it with gzip."
                )
        stream = gzip.GzipFile(fileobj=file) if magic[:2] == b"\x1f\x8b" else file
        # Words in another encoding would all be unknown, without a word.
        decoder = codecs.getincrementaldecoder("utf-8")()
        num_bytes = 0
        try:
            while block := stream.read(_BLOCK_BYTES):
                decoder.decode(block)
                yield block.removeprefix(codecs.BOM_UTF8) if not num_bytes else block
                num_bytes += len(block)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} cannot be unpacked: {error}") from None
        except UnicodeDecodeError as error:
            if not num_bytes and b"\\data\\" not in error.object:
                # Something else, which the readers name.
                yield error.object
                return
            line = error.object[: error.start].rpartition(b"\n")[2]
            line += error.object[error.start :].partition(b"\n")[0]
            raise ValueError(
                f"{path} is not UTF-8 (at {_shown(line)!r}): convert it, as with iconv -f "
                "ISO-8859-1 -t UTF-8."
            ) from None


def first_words(path: str | Path) -> list[str]:
    """The words that stand first in an ARPA file that has been read, without sentence marks.

    Raises:
        ValueError: see `arpa_blocks`.
    """
    words: list[str] = []
    is_unigram = False
    for line in map(bytes.strip, _lines(arpa_blocks(path))):
        if (line.startswith(b"\\") and is_unigram) or len(words) == NUM_FIRST_WORDS:
            break
        if is_unigram and line:
            words += {line.split()[1].decode(errors="replace")}.difference(SENTENCE_MARKS)
        is_unigram = is_unigram or line == b"\\1-grams:"
    return words


def _lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for block in blocks:
        *lines, rest = (rest + block).split(b"\n")
        yield from lines
    yield rest


def _log10(number: bytes) -> float:
    value = float(np.float32(float(number)))
    return IMPOSSIBLE if value == -np.inf else value


def _decoded(word: bytes) -> str:
    text = word.decode()
    return UNKNOWN if text == UNKNOWN.upper() else text


def _shown(line: bytes) -> str:
    return line[:80].decode(errors="replace")
