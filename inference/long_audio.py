"""Recordings too long to be recognised at once: cut in their pauses, put together again."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from scipy.ndimage import maximum_filter1d, minimum_filter1d, uniform_filter1d

from inference.transcript import Segment, Token, Transcript, Word

_Timed = TypeVar("_Timed", Word, Token)

_FRAME_S = 0.01
_SMOOTHING_S = 0.05
# A cut lies in the middle of so much quiet, which is no louder than this above the background.
_PAUSE_S = 0.3
_PAUSE_DB = 12.0
# How far around a moment its background is looked for.
_BACKGROUND_S = 30.0
# A pause in which a piece may end early, and how long the piece must be for that.
_LONG_PAUSE_S = 0.5
_SHORTEST_S = 5.0
# Where there is no pause both pieces go so far beyond the cut.
_OVERLAP_S = 3.0
# One word in two pieces has its middle at times that differ by less.
_SAME_WORD_S = 0.5

MIN_SEGMENT_S = 4 * _OVERLAP_S
"""The longest piece must be at least so long: two overlaps, and room for a cut between them."""


@dataclass(frozen=True)
class Piece:
    """A part of a recording.

    Attributes:
        start, stop: samples.
        cut: sample at which it hands over to the next piece; beyond it both overlap.
    """

    start: int
    stop: int
    cut: int


def cut_at_pauses(wav_S: np.ndarray, sample_rate: int, max_s: float = 30.0) -> list[Piece]:
    """Pieces of at most ``max_s`` seconds, cut where it is quiet.

    A piece that is five seconds long ends in the next pause of half a second. If there is none, it
    ends in the quietest third of a second of its second half; and if that is no pause either, the
    next piece begins before the cut and this one ends behind it.

    Args:
        wav_S: the recording.
        sample_rate: in Hz.
        max_s: the longest piece, in seconds.

    Raises:
        ValueError: ``max_s`` leaves no room for the overlap.
    """
    if max_s < MIN_SEGMENT_S:
        raise ValueError(f"max_s is {max_s}; pieces must be at least {MIN_SEGMENT_S:g} s long.")
    longest, overlap = round(max_s * sample_rate), round(_OVERLAP_S * sample_rate)
    if len(wav_S) <= longest:
        return [Piece(0, len(wav_S), len(wav_S))]
    step = round(_FRAME_S * sample_rate)
    level_T = _level_db(wav_S, step)
    loudest_T = maximum_filter1d(level_T, round(_PAUSE_S / _FRAME_S))
    background_T = minimum_filter1d(
        uniform_filter1d(level_T, round(_PAUSE_S / _FRAME_S)), round(_BACKGROUND_S / _FRAME_S)
    )
    is_long_pause_T = (
        maximum_filter1d(level_T, round(_LONG_PAUSE_S / _FRAME_S)) <= background_T + _PAUSE_DB
    )
    pieces, start = [], 0
    while len(wav_S) - start > longest:
        high = (start + longest - overlap) // step
        early = (start + round(_SHORTEST_S * sample_rate)) // step
        if is_long_pause_T[early:high].any():
            cut_frame = early + _middle_of_first_run(is_long_pause_T[early:high])
        else:
            half = (start + longest // 2) // step
            cut_frame = half + int(loudest_T[half:high].argmin())
        cut = min(cut_frame * step, len(wav_S))
        is_pause = loudest_T[cut_frame] <= background_T[cut_frame] + _PAUSE_DB
        reach = 0 if is_pause else overlap
        pieces.append(Piece(start, min(cut + reach, len(wav_S)), cut))
        start = cut - reach
    return [*pieces, Piece(start, len(wav_S), len(wav_S))]


def _middle_of_first_run(is_true: np.ndarray) -> int:
    first = int(is_true.argmax())
    rest = is_true[first:]
    length = len(rest) if rest.all() else int((~rest).argmax())
    return first + length // 2


def join(
    pieces: Sequence[Piece], transcripts: Sequence[Transcript], sample_rate: int
) -> Transcript:
    """One transcript of all pieces, its times from the start of the recording.

    Where pieces overlap they are joined at a word that both have at the same time, the one nearest
    to the cut; without such a word each gives what it has on its side of the cut.
    """
    parts: list[tuple[list[Word], list[Token]]] = []
    for piece, transcript, before in zip(pieces, transcripts, [None, *pieces], strict=False):
        offset_s = piece.start / sample_rate
        words = [_shifted(word, offset_s) for word in transcript.words]
        tokens = [_shifted(token, offset_s) for token in transcript.tokens]
        if before is not None and before.stop > piece.start:
            until_s, from_s = _join_at(parts[-1][0], words, before.cut / sample_rate)
            for part in parts[-1]:
                part[:] = [item for item in part if _middle(item) < until_s]
            words = [word for word in words if _middle(word) >= from_s]
            tokens = [token for token in tokens if _middle(token) >= from_s]
        parts.append((words, tokens))
    segments = []
    start_s = 0.0
    for piece, (words, _) in zip(pieces, parts, strict=True):
        end_s = piece.cut / sample_rate
        if words:
            segments.append(Segment(" ".join(word.text for word in words), start_s, end_s))
        start_s = end_s
    return Transcript(
        " ".join(segment.text for segment in segments),
        tuple(word for words, _ in parts for word in words),
        tuple(token for _, tokens in parts for token in tokens),
        tuple(segments),
        pieces[-1].stop / sample_rate,
    )


def _join_at(left: Sequence[Word], right: Sequence[Word], cut_s: float) -> tuple[float, float]:
    """Until when the left words count, and from when the right ones do."""
    common = [
        (a, b)
        for a in left
        for b in right
        if a.text == b.text and abs(_middle(a) - _middle(b)) < _SAME_WORD_S
    ]
    if not common:
        return cut_s, cut_s
    a, b = min(common, key=lambda pair: abs(_middle(pair[0]) - cut_s))
    # The left piece has the common word, the right one what follows it.
    return float(np.nextafter(_middle(a), np.inf)), float(np.nextafter(_middle(b), np.inf))


def _middle(part: Word | Token) -> float:
    return (part.start_s + part.end_s) / 2


def _shifted(part: _Timed, offset_s: float) -> _Timed:
    return replace(part, start_s=part.start_s + offset_s, end_s=part.end_s + offset_s)


def _level_db(wav_S: np.ndarray, step: int) -> np.ndarray:
    """Decibels of every frame's surroundings."""
    frames = -(-len(wav_S) // step)
    power_T = np.empty(frames)
    # By the minute: a float64 copy of two hours would take a gigabyte.
    block = 6000 * step
    for start in range(0, len(wav_S), block):
        part = np.square(wav_S[start : start + block], dtype=np.float64)
        sums = np.add.reduceat(part, np.arange(0, len(part), step))
        power_T[start // step : start // step + len(sums)] = sums / step
    smooth_T = uniform_filter1d(power_T, round(_SMOOTHING_S / _FRAME_S))
    return 10 * np.log10(np.maximum(smooth_T, 0) + 1e-10)
