"""Scorers as one: SpeechBrain's builder, open to our own scorers and to items that finish early."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import sentencepiece as spm
from speechbrain.decoders.scorer import BaseScorerInterface
from speechbrain.decoders.scorer import ScorerBuilder as SpeechBrainScorerBuilder
from torch import Tensor

CHOSEN_BY_CANDIDATE = ("ctc", "kenlm")
"""Full scorers whose memory SpeechBrain reorders by beam and token, not by beam alone."""


class DeferredScorer(Protocol):
    """A scorer that can be made only once the tokenizer is known."""

    key: str

    def make(
        self, tokenizer: spm.SentencePieceProcessor, num_tokens: int, folder: Path
    ) -> BaseScorerInterface | None:
        """The scorer, or None where the configuration leaves it out.

        Args:
            tokenizer: the recogniser's.
            num_tokens: size of its output layer, at least that of the tokenizer.
            folder: where downloads go.
        """


class ScorerBuilder(SpeechBrainScorerBuilder):
    """SpeechBrain's builder, which refuses scorers that it does not define itself.

    Args:
        weights: weight of each scorer under its key: the class name in small letters without
            "Scorer" (``ctc``, ``lm``, ``kenlm``, ``coverage``, ``length``).
        full_scorers: scorers of the whole vocabulary; some may be deferred, see ``prepare``.
        partial_scorers: scorers of the best ``beam_size * scorer_beam_scale`` tokens of each
            hypothesis so far.

    Raises:
        ValueError: a scorer without a weight, or a weight without a scorer.
    """

    def __init__(
        self,
        weights: dict[str, float] | None = None,
        full_scorers: list[BaseScorerInterface | DeferredScorer] | None = None,
        partial_scorers: list[BaseScorerInterface | DeferredScorer] | None = None,
        scorer_beam_scale: float = 2,
    ) -> None:
        weights, full, partial = weights or {}, full_scorers or [], partial_scorers or []
        keys = [scorer_key(scorer) for scorer in [*full, *partial]]
        if sorted(keys) != sorted(weights):
            raise ValueError(
                f"The scorers are {sorted(keys)} and the weights {sorted(weights)}; every scorer "
                "needs one weight under its key."
            )
        self._deferred_full = [scorer for scorer in full if hasattr(scorer, "make")]
        self._deferred_partial = [scorer for scorer in partial if hasattr(scorer, "make")]
        deferred = {scorer.key for scorer in [*self._deferred_full, *self._deferred_partial]}
        super().__init__(
            {key: weight for key, weight in weights.items() if key not in deferred},
            [scorer for scorer in full if not hasattr(scorer, "make")],
            [scorer for scorer in partial if not hasattr(scorer, "make")],
            scorer_beam_scale,
        )
        self._given_weights = weights

    def prepare(self, tokenizer: spm.SentencePieceProcessor, num_tokens: int, folder: Path) -> None:
        """Makes the deferred scorers; arguments as in ``DeferredScorer.make``."""
        for deferred, scorers in (
            (self._deferred_full, self.full_scorers),
            (self._deferred_partial, self.partial_scorers),
        ):
            while deferred:
                scorer = deferred.pop(0).make(tokenizer, num_tokens, folder)
                if scorer is not None:
                    scorers[scorer_key(scorer)] = scorer
                    self.weights[scorer_key(scorer)] = self._given_weights[scorer_key(scorer)]

    def _validate_scorer(self, scorer_names: list[str]) -> None:
        super()._validate_scorer([*scorer_names, *self.full_scorers, *self.partial_scorers])


def scorer_key(scorer: BaseScorerInterface | DeferredScorer) -> str:
    """The name under which SpeechBrain files a scorer."""
    if hasattr(scorer, "make"):
        return scorer.key
    return type(scorer).__name__.lower().split("scorer")[0]


def all_scorers(builder: SpeechBrainScorerBuilder) -> dict[str, BaseScorerInterface]:
    """Full and partial scorers by their keys."""
    return {**builder.full_scorers, **builder.partial_scorers}


def can_select_items(builder: SpeechBrainScorerBuilder) -> bool:
    """Whether every scorer can go on with some items of the batch alone."""
    return all(
        hasattr(scorer, "select_items") or _reorders_by_beam(builder, key)
        for key, scorer in all_scorers(builder).items()
    )


def select_items(
    builder: SpeechBrainScorerBuilder, memory: dict[str, Any], items_I: Tensor, rows_N: Tensor
) -> dict[str, Any]:
    """The memory of some items of the batch.

    Args:
        builder: scorers for which :func:`can_select_items` holds.
        memory: of each scorer, as between two steps of the search.
        items_I: the items to go on with.
        rows_N: their hypotheses.
    """
    return {
        key: scorer.select_items(memory[key], items_I, rows_N)
        if hasattr(scorer, "select_items")
        else scorer.permute_mem(memory[key], rows_N)
        for key, scorer in all_scorers(builder).items()
    }


def _reorders_by_beam(builder: SpeechBrainScorerBuilder, key: str) -> bool:
    return key in builder.full_scorers and key not in CHOSEN_BY_CANDIDATE
