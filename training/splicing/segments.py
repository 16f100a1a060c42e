"""Recordings cut where the speaker pauses between two words."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy.ndimage import uniform_filter1d

from common.files import atomic_write

_SMOOTHING_S = 0.05
# A pause is at most so much louder than the quietest twentieth of the recording, and at least so
# much quieter than the words on both sides.
_PAUSE_DB = 12.0
_SPEECH_DB = 15.0
# Zeros that somebody put before a recording are not its background.
_DIGITAL_SILENCE_DB = -90.0
_MARGIN_S = 0.15


@dataclass(frozen=True)
class Segment:
    """Some words and where they are in a recording.

    Attributes:
        utterance_id: of the recording.
        start, stop: samples.
        words: what is said between the two.
    """

    utterance_id: str
    start: int
    stop: int
    words: str


def cut_at_pauses(
    wav_S: np.ndarray,
    sample_rate: int,
    words: Sequence[str],
    spans: Sequence[tuple[int, int]],
    utterance_id: str,
) -> list[Segment]:
    """Segments of one or more words; words that run into each other stay together.

    Between two words the quietest moment is looked for, and is a cut if it is as quiet as a pause.
    Of the silence around a segment no more than 0.15 s is kept.

    Args:
        wav_S: the recording.
        words: its transcript.
        spans: for each word some samples (first, one past the last) that are surely within it.
    """
    if not len(wav_S):
        return []
    level_S = _level_above_background(wav_S, sample_rate)
    segments: list[Segment] = []
    start, first_word = 0, 0
    for place in range(len(words)):
        cut = len(wav_S)
        if place + 1 < len(words):
            low = min(spans[place][1], len(wav_S) - 1)
            high = max(low + 1, min(spans[place + 1][0], len(wav_S)))
            cut = low + int(level_S[low:high].argmin())
            next_word_stop = max(cut + 1, spans[place + 1][1])
            quieter = min(level_S[start : cut + 1].max(), level_S[cut:next_word_stop].max())
            if level_S[cut] > _PAUSE_DB or quieter - level_S[cut] < _SPEECH_DB:
                continue
        speech = np.flatnonzero(level_S[start:cut] > _SPEECH_DB)
        if len(speech):
            margin = round(_MARGIN_S * sample_rate)
            segments.append(
                Segment(
                    utterance_id,
                    max(start, start + int(speech[0]) - margin),
                    min(cut, start + int(speech[-1]) + 1 + margin),
                    " ".join(words[first_word : place + 1]),
                )
            )
        start, first_word = cut, place + 1
    return segments


def _level_above_background(wav_S: np.ndarray, sample_rate: int) -> np.ndarray:
    """Decibels of each sample's surroundings above the quiet of the recording."""
    power_S = uniform_filter1d(
        np.square(wav_S, dtype=np.float64), max(1, round(_SMOOTHING_S * sample_rate))
    )
    # The filter's running sum may come out just below zero in digital silence.
    level_S = 10 * np.log10(np.maximum(power_S, 0) + 1e-10)
    recorded_S = level_S[level_S > _DIGITAL_SILENCE_DB]
    background = np.percentile(recorded_S, 5) if len(recorded_S) else 0.0
    return np.maximum(level_S - background, 0.0)


def write_segments(path: Path, segments: Iterable[Segment], origin: Mapping[str, int]) -> None:
    """Keep them, with what tells where in a run they were found."""
    with atomic_write(path) as stream:
        content = {"origin": dict(origin), "segments": [asdict(segment) for segment in segments]}
        json.dump(content, stream, ensure_ascii=False)


def read_segments(path: Path) -> tuple[list[Segment], dict[str, int]]:
    """What `write_segments` wrote: (segments, origin)."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return [Segment(**segment) for segment in content["segments"]], content["origin"]
