"""Scorers as one: SpeechBrain's builder, open to our own scorers and to items that finish early."""

from __future__ import annotations

from typing import Any

from speechbrain.decoders.scorer import BaseScorerInterface
from speechbrain.decoders.scorer import ScorerBuilder as SpeechBrainScorerBuilder
from torch import Tensor

CHOSEN_BY_CANDIDATE = ("ctc", "kenlm")
"""Full scorers whose memory SpeechBrain reorders by beam and token, not by beam alone."""


class ScorerBuilder(SpeechBrainScorerBuilder):
    """SpeechBrain's builder, which refuses scorers that it does not define itself.

    Args:
        weights: weight of each scorer under its key: the class name in small letters without
            "Scorer" (``ctc``, ``transformerlm``, ``mambalm``, ``kenlm``, ``coverage``, ``length``).
        full_scorers: scorers of the whole vocabulary.
        partial_scorers: scorers of the best ``beam_size * scorer_beam_scale`` tokens of each
            hypothesis so far.

    Raises:
        ValueError: a scorer without a weight, or a weight without a scorer.
    """

    def __init__(
        self,
        weights: dict[str, float] | None = None,
        full_scorers: list[BaseScorerInterface] | None = None,
        partial_scorers: list[BaseScorerInterface] | None = None,
        scorer_beam_scale: float = 2,
    ) -> None:
        weights, full, partial = weights or {}, full_scorers or [], partial_scorers or []
        keys = [scorer_key(scorer) for scorer in [*full, *partial]]
        if sorted(keys) != sorted(weights):
            raise ValueError(
                f"The scorers are {sorted(keys)} and the weights {sorted(weights)}; every scorer "
                "needs one weight under its key."
            )
        super().__init__(weights, full, partial, scorer_beam_scale)

    def _validate_scorer(self, scorer_names: list[str]) -> None:
        super()._validate_scorer([*scorer_names, *self.full_scorers, *self.partial_scorers])


def scorer_key(scorer: BaseScorerInterface) -> str:
    """The name under which SpeechBrain files a scorer."""
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
