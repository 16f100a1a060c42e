"""Samples that come piece by piece, at any rate, as those that a model takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from inference.audio import HEADROOM, AudioError, check_rate, mixed_down, resampler, with_channels

# Input with which a resampler that starts anew gives what one that never stopped gives, in seconds
# and, since its filter is as long as so many samples of the lower rate, in samples; half is enough.
_HISTORY_S, _HISTORY_SAMPLES = 0.5, 2000
# Beyond it squares are no numbers of float32 any more; even unscaled 24-bit integers are below.
_MAX_PEAK = 1e8


@dataclass(frozen=True)
class SampleState:
    """What it takes to go on with a stream of samples.

    Attributes:
        num_in: samples that came.
        num_out: samples that were given.
        history_S: the last samples that came, mixed down, where they are resampled.
    """

    num_in: int
    num_out: int
    history_S: np.ndarray


class SampleStream:
    """Mixes down and resamples (soxr) in pieces of any size, as ``as_waveform`` does at once.

    Where ``as_waveform`` makes a recording quieter that goes beyond full scale, a stream leaves it
    as it is: it does not know its loudest sample.

    Args:
        rate: of the samples, in Hz, a whole number.
        sample_rate: wanted, in Hz.
        state: to go on from.

    Raises:
        AudioError: no recording has such a rate.
    """

    def __init__(self, rate: int, sample_rate: int, state: SampleState | None = None):
        check_rate(rate, "stream")
        if rate != int(rate):
            raise AudioError(f"stream: the sampling rate is {rate} Hz; it must be a whole number")
        # numpy's integers, and 16000.0, are not to be saved.
        self.rate, self.sample_rate = rate, sample_rate = int(rate), sample_rate
        state = state or SampleState(0, 0, np.zeros(0, np.float32))
        self.num_in, self.num_out = state.num_in, state.num_out
        self._history, self._num_later = [state.history_S], 0
        self._resampler: Any = None
        # What a replay gave beyond what had been given, and what it has still to give again.
        self._early_S, self._surplus = np.zeros(0, np.float32), 0
        if rate != sample_rate:
            self._resampler = resampler(rate, sample_rate)
            if state.num_in:
                self._replay(state)

    @property
    def state(self) -> SampleState:
        """What it takes to go on from here."""
        self._forget(np.concatenate(self._history))
        return SampleState(self.num_in, self.num_out, self._history[0])

    def add(self, samples: np.ndarray, last: bool = False) -> np.ndarray:
        """The samples (S,), float32, that these complete; all with the ``last``.

        Args:
            samples: (S,) or (S, channels), integers or floating point.

        Raises:
            AudioError: samples of another shape, that are not finite, or far beyond full scale.
        """
        new_S, peak = mixed_down(with_channels(samples, "stream"), "stream")
        if peak > _MAX_PEAK:
            raise AudioError(f"stream: samples go up to {peak:g}; their full scale is 1")
        self.num_in += len(new_S)
        if self._resampler is not None:
            self._history.append(new_S)
            self._num_later += len(new_S)
            if self._num_later > self.rate:
                self._forget(np.concatenate(self._history))
            given_S = self._resampler.resample_chunk(new_S, last)
            dropped = min(self._surplus, len(given_S))
            self._surplus -= dropped
            new_S = np.concatenate([self._early_S, given_S[dropped:]])
            self._early_S = self._early_S[:0]
        self.num_out += len(new_S)
        return np.multiply(new_S, np.float32(1 / HEADROOM), dtype=np.float32)

    def twin(self) -> SampleStream:
        """One that goes on for itself."""
        return SampleStream(self.rate, self.sample_rate, self.state)

    def _forget(self, history_S: np.ndarray) -> None:
        """Keeps the end of the history, from a sample on that meets one of the wanted rate."""
        unit = self.rate // math.gcd(self.rate, self.sample_rate)
        first = self.num_in - len(history_S)
        wanted = max(round(_HISTORY_S * self.rate), _HISTORY_SAMPLES)
        start = max(first, (self.num_in - wanted) // unit * unit)
        self._history, self._num_later = [history_S[start - first :].copy()], 0

    def _replay(self, state: SampleState) -> None:
        """Brings a new resampler to where the stream is."""
        start = state.num_in - len(state.history_S)
        num_given = state.num_out - start * self.sample_rate // self.rate
        again_S = self._resampler.resample_chunk(state.history_S)
        self._early_S, self._surplus = again_S[num_given:], max(num_given - len(again_S), 0)
