"""What a CTC search finds, and how tokens spell words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

WORD_MARK = "▁"
"""Sentencepiece's sign for the beginning of a word."""


class CTCToken(NamedTuple):
    """A token where the most probable alignment of its hypothesis has it.

    Attributes:
        id: its index in the vocabulary.
        start_frame: the first of its frames.
        end_frame: the frame after the last of them.
        log_prob: the highest log probability that it has in them.
    """

    id: int
    start_frame: int
    end_frame: int
    log_prob: float


class CTCWord(NamedTuple):
    """A word and the tokens that spell it; a token that only separates words is in none."""

    text: str
    tokens: tuple[CTCToken, ...]

    @property
    def start_frame(self) -> int:
        return self.tokens[0].start_frame

    @property
    def end_frame(self) -> int:
        return self.tokens[-1].end_frame


@dataclass(frozen=True)
class CTCHypothesis:
    """One of the texts that a search found.

    Attributes:
        words: with their tokens and frames.
        tokens: all of them, those that separate words included.
        score: log probability of the text given the audio, over the alignments that were kept.
        lm_score: ``score`` plus what n-gram and hotwords add; hypotheses come in its order.
    """

    words: tuple[CTCWord, ...]
    tokens: tuple[CTCToken, ...]
    score: float
    lm_score: float

    @property
    def text(self) -> str:
        return " ".join(word.text for word in self.words)


class Vocabulary:
    """How tokens spell words.

    Where pieces begin with sentencepiece's "▁", these begin words; else a token that is a space
    separates them.

    Args:
        pieces: the tokens in the order of their ids.
        blank: id of CTC's blank, whatever its piece is.

    Attributes:
        begins_word: of each token, whether it ends the word before it.
        spelling: of each token, the characters that it adds.
        letters: the characters of all tokens but ``<unk>`` and its like.

    Raises:
        ValueError: no such blank, a piece twice, or a space inside a piece.
    """

    def __init__(self, pieces: Sequence[str], blank: int = 0) -> None:
        self.pieces, self.blank = tuple(pieces), blank
        if not 0 <= blank < len(self.pieces):
            raise ValueError(
                f"The blank is token {blank}, but the vocabulary has {len(self.pieces)} tokens; "
                "its list must contain the blank, too."
            )
        if len(set(self.pieces)) < len(self.pieces):
            twice = next(p for i, p in enumerate(self.pieces) if p in self.pieces[:i])
            raise ValueError(f"The vocabulary has the token {twice!r} twice.")
        marked = [piece.startswith(WORD_MARK) for piece in self.pieces]
        is_sentencepiece = any(marked)
        self.begins_word = marked if is_sentencepiece else [p == " " for p in self.pieces]
        self.begins_word[blank] = False
        self.spelling = [
            piece.removeprefix(WORD_MARK if is_sentencepiece else " ") if begins else piece
            for piece, begins in zip(self.pieces, self.begins_word, strict=True)
        ]
        self.spelling[blank] = ""
        spelled = (text for text in self.spelling if not re.fullmatch("<.+>", text))
        self.letters = frozenset().union(*spelled)
        for token, spelling in enumerate(self.spelling):
            if " " in spelling or "\0" in spelling:
                raise ValueError(
                    f"Token {token} of the vocabulary is {self.pieces[token]!r}: only the token "
                    f"' ' may contain a space, in a vocabulary without {WORD_MARK!r}."
                )

    def __len__(self) -> int:
        return len(self.pieces)

    def hypothesis(
        self, tokens: Sequence[CTCToken], score: float, lm_score: float
    ) -> CTCHypothesis:
        """The words that the tokens spell."""
        groups: list[list[CTCToken]] = [[]]
        for token in tokens:
            if self.begins_word[token.id]:
                groups.append([])
            if self.spelling[token.id]:
                groups[-1].append(token)
        words = tuple(
            CTCWord("".join(self.spelling[token.id] for token in group), tuple(group))
            for group in groups
            if group
        )
        return CTCHypothesis(words, tuple(tokens), score, lm_score)
