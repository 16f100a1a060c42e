"""What both searches are told, and what they answer."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from decoding.ctc_beam_search.hotwords import HotwordTree
from decoding.ctc_beam_search.hypothesis import CTCToken


@dataclass(frozen=True)
class Settings:
    """Sizes and weights of a search; meanings are those of `CTCBeamSearch`."""

    beam_size: int
    beam_prune_logp: float
    token_prune_min_logp: float
    hotword_token_min_logp: float
    prune_history: bool
    alpha: float
    beta: float
    unk_score_offset: float
    score_boundary: bool
    topk: int
    threads: int

    def word_score(self, log10_prob: float, is_known: bool) -> float:
        """Nats that a finished word adds."""
        if not is_known:
            log10_prob += self.unk_score_offset
        return self.alpha * log10_prob / math.log10(math.e) + self.beta

    def partial_score(self, num_characters: int, is_known: bool) -> float:
        """Nats that an unfinished word adds, by whether a known word begins so."""
        if is_known:
            return 0.0
        return self.unk_score_offset * max(num_characters, 6) / 6


class Job(NamedTuple):
    """Frames to be searched after ``state``; None starts an utterance."""

    state: Any
    log_probs_TV: np.ndarray
    hotwords: HotwordTree | None


class Wanted(enum.IntEnum):
    """What a search hands back: its state, or hypotheses of an utterance that may go on or ends."""

    STATE = 0
    PARTIAL = 1
    FINAL = 2


class Found(NamedTuple):
    """A hypothesis without its words."""

    tokens: list[CTCToken]
    score: float
    lm_score: float
