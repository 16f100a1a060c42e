"""Log probabilities as trained CTC models give them, of sentences that nobody has said."""

from __future__ import annotations

import string
from collections.abc import Sequence

import numpy as np

CHARACTERS = ["<unk>", "<s>", "</s>", "▁", *string.ascii_uppercase, "'"]
"""Sentencepiece's characters; the blank is the first."""


def lexicon(num_words: int) -> list[str]:
    """Words of one to four syllables that can be told apart by a letter."""
    rng = np.random.default_rng(0)
    words: dict[str, None] = {}
    while len(words) < num_words:
        syllables = (
            rng.choice(list("BDFGKLMNPRST")) + rng.choice(list("AEIOU"))
            for _ in range(rng.integers(1, 5))
        )
        words["".join(syllables)] = None
    return list(words)


def sentences(words: Sequence[str], count: int, seed: int = 0) -> list[str]:
    """Sentences in which some words are far more frequent than others."""
    rng = np.random.default_rng(seed)
    ranks = np.minimum(rng.zipf(1.5, (count, 12)), len(words)) - 1
    lengths = rng.integers(2, 12, count)
    return [" ".join(words[i] for i in row[:n]) for row, n in zip(ranks, lengths, strict=True)]


def ctc_log_probs(
    tokens: Sequence[int], num_tokens: int, seed: int = 0, doubt: float = 0.3
) -> np.ndarray:
    """Frames of an utterance: blanks, and peaks of one or two frames for its tokens.

    Args:
        tokens: what is said.
        num_tokens: outputs of the model; the blank is 0.
        doubt: share of the peaks in which another token, always the same one for a token, or the
            blank is about as probable.

    Returns:
        Log probabilities (frames, ``num_tokens``), float32; some two frames for a token.
    """
    rng = np.random.default_rng(seed)
    frames = []
    for token, following in zip(tokens, [*tokens[1:], None], strict=True):
        frames += [{0: 12.0}] * rng.integers(0, 2)
        rival = rng.choice([0, 1 + (token + num_tokens // 2) % (num_tokens - 1)])
        certainty = rng.uniform(-1.5, 2.5) if rng.random() < doubt else 8.0
        peak = {0: 4.0, rival: 12.0 - certainty, token: 12.0}
        frames += [peak] * (1 + (rng.random() < 0.2))
        if token == following or rng.random() < 0.2:
            frames.append({0: 12.0, token: 12.0 - rng.uniform(0, 6)})
    logits = rng.normal(0, 1.5, (len(frames), num_tokens))
    for frame, peak in zip(logits, frames, strict=True):
        for token, logit in peak.items():
            frame[token] += logit
    peaks = logits.max(1, keepdims=True)
    log_sums = peaks + np.log(np.exp(logits - peaks).sum(1, keepdims=True))
    return (logits - log_sums).astype(np.float32)


def spelled(sentence: str, vocabulary: Sequence[str]) -> list[int]:
    """A sentence in the longest pieces of a vocabulary with "▁"."""
    rest, tokens = "▁" + sentence.replace(" ", "▁"), []
    while rest:
        piece = max((p for p in vocabulary if rest.startswith(p)), key=len)
        tokens.append(vocabulary.index(piece))
        rest = rest[len(piece) :]
    return tokens
