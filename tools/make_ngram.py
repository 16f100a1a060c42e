"""Estimate a smoothed n-gram from text and write it as ARPA, for fusion at decoding time.

    python -m tools.make_ngram train.txt --order 3 --output lm.arpa
    python -m tools.make_ngram train.csv --order 4 --output tokens.arpa --tokenizer tokenizer.model

Text is one sentence per line, plain or gzip, or a manifest (.csv) whose transcripts are taken. With
a tokenizer the n-gram is one of tokens (for the S2S script), without one of words (for the CTC
script). Counts are held in memory: at order 3 about 350 MB for each million words, beside 550 MB
for the program. For billions of words use lmplz of kenlm, which writes the same format.

Interpolated modified Kneser-Ney smoothing: Chen and Goodman 1999; the ARPA file stores the
interpolated probabilities, so that backing off gives exactly the interpolated model.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import TextIO

from common.errors import EXIT_USER_ERROR, UserError, in_words
from common.files import atomic_write
from text.tokenizer import check_letter_case, tokens_of
from text.tokenizer import load_tokenizer as load_sentencepiece
from training.lm.text_batches import read_sentences

BOS, EOS, UNK = "<s>", "</s>", "<unk>"
FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)
"""For counts 1, 2 and more, where the text is too small to estimate them (as lmplz has it)."""

KENLM_MAX_ORDER = 6
"""Of the longest n-gram that KenLM reads as ``pip`` compiles it."""

_CHECKED_SENTENCES = 10_000
"""First sentences, whose letters are held against the tokenizer's."""

NGram = tuple[str, ...]


@dataclass(frozen=True)
class NGramModel:
    """A back-off model: log10 probabilities, and log10 back-off weights of contexts.

    Attributes:
        log_probs: per order, of every n-gram that was seen.
        log_backoffs: of every context that was seen, up to one word less than the order.
        used_fallback: orders whose discounts could not be estimated.
    """

    log_probs: tuple[dict[NGram, float], ...]
    log_backoffs: dict[NGram, float]
    used_fallback: tuple[int, ...] = ()

    @property
    def order(self) -> int:
        return len(self.log_probs)

    @property
    def words(self) -> list[str]:
        """What the model can predict: every word, the end of a sentence, and the unknown word."""
        return [word for (word,) in self.log_probs[0] if word != BOS]

    def log_prob(self, word: str, context: Sequence[str] = ()) -> float:
        """Log10 probability of ``word`` after ``context`` (the latest word last)."""
        word = word if (word,) in self.log_probs[0] else UNK
        history = tuple(context)[max(0, len(context) - self.order + 1) :]
        log_backoff = 0.0
        while (*history, word) not in self.log_probs[len(history)]:
            log_backoff += self.log_backoffs.get(history, 0.0)
            history = history[1:]
        return log_backoff + self.log_probs[len(history)][(*history, word)]


def estimate(sentences: Iterable[Sequence[str]], order: int) -> NGramModel:
    """Estimates an interpolated modified Kneser-Ney model.

    Args:
        sentences: words of each sentence, without sentence marks.
        order: words in the longest n-gram.

    Raises:
        ValueError: no words, an order below 1, or a sentence mark among the words.
    """
    if order < 1:
        raise ValueError(f"The order is {order}; it must be at least 1.")
    counts = _adjusted_counts(_sentence_ngrams(sentences, order))
    words = {word for (word,) in counts[0]}
    if words <= {EOS}:
        raise ValueError("The text has no words: an n-gram cannot be estimated.")

    uniform = 1 / (len(words) + 1)
    lower: dict[NGram, float] = {}
    log_probs: list[dict[NGram, float]] = []
    log_backoffs: dict[NGram, float] = {}
    used_fallback = []
    for length, counts_of_length in enumerate(counts, start=1):
        discounts = _discounts(counts_of_length.values())
        if discounts is None:
            discounts = FALLBACK_DISCOUNTS
            used_fallback.append(length)
        totals, discounted = defaultdict(int), defaultdict(float)
        for ngram, count in counts_of_length.items():
            totals[ngram[:-1]] += count
            discounted[ngram[:-1]] += discounts[min(count, 3) - 1]
        # Counts become probabilities where they are, and these logarithms: memory bounds the text.
        current: dict[NGram, float] = counts_of_length
        for ngram, count in counts_of_length.items():
            context = ngram[:-1]
            backed_off = lower[ngram[1:]] if length > 1 else uniform
            seen = count - discounts[min(count, 3) - 1] + discounted[context] * backed_off
            current[ngram] = seen / totals[context]
        if length == 1:
            current[(UNK,)] = discounted[()] * uniform / totals[()]
        else:
            for context, total in totals.items():
                log_backoffs[context] = math.log10(discounted[context] / total)
        _take_logarithms(lower)
        log_probs.append(current)
        lower = current
    _take_logarithms(lower)
    # Nothing ever predicts the start of a sentence.
    log_probs[0][(BOS,)] = -99.0
    return NGramModel(tuple(log_probs), log_backoffs, tuple(used_fallback))


def _take_logarithms(probs: dict[NGram, float]) -> None:
    for ngram, prob in probs.items():
        probs[ngram] = math.log10(prob)


