"""Whether an n-gram is one of words, and of words that can be recognised."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from decoding.ctc_beam_search.hypothesis import WORD_MARK, Vocabulary
from decoding.ctc_beam_search.ngram import Ngram, first_words

logger = logging.getLogger(__name__)

WANTED = (
    "This search takes an n-gram of words (python -m tools.make_ngram without --tokenizer makes "
    "one)."
)
NEXT_TO_NONE = 0.05
"""A smaller share of words is known by chance."""

_SEPARATORS = ("|", "_", "<space>", "<sp>", WORD_MARK)
"""What stands for the space in n-grams of characters."""


def check_words(ngram: Ngram, vocabulary: Vocabulary) -> None:
    """Refuses an n-gram that knows no word of those that the vocabulary spells.

    Only references can tell whether words are single characters: without a sign for the space among
    them it is only warned.

    Raises:
        ValueError: an n-gram of tokens or characters, or of words in the other letter case.
    """
    words = ngram.first_words
    refuse_tokens(ngram, [*words, *vocabulary.pieces], ngram.path)
    if case := other_case(words, lambda word: set(word) <= vocabulary.letters):
        raise ValueError(
            f"{ngram.path} is written in {case} case, as in {words[0]!r}, and the model's tokens "
            "are not: it knows no word. Make it from text in the case of the transcripts."
        )
    if is_of_characters(words):
        if signs := [sign for sign in _SEPARATORS if sign in ngram]:
            raise ValueError(
                f"{ngram.path} is an n-gram of characters, with {signs[0]!r} between words. "
                f"{WANTED}"
            )
        logger.warning("All words of %s are single characters. %s", ngram.path, WANTED)


def check_characters(path: str | Path, words: Iterable[str]) -> None:
    """Refuses an ARPA file of single characters where references have longer words.

    Raises:
        ValueError: it is one; or as of `first_words`.
    """
    if is_of_characters(first_words(path)) and any(len(word) > 1 for word in words):
        raise ValueError(f"{path} is an n-gram of characters. {WANTED}")


def is_of_characters(words: Sequence[str]) -> bool:
    """Whether next to no word has more than one character."""
    return sum(len(word) > 1 for word in words) < NEXT_TO_NONE * len(words)


def refuse_tokens(ngram: object, pieces: Iterable[str], name: object) -> None:
    """Refuses an n-gram (of any class that has ``in``) that has tokens that begin words.

    Args:
        pieces: that it may have.
        name: of the n-gram.

    Raises:
        ValueError: it is one.
    """
    for piece in pieces:
        if piece.startswith(WORD_MARK) and piece in ngram:  # type: ignore[operator]
            raise ValueError(f"{name} is an n-gram of tokens, such as {piece!r}. {WANTED}")


def other_case(words: Sequence[str], is_known: Callable[[str], bool]) -> str:
    """``lower`` or ``upper`` where words are written so and known in the other case alone."""
    if sum(map(is_known, words)) >= NEXT_TO_NONE * len(words):
        return ""
    for case, spelled in (("lower", str.upper), ("upper", str.lower)):
        others = [spelled(word) for word in words if spelled(word) != word]
        if 2 * sum(map(is_known, others)) > len(words):
            return case
    return ""
