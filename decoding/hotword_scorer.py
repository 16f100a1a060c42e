"""Hotwords in a beam search over an attention decoder."""

from __future__ import annotations

from typing import NamedTuple

import torch
from speechbrain.decoders.scorer import BaseScorerInterface
from torch import Tensor

from decoding.ctc_beam_search.hotwords import WORD_END, HotwordTree
from decoding.ctc_beam_search.hypothesis import Vocabulary


class _State(NamedTuple):
    """Where the automaton is, and whether a word begins there."""

    node: int
    begins_word: bool


class HotwordScorer(BaseScorerInterface):
    """What each next token adds to a hypothesis' hotwords, in nats; its key is ``hotword``.

    A phrase advances as it is spelled, gains all of its boost when it is complete, and loses its
    advance when another token breaks it off or the sentence ends: see ``HotwordTree``. A state is
    the automaton's, and what it makes of the tokens is computed once for each state. Meant as a
    full scorer.

    Args:
        tree: the phrases.
        vocabulary: how tokens spell words.
        num_tokens: size of the decoder's output layer, at least that of the vocabulary.
        eos_index: the token that ends a sentence.
    """

    def __init__(
        self, tree: HotwordTree, vocabulary: Vocabulary, num_tokens: int, eos_index: int
    ) -> None:
        self.tree = tree
        self.eos_index = eos_index
        spelled = [
            ((WORD_END,) if begins else ()) + tuple(text)
            for begins, text in zip(vocabulary.begins_word, vocabulary.spelling, strict=True)
        ]
        self._symbols = [*spelled, *[()] * (num_tokens - len(spelled))]
        # Neither specials nor places without a token spell anything.
        for special in range(eos_index + 1):
            self._symbols[special] = ()
        self._symbols[eos_index] = (WORD_END,)
        self._after: dict[_State, list[_State]] = {}
        self._gains: dict[_State, Tensor] = {}

    def score(
        self,
        inp_tokens: Tensor,
        memory: list[_State] | None,
        candidates: Tensor | None,
        attn: Tensor | None,
    ) -> tuple[Tensor, list[_State]]:
        """Gains (N, V) of the token after ``inp_tokens``, and the states behind these."""
        del candidates, attn
        if memory is None:
            states = [_State(self.tree.start, True)] * len(inp_tokens)
        else:
            states = [
                self._next_states(state)[token]
                for state, token in zip(memory, inp_tokens.tolist(), strict=True)
            ]
        gains_NV = torch.stack([self._gains_after(state) for state in states])
        return gains_NV.to(inp_tokens.device), states

    def permute_mem(self, memory: list[_State], index: Tensor) -> list[_State]:
        """The states of the hypotheses that the search goes on with."""
        return [memory[row] for row in index.tolist()]

    def reset_mem(self, x: Tensor, enc_lens: Tensor) -> None:
        """The states before the first token."""
        del x, enc_lens

    def _next_states(self, state: _State) -> list[_State]:
        self._gains_after(state)
        return self._after[state]

    def _gains_after(self, state: _State) -> Tensor:
        """What each token adds behind ``state``."""
        if state not in self._gains:
            ends, gains = [], []
            for symbols in self._symbols:
                end, gain = state, 0.0
                for symbol in symbols:
                    # Two separators in a row are one.
                    if symbol == WORD_END and end.begins_word:
                        continue
                    end = _State(self.tree.step(end.node, symbol), symbol == WORD_END)
                    gain += self.tree.gains[end.node]
                ends.append(end)
                advance = self.tree.advances[end.node] - self.tree.advances[state.node]
                gains.append(gain + advance)
            # No advance holds at the end of a sentence.
            gains[self.eos_index] -= self.tree.advances[ends[self.eos_index].node]
            self._after[state], self._gains[state] = ends, torch.tensor(gains)
        return self._gains[state]
