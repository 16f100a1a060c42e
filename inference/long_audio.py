"""Recordings too long to be recognised at once: cut in their pauses, put together again."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import pairwise
from typing import TypeVar

import numpy as np
from scipy.ndimage import maximum_filter1d, minimum_filter1d, uniform_filter1d

from inference.transcript import Segment, Token, Transcript, Word

_Timed = TypeVar("_Timed", Word, Token)

_FRAME_S = 0.01
_SMOOTHING_S = 0.05
# Without a detector speech is what is louder than this above the background, which is looked for
# so far around a moment.
_SPEECH_DB = 12.0
_BACKGROUND_S = 30.0
# A cut lies in the middle of so much quiet.
_PAUSE_S = 0.3
# A pause in which a piece may end early, and how long the piece must be for that.
_LONG_PAUSE_S = 0.4
_SHORTEST_S = 1.0
# What a piece keeps of the quiet at its ends, whose level is at most so much above its lowest.
_MARGIN_S = 0.1
_QUIET_DB = 9.0
# Where there is no pause both pieces go so far beyond the cut.
_OVERLAP_S = 3.0
# One word in two pieces has its middle at times that differ by less.
_SAME_WORD_S = 0.5
_ROUNDING_S = 1e-6
# Rates that silero-vad takes, in Hz.
_SILERO_RATES = (8000, 16000)

MIN_SEGMENT_S = 4 * _OVERLAP_S
"""The longest piece must be at least so long: two overlaps, and room for a cut between them."""


@dataclass(frozen=True)
class Piece:
    """A part of a recording.

    Attributes:
        start, stop: samples.
        cut: sample at which it hands over to the next piece: in a pause, which neither has the
            whole of, or where there is none in the middle of what both have.
    """

    start: int
    stop: int
    cut: int


def cut_at_pauses(wav_S: np.ndarray, sample_rate: int, max_s: float = 30.0) -> list[Piece]:
    """Pieces of at most ``max_s`` seconds, cut where nobody speaks.

    A piece that is a second long ends in the next pause of four tenths of a second. If there is
    none in reach, it ends in the quietest third of a second of its second half; and if that is no
    pause either, the next piece begins before the cut and this one ends behind it. Of a pause at
    its ends a piece keeps a tenth of a second: networks were trained on recordings cut like
    that, and some normalise by the mean of all they are given.

    Speech is where silero-vad hears it, if it is installed and takes the rate, else what is louder
    than the background.

    Args:
        wav_S: the recording.
        sample_rate: in Hz.
        max_s: the longest piece, in seconds. A recording no longer than that stays whole.

    Raises:
        ValueError: ``max_s`` leaves no room for the overlap.
    """
    if not max_s >= MIN_SEGMENT_S:
        raise ValueError(f"max_s is {max_s}; pieces must be at least {MIN_SEGMENT_S:g} s long.")
    if len(wav_S) <= max_s * sample_rate:
        return [Piece(0, len(wav_S), len(wav_S))]
    longest, overlap = round(max_s * sample_rate), round(_OVERLAP_S * sample_rate)
    step = round(_FRAME_S * sample_rate)
    level_T = _level_db(wav_S, step)
    loudest_T = maximum_filter1d(level_T, round(_PAUSE_S / _FRAME_S))
    is_speech_T = _is_speech(wav_S, sample_rate, level_T)
    is_pause_T = ~maximum_filter1d(is_speech_T, round(_PAUSE_S / _FRAME_S))
    is_long_pause_T = ~maximum_filter1d(is_speech_T, round(_LONG_PAUSE_S / _FRAME_S))
    pieces, start = [], 0
    # Nothing follows the pause at the end.
    last_frame = len(is_long_pause_T) - int((~is_long_pause_T[::-1]).argmax())
    while True:
        high = (start + longest - overlap) // step
        early = (start + round(_SHORTEST_S * sample_rate)) // step
        # The pause that it begins in does not end it.
        early = max(early, start // step + int(is_speech_T[start // step :].argmax()))
        if is_long_pause_T[early : min(high, last_frame)].any():
            cut_frame = early + _middle_of_first_run(is_long_pause_T[early:])
            # A pause without an end in reach is cut where it is.
            cut_frame = min(cut_frame, high)
        elif len(wav_S) - start <= longest:
            break
        else:
            half = (start + longest // 2) // step
            cut_frame = half + int(loudest_T[half:high].argmin())
        cut = cut_frame * step
        if cut >= len(wav_S):
            break
        reach = 0 if is_pause_T[cut_frame] else overlap
        pieces.append(Piece(start, min(cut + reach, len(wav_S)), cut))
        start = cut - reach
    pieces.append(Piece(start, len(wav_S), len(wav_S)))
    margin = round(_MARGIN_S * sample_rate)
    overlaps = [False, *(piece.stop > piece.cut for piece in pieces)]
    return [
        _without_quiet_ends(piece, level_T, step, margin, *ends)
        for piece, ends in zip(pieces, pairwise(overlaps), strict=True)
    ]


def _without_quiet_ends(
    piece: Piece,
    level_T: np.ndarray,
    step: int,
    margin: int,
    overlaps_before: bool,
    overlaps_after: bool,
) -> Piece:
    """A piece that begins and ends with its sounds, and so many samples of quiet.

    An end where it overlaps its neighbour stays: both need the place of the cut.
    """
    first_frame = piece.start // step
    part_T = level_T[first_frame : -(-piece.stop // step)]
    loud = first_frame + np.flatnonzero(part_T > part_T.min(initial=np.inf) + _QUIET_DB)
    if not len(loud):
        # As loud everywhere: quiet or not, it is recognised.
        return piece
    start = max(piece.start, int(loud[0]) * step - margin)
    stop = min(piece.stop, int(loud[-1] + 1) * step + margin)
    return replace(
        piece,
        start=piece.start if overlaps_before else start,
        stop=piece.stop if overlaps_after else stop,
    )


def _middle_of_first_run(is_true: np.ndarray) -> int:
    first = int(is_true.argmax())
    rest = is_true[first:]
    length = len(rest) if rest.all() else int((~rest).argmax())
    return first + length // 2


def _is_speech(wav_S: np.ndarray, sample_rate: int, level_T: np.ndarray) -> np.ndarray:
    """Whether somebody speaks in each frame."""
    if sample_rate in _SILERO_RATES and find_spec("silero_vad") is not None:
        return _is_speech_to_silero(wav_S, sample_rate, len(level_T))
    background_T = minimum_filter1d(
        uniform_filter1d(level_T, round(_PAUSE_S / _FRAME_S)), round(_BACKGROUND_S / _FRAME_S)
    )
    return level_T > background_T + _SPEECH_DB


def _is_speech_to_silero(wav_S: np.ndarray, sample_rate: int, num_frames: int) -> np.ndarray:
    import torch
    from silero_vad import get_speech_timestamps, load_silero_vad

    with warnings.catch_warnings():
        # torch would rather have its models in another form.
        warnings.simplefilter("ignore")
        # It keeps the stream that it hears in itself: one for each call.
        detector = load_silero_vad()
    is_speech_T = np.zeros(num_frames, bool)
    found = get_speech_timestamps(
        torch.from_numpy(wav_S), detector, sampling_rate=sample_rate, return_seconds=False
    )
    step = round(_FRAME_S * sample_rate)
    for stretch in found:
        is_speech_T[stretch["start"] // step : -(-stretch["end"] // step)] = True
    return is_speech_T


def join(
    pieces: Sequence[Piece], transcripts: Sequence[Transcript], sample_rate: int
) -> Transcript:
    """One transcript of all pieces, its times from the start of the recording.

    Where pieces overlap they are joined at a word that both have at the same time, the one nearest
    to the cut; without such a word each gives what it has on its side of the cut. Times go on from
    piece to piece: what would last longer ends where the next word begins.
    """
    parts: list[tuple[list[Word], list[Token]]] = []
    for piece, transcript, before in zip(pieces, transcripts, [None, *pieces], strict=False):
        offset_s = piece.start / sample_rate
        words = [_shifted(word, offset_s) for word in transcript.words]
        tokens = [_shifted(token, offset_s) for token in transcript.tokens]
        if before is not None and before.stop > piece.start:
            until_s, from_s = _join_at(parts[-1][0], words, before.cut / sample_rate)
            earlier, their_tokens = parts[-1]
            earlier[:] = [word for word in earlier if _middle(word) < until_s]
            num_left_out = sum(_middle(word) < from_s for word in words)
            # A token goes with its word, wherever its own middle is; the mark of a new word, which
            # may be a token, with the word that follows.
            last_s = earlier[-1].end_s if earlier else -math.inf
            first_s = words[num_left_out - 1].end_s if num_left_out else -math.inf
            their_tokens[:] = [t for t in their_tokens if t.end_s <= last_s + _ROUNDING_S]
            tokens = [t for t in tokens if t.start_s >= first_s - _ROUNDING_S]
            words = words[num_left_out:]
        parts.append((words, tokens))
    segments = []
    cut = 0
    for piece, transcript, (words, _) in zip(pieces, transcripts, parts, strict=True):
        if words:
            start_s = max(piece.start, cut) / sample_rate
            end_s = min(piece.stop, piece.cut) / sample_rate
            text = " ".join(word.text for word in words)
            segments.append(Segment(text, start_s, end_s, transcript.alternatives))
        cut = piece.cut
    return Transcript(
        " ".join(segment.text for segment in segments),
        _in_order([word for words, _ in parts for word in words]),
        _in_order([token for _, tokens in parts for token in tokens]),
        tuple(segments),
        pieces[-1].cut / sample_rate,
    )


def _in_order(parts: Sequence[_Timed]) -> tuple[_Timed, ...]:
    """Words or tokens of which none lasts longer than until the next one, as another piece has it.

    The word that two pieces have may lie elsewhere in either.
    """
    ordered: list[_Timed] = []
    next_s = math.inf
    for part in reversed(parts):
        if part.end_s > next_s:
            part = replace(part, start_s=min(part.start_s, next_s), end_s=next_s)
        ordered.append(part)
        next_s = part.start_s
    return tuple(reversed(ordered))


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
    # Of a word that is said twice in a row, the one that is nearer in time is the same.
    a, b = min(
        common,
        key=lambda pair: (abs(_middle(pair[0]) - cut_s), abs(_middle(pair[0]) - _middle(pair[1]))),
    )
    following = next((word for word in right if _middle(word) > _middle(b)), None)
    if following is not None and following.start_s < a.start_s:
        # The right piece, which has what follows earlier than the left one has the common word,
        # has that word, too.
        return _middle(a), _middle(b)
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
