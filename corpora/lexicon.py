"""A pronunciation lexicon as CSV, whole and in train, dev and test parts, for grapheme-to-phoneme
models: ``ID,duration,char,phn``."""

import csv
import random
from collections.abc import Iterable
from pathlib import Path

from common.files import atomic_write

HEADER = ("ID", "duration", "char", "phn")
PARTS = {"lexicon_tr.csv": 0.98, "lexicon_dev.csv": 0.01, "lexicon_test.csv": 0.01}
FILES = ("lexicon.csv", *PARTS)

_Row = tuple[int, int, str, str]


def write_lexicon(source: str | Path, folder: str | Path, seed: int) -> int:
    """Write ``lexicon.csv`` and its three parts.

    All pronunciations of a word fall into one part, so no test word is seen in training. Stress
    marks (the digits of ARPAbet vowels) are dropped; ``duration`` counts letters.

    Args:
        source: lines ``WORD PH1 PH2 ...``, as in LibriSpeech's lexicon.
        folder: where the four files go.
        seed: decides which word falls into which part.

    Returns:
        The number of pronunciations.

    Raises:
        ValueError: a line without a pronunciation, or no line at all.
    """
    rows = _read(source)
    folder = Path(folder)
    _write(folder / "lexicon.csv", rows)

    words = sorted({row[2] for row in rows})
    random.Random(seed).shuffle(words)
    first, share = 0, 0.0
    for name, part_share in PARTS.items():
        share += part_share
        end = round(share * len(words))
        part = set(words[first:end])
        _write(folder / name, (row for row in rows if row[2] in part))
        first = end
    return len(rows)


def _read(source: str | Path) -> list[_Row]:
    rows = []
    try:
        lines = Path(source).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{source} is not UTF-8: convert it first.") from None
    for number, line in enumerate(lines, start=1):
        word, *phonemes = line.split() or [""]
        if not word:
            continue
        if not phonemes:
            raise ValueError(
                f"{source}, line {number}: {word!r} has no pronunciation;"
                " a lexicon's lines are WORD PH1 PH2 ..."
            )
        stressless = " ".join(phoneme.strip("0123456789") for phoneme in phonemes)
        rows.append((len(rows), len(word), " ".join(word), stressless))
    if not rows:
        raise ValueError(f"{source} holds no pronunciations")
    return rows


def _write(path: Path, rows: Iterable[_Row]) -> None:
    with atomic_write(path) as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(HEADER)
        writer.writerows(rows)
