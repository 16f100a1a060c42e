"""The most probable alignment of streams, with the methods that a beam search has for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from decoding.ctc_beam_search.hypothesis import CTCHypothesis, Vocabulary
from decoding.ctc_beam_search.search import CTCSearchState, greedy_path


class CTCGreedySearch:
    """``ctc_greedy`` chunk by chunk; methods as in `CTCBeamSearch`, one hypothesis per stream.

    Args:
        vocabulary: tokens in the order of their ids, the blank among them.
        blank: id of the blank.
    """

    def __init__(self, vocabulary: Sequence[str], blank: int = 0) -> None:
        self.vocabulary = Vocabulary(vocabulary, blank)

    def start(self, batch_size: int, hotwords: None = None) -> CTCSearchState:
        """Streams before their first frame."""
        kind = type(self).__name__, self.vocabulary.pieces
        return CTCSearchState((None,) * batch_size, (None,) * batch_size, kind)

    def advance(
        self,
        state: CTCSearchState,
        log_probs_BTV: np.ndarray,
        num_frames_B: Sequence[int] | np.ndarray | None = None,
    ) -> CTCSearchState:
        """The streams after their next frames; a row of 0 frames stays as it is."""
        log_probs_BTV = log_probs_BTV[..., : len(self.vocabulary)]
        best_BT = log_probs_BTV.argmax(2)
        log_probs_BT = np.take_along_axis(log_probs_BTV, best_BT[..., None], 2)[..., 0]
        rows = []
        for i, row in enumerate(state.rows):
            stop = log_probs_BTV.shape[1] if num_frames_B is None else num_frames_B[i]
            new = best_BT[i, :stop], log_probs_BT[i, :stop]
            pairs = zip(row or _NOTHING, new, strict=True)
            rows.append(tuple(map(np.concatenate, pairs)))
        return replace(state, rows=tuple(rows))

    def partial(self, state: CTCSearchState) -> list[list[CTCHypothesis]]:
        """The text so far of each stream."""
        return [[self._hypothesis(*(row or _NOTHING))] for row in state.rows]

    def finish(self, state: CTCSearchState) -> list[list[CTCHypothesis]]:
        """The same: no later frame changes what is there."""
        return self.partial(state)

    def _hypothesis(self, ids_T: np.ndarray, log_probs_T: np.ndarray) -> CTCHypothesis:
        tokens = greedy_path(ids_T, log_probs_T, self.vocabulary.blank)
        score = float(log_probs_T.sum())
        return self.vocabulary.hypothesis(tokens, score, score)


_NOTHING = np.empty(0, np.int64), np.empty(0, np.float32)