def write_arpa(model: NGramModel, stream: TextIO) -> None:
    """Writes a model in the ARPA format."""
    stream.write("\\data\\\n")
    for length, log_probs in enumerate(model.log_probs, start=1):
        stream.write(f"ngram {length}={len(log_probs)}\n")
    for length, log_probs in enumerate(model.log_probs, start=1):
        stream.write(f"\n\\{length}-grams:\n")
        for ngram, log_prob in log_probs.items():
            line = f"{log_prob:.7g}\t{' '.join(ngram)}"
            if length < model.order:
                line += f"\t{model.log_backoffs.get(ngram, 0.0):.7g}"
            stream.write(line + "\n")
    stream.write("\n\\end\\\n")


def _sentence_ngrams(sentences: Iterable[Sequence[str]], order: int) -> list[Counter[NGram]]:
    """Per order: counts of the longest n-grams, and of the shorter ones that begin a sentence."""
    counts: list[Counter[NGram]] = [Counter() for _ in range(order)]
    for words in sentences:
        marks = {BOS, EOS, UNK}.intersection(words)
        if marks:
            raise ValueError(
                f"The text contains {sorted(marks)[0]!r} as a word, in {' '.join(words)[:80]!r}; "
                "sentence marks are added by this command and must not be in the text."
            )
        # One object for each word, however often it comes.
        sentence = (BOS, *map(sys.intern, words), EOS)
        for n in range(1, min(order - 1, len(sentence)) + 1):
            counts[n - 1][sentence[:n]] += 1
        counts[-1].update(sentence[i : i + order] for i in range(len(sentence) - order + 1))
    return counts


def _adjusted_counts(counts: list[Counter[NGram]]) -> list[Counter[NGram]]:
    """Per order, shortest first: how often the longest and sentence-initial n-grams occur, and
    after how many different words all others do."""
    for shorter, longer in reversed(list(pairwise(counts))):
        shorter.update(ngram[1:] for ngram in longer)
    counts[0].pop((BOS,), None)
    return counts


def _discounts(counts: Iterable[int]) -> tuple[float, float, float] | None:
    """Discounts of the counts 1, 2 and from 3 on; None where the text does not determine them."""
    types = Counter(count for count in counts if count <= 4)
    if not all(types[count] for count in (1, 2, 3, 4)):
        return None
    y = types[1] / (types[1] + 2 * types[2])
    discounts = tuple(k - (k + 1) * y * types[k + 1] / types[k] for k in (1, 2, 3))
    return discounts if all(0 < d <= k for k, d in enumerate(discounts, start=1)) else None


def _split(
    sentences: Iterable[str], tokenizer_file: str | None, dropped: Counter[str]
) -> Iterator[list[str]]:
    """Words, or pieces; counts the characters that the tokenizer does not know."""
    if tokenizer_file is None:
        yield from (sentence.split() for sentence in sentences)
        return
    tokenizer = load_sentencepiece(tokenizer_file, sys.maxsize)
    sentences = iter(sentences)
    first = list(islice(sentences, _CHECKED_SENTENCES))
    check_letter_case(tokenizer, first, "The text")
    for sentence in chain(first, sentences):
        if tokens := tokens_of(tokenizer, sentence, dropped):
            yield [tokenizer.id_to_piece(token) for token in tokens]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.make_ngram",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("text", nargs="+", help="text files, plain or .gz, or manifests (.csv)")
    parser.add_argument(
        "--order", type=int, default=3, help="words in the longest n-gram (default: 3)"
    )
    parser.add_argument("--output", required=True, type=Path, help="the ARPA file to write")
    parser.add_argument("--tokenizer", help="sentencepiece model: an n-gram of its tokens")
    arguments = parser.parse_args(argv)
    if arguments.tokenizer is not None and arguments.order < 2:
        parser.error("an n-gram of tokens needs --order 2 at least: KenLM reads no other")
    if arguments.tokenizer is not None and arguments.order > KENLM_MAX_ORDER:
        parser.error(f"an n-gram of tokens needs --order {KENLM_MAX_ORDER} at most, for KenLM")
    dropped: Counter[str] = Counter()
    try:
        sentences = _split(read_sentences(arguments.text), arguments.tokenizer, dropped)
        model = estimate(sentences, arguments.order)
    except (UserError, ValueError, OSError) as error:
        print(f"error: {in_words(error)}", file=sys.stderr)
        return EXIT_USER_ERROR
    try:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(arguments.output) as stream:
            write_arpa(model, stream)
    except OSError as error:
        print(f"error: {arguments.output} cannot be written: {error.strerror}", file=sys.stderr)
        return EXIT_USER_ERROR
    if model.used_fallback:
        print(
            f"Too little text for the discounts of order {', '.join(map(str, model.used_fallback))}"
            f": {FALLBACK_DISCOUNTS} are used there."
        )
    if dropped:
        listed = ", ".join(f"{char!r} {count}" for char, count in dropped.most_common(20))
        print(
            f"{dropped.total()} characters that the tokenizer does not know were left out, "
            f"{len(dropped)} different ones: {listed}"
        )
    sizes = ", ".join(f"{len(of)} {n}-grams" for n, of in enumerate(model.log_probs, start=1))
    print(f"{arguments.output}: {sizes}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
