"""Tokens with their frames as words with times and confidences."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from inference.transcript import Token, Word
from text.tokenizer import WORD_MARK

# How long a model holds a token depends on the quiet behind it, when it finds one does not.
_TOKEN_S = 0.08


@dataclass(frozen=True)
class Placed:
    """A token and where the CTC branch has it.

    Attributes:
        piece: its text, as the tokenizer spells it.
        start_frame, end_frame: its frames, the second one past the last; None where the CTC branch
            could not place it.
        log_prob: the highest log probability that it has in them.
    """

    piece: str
    start_frame: int | None
    end_frame: int | None
    log_prob: float


def words_of(
    words: Sequence[str], placed: Sequence[Placed], frame_s: float, duration_s: float
) -> tuple[tuple[Word, ...], tuple[Token, ...]]:
    """Words and tokens with their times and confidences.

    A token lasts from the first frame that it has to the last one, and at most for 0.08 s or a
    frame. A word lasts from the start of its first token to the end of its last one. Its
    confidence is the geometric mean of its tokens' confidences; that of a token is the highest
    posterior probability that the CTC branch gives it in its frames. Words that have no place share
    the time between their neighbours, with confidence 0.

    Args:
        words: of the text.
        placed: its tokens in order; "▁" in a piece ends a word.
        frame_s: seconds from one frame to the next.
        duration_s: of the audio.

    Returns:
        one word for each of ``words``, and the tokens that have a place.
    """

    def seconds(frame: int) -> float:
        return min(round(frame * frame_s, 3), duration_s)

    longest = max(1, math.floor(_TOKEN_S / frame_s + 1e-6))

    def end_s(start_frame: int, end_frame: int) -> float:
        return seconds(min(end_frame, start_frame + longest))

    found: list[Word | None] = []
    for text, group in zip(words, _tokens_of_words(words, placed), strict=True):
        spans = [
            (token.start_frame, token.end_frame)
            for token in group
            if token.start_frame is not None and token.end_frame is not None
        ]
        if not spans:
            found.append(None)
            continue
        confidence = math.exp(sum(token.log_prob for token in group) / len(group))
        found.append(Word(text, seconds(spans[0][0]), end_s(*spans[-1]), min(1.0, confidence)))
    tokens = tuple(
        Token(
            token.piece,
            seconds(token.start_frame),
            end_s(token.start_frame, token.end_frame),
            min(1.0, math.exp(token.log_prob)),
        )
        for token in placed
        if token.start_frame is not None and token.end_frame is not None
    )
    return tuple(_fill_gaps(words, found, duration_s)), tokens


def _tokens_of_words(words: Sequence[str], placed: Sequence[Placed]) -> list[list[Placed]]:
    """The tokens that spell each word; a piece may end one and begin the next."""
    groups: list[list[Placed]] = [[]]
    for token in placed:
        for character in token.piece.replace(WORD_MARK, " "):
            if character.isspace():
                groups.append([])
            elif not groups[-1] or groups[-1][-1] is not token:
                groups[-1].append(token)
    groups = [group for group in groups if group]
    # Else pieces spell their text in a way of their own: no word can be told from its tokens.
    return groups if len(groups) == len(words) else [[] for _ in words]


def _fill_gaps(texts: Sequence[str], words: Sequence[Word | None], duration_s: float) -> list[Word]:
    """Words without a place share the time between their neighbours evenly."""
    filled: list[Word] = []
    position = 0
    while position < len(words):
        word = words[position]
        if word is not None:
            filled.append(word)
            position += 1
            continue
        stop = position
        while stop < len(words) and words[stop] is None:
            stop += 1
        start_s = filled[-1].end_s if filled else 0.0
        following = words[stop] if stop < len(words) else None
        end_s = max(start_s, duration_s if following is None else following.start_s)
        step_s = (end_s - start_s) / (stop - position)
        starts_s = [min(start_s + i * step_s, end_s) for i in range(stop - position)]
        for text, (begin_s, stop_s) in zip(
            texts[position:stop], itertools.pairwise([*starts_s, end_s]), strict=True
        ):
            filled.append(Word(text, begin_s, stop_s, 0.0, is_placed=False))
        position = stop
    return filled
