"""Vocabularies, n-grams and outputs that several tests of the CTC search use."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.ctc_outputs import CHARACTERS, ctc_log_probs, lexicon, sentences, spelled
from decoding.ctc_beam_search import native
from tools.make_ngram import estimate, write_arpa

LEXICON = lexicon(60)
PIECES = [
    *CHARACTERS,
    *(f"▁{consonant}{vowel}" for consonant in "BDFGKL" for vowel in "AEIOU"),
    *(f"{consonant}{vowel}" for consonant in "BDFGMNRST" for vowel in "AEIOU"),
]
SPACED = ["<blank>", " ", *CHARACTERS[4:]]
VOCABULARIES = {"characters": CHARACTERS, "pieces": PIECES, "spaced": SPACED}

BACKENDS = [
    pytest.param(
        "native",
        marks=pytest.mark.skipif(
            native.unavailable() is not None, reason=f"not built: {native.unavailable()}"
        ),
    ),
    "reference",
]


def outputs(vocabulary: list[str], count: int, seed: int = 0, doubt: float = 0.4):
    """Sentences, and log probabilities of each as a trained model might give them."""
    said = sentences(LEXICON, count, seed)
    tokens = [spelled(s, [p.replace(" ", "▁") for p in vocabulary]) for s in said]
    return said, [ctc_log_probs(t, len(vocabulary), seed + i, doubt) for i, t in enumerate(tokens)]


def padded(log_probs: list[np.ndarray], value: float = np.nan) -> tuple[np.ndarray, list[int]]:
    """A batch, and how many frames of each utterance are its own."""
    num_frames = [len(x) for x in log_probs]
    batch = np.full((len(log_probs), max(num_frames), log_probs[0].shape[1]), value, np.float32)
    for row, x in zip(batch, log_probs, strict=True):
        row[: len(x)] = x
    return batch, num_frames


def write_ngram(path: Path, order: int = 3, num_words: int = 40) -> Path:
    """A word n-gram that does not know all of LEXICON."""
    known = set(LEXICON[:num_words])
    text = (
        [word for word in sentence.split() if word in known]
        for sentence in sentences(LEXICON, 200, seed=7)
    )
    with path.open("w") as stream:
        write_arpa(estimate(filter(None, text), order), stream)
    return path


def found(hypotheses) -> list[list[tuple]]:
    """Hypotheses as values that can be compared exactly."""
    return [[(h.text, h.tokens, h.score, h.lm_score) for h in row] for row in hypotheses]
