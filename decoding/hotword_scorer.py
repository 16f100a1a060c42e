"""Hotwords in a beam search over an attention decoder."""

from __future__ import annotations

from itertools import groupby
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


class _Branch(NamedTuple):
    """Tokens whose spellings begin alike, as places in the order of all spellings.

    Attributes:
        first: the first of them.
        longer: the first that does not end with what they share.
        end: behind the last.
        next: branches of those that are longer, by their next symbol.
    """

    first: int
    longer: int
    end: int
    next: dict[str, _Branch]


class HotwordScorer(BaseScorerInterface):
    """What each next token adds to a hypothesis' hotwords, in nats; its key is ``hotword``.

    A phrase advances as it is spelled, gains all of its boost when it is complete, and loses its
    advance when another token breaks it off or the sentence ends: see ``HotwordTree``. Meant as a
    full scorer; one object serves many searches, also at once.

    Nearly all tokens add the same after every state, since they go on with no phrase. Only
    spellings that lead elsewhere than from outside of all phrases are followed.

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
        ordered = sorted(range(num_tokens), key=self._symbols.__getitem__)
        self._place_V = torch.tensor(ordered).argsort()
        self._spellings = _branch([self._symbols[token] for token in ordered], 0, 0, num_tokens)
        self._outside = (_State(tree.ROOT, False), _State(tree.start, True))
        self._gains_outside_V = [
            torch.tensor([self._gain(state, token) for token in ordered], dtype=torch.float64)
            for state in self._outside
        ]

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
            states = [self._outside[True]] * len(inp_tokens)
        else:
            states = [
                self._after(state, self._symbols[token])[0]
                for state, token in zip(memory, inp_tokens.tolist(), strict=True)
            ]
        gains = {state: self._gains_after(state) for state in set(states)}
        return torch.stack([gains[state] for state in states]).to(inp_tokens.device), states

    def permute_mem(self, memory: list[_State], index: Tensor) -> list[_State]:
        """The states of the hypotheses that the search goes on with."""
        return [memory[row] for row in index.tolist()]

    def reset_mem(self, x: Tensor, enc_lens: Tensor) -> None:
        """The states before the first token."""
        del x, enc_lens

    def _after(self, state: _State, symbols: tuple[str, ...]) -> tuple[_State, float]:
        """The state after some symbols, and what the phrases gain that end in them."""
        gain = 0.0
        for symbol in symbols:
            # Two separators in a row are one.
            if symbol == WORD_END and state.begins_word:
                continue
            state = _State(self.tree.step(state.node, symbol), symbol == WORD_END)
            gain += self.tree.gains[state.node]
        return state, gain

    def _gain(self, state: _State, token: int) -> float:
        """What a token gains and advances behind ``state``."""
        end, gain = self._after(state, self._symbols[token])
        return gain + self.tree.advances[end.node]

    def _gains_after(self, state: _State) -> Tensor:
        """What each token adds behind ``state``."""
        outside = self._outside[state.begins_word]
        gains_V = self._gains_outside_V[state.begins_word].clone()
        self._add_inside(gains_V, self._spellings, state, outside, 0.0)
        gains_V = gains_V[self._place_V] - self.tree.advances[state.node]
        # No advance holds at the end of a sentence.
        end, _ = self._after(state, self._symbols[self.eos_index])
        gains_V[self.eos_index] -= self.tree.advances[end.node]
        return gains_V.float()

    def _add_inside(
        self, gains_V: Tensor, branch: _Branch, state: _State, outside: _State, more: float
    ) -> None:
        """Adds to the gains of a branch's tokens what they have in ``state`` and not ``outside``.

        Args:
            gains_V: in the order of spellings.
            branch: the tokens.
            state: after the symbols that they share.
            outside: the same from outside of all phrases.
            more: what the phrases gained that ended in these symbols.
        """
        if state == outside:
            if more:
                gains_V[branch.first : branch.end] += more
            return
        advances = self.tree.advances
        gains_V[branch.first : branch.longer] += (
            more + advances[state.node] - advances[outside.node]
        )
        for symbol, longer in branch.next.items():
            inside, gain = self._after(state, (symbol,))
            elsewhere, gain_outside = self._after(outside, (symbol,))
            self._add_inside(gains_V, longer, inside, elsewhere, more + gain - gain_outside)


def _branch(spellings: list[tuple[str, ...]], num_shared: int, first: int, end: int) -> _Branch:
    """Places ``first`` to ``end`` of sorted spellings, which share their first symbols."""
    longer = first
    while longer < end and len(spellings[longer]) == num_shared:
        longer += 1
    following, at = {}, longer
    for symbol, alike in groupby(spellings[longer:end], key=lambda symbols: symbols[num_shared]):
        count = sum(1 for _ in alike)
        following[symbol] = _branch(spellings, num_shared + 1, at, at + count)
        at += count
    return _Branch(first, longer, end, following)
