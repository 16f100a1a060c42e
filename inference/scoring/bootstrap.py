"""How much an error rate would vary with other utterances of the same kind.

Bisani and Ney, "Bootstrap estimates for confidence intervals in ASR performance evaluation",
ICASSP 2004.
"""

from dataclasses import dataclass

import numpy as np

# Bounds the memory of one batch of resamples (8 bytes an entry, a few arrays at a time).
_ENTRIES_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Interval:
    """A value and its central 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def resample_counts(counts: np.ndarray, samples: int, generator: np.random.Generator) -> np.ndarray:
    """Sums of ``counts`` over resampled utterances.

    Args:
        counts: (utterances, kinds) numbers that belong to an utterance.
        samples: how often as many utterances as there are are drawn with replacement.

    Returns:
        (samples, kinds) sums.
    """
    utterances = len(counts)
    batch = max(1, _ENTRIES_AT_ONCE // utterances)
    sums = []
    for start in range(0, samples, batch):
        size = min(batch, samples - start)
        drawn = generator.integers(utterances, size=(size, utterances))
        sums.append(np.stack([column[drawn].sum(axis=1) for column in counts.T], axis=1))
    return np.concatenate(sums)


def resampled_rates(
    errors: np.ndarray, tokens: np.ndarray, samples: int = 1000, seed: int = 0
) -> np.ndarray:
    """Error rate in percent of every bootstrap sample.

    A generator of the same seed draws the same utterances for every recogniser, so that the rates
    of two of them are paired sample by sample if both have their utterances in the same order.

    Args:
        errors: (utterances,) numbers of wrong words, or characters.
        tokens: (utterances,) numbers of reference words, or characters.
        samples: number of bootstrap samples.
        seed: of the resampling.
    """
    counts = np.stack([errors, tokens], axis=1)
    wrong, spoken = resample_counts(counts, samples, np.random.default_rng(seed)).T
    return 100.0 * wrong / np.maximum(spoken, 1)


def central_interval(value: float, resampled: np.ndarray) -> Interval:
    """The value with the interval that holds 95 % of what came of resampling."""
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Interval(value, float(low), float(high))
