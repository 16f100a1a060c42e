"""Phrases to be preferred: a prefix tree with failure links over characters and ends of words."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping

from decoding.ctc_beam_search.hypothesis import Vocabulary

WORD_END = "\0"
"""The symbol between words, and before the first."""


class HotwordTree:
    """Aho and Corasick's automaton (1975) over a text's symbols.

    A text gains the boost of a phrase for each time that it contains it, as whole words. While a
    phrase is being spelled, the share of its symbols that are there is advanced; what another
    symbol breaks off, or the end of the text, loses its advance.

    Args:
        boosts: nats by phrase, in the spelling of the vocabulary.
        refund: nats that the end of a word costs because the n-gram does not know it; a word of a
            phrase gets them back, once for each time that it is said.

    Attributes:
        edges: of each state, the next state by symbol.
        failures: of each state, that of its longest proper suffix.
        gains: of each state, what the phrases that end in it are worth.
        advances: of each state, what its unfinished phrases are worth so far.
    """

    ROOT = 0

    def __init__(
        self, boosts: Mapping[str, float], refund: Callable[[str], float] = lambda word: 0.0
    ) -> None:
        self.edges: list[dict[str, int]] = [{}]
        self.failures = [self.ROOT]
        self.gains = [0.0]
        self.advances = [0.0]
        for phrase, boost in boosts.items():
            self._add(phrase.split(), boost)
        for word in dict.fromkeys(word for phrase in boosts for word in phrase.split()):
            # Not with the phrases: several may have the word.
            if cost := refund(word):
                self.gains[self._add([word], 0.0)] += cost
        self._link()
        self.start = self.step(self.ROOT, WORD_END)

    def step(self, state: int, symbol: str) -> int:
        """The state after one more symbol."""
        while state != self.ROOT and symbol not in self.edges[state]:
            state = self.failures[state]
        return self.edges[state].get(symbol, self.ROOT)

    def _add(self, words: list[str], boost: float) -> int:
        """The state in which a phrase ends."""
        num_symbols = sum(len(word) + 1 for word in words)
        state, done = self._child(self.ROOT, WORD_END), 0
        for word in words:
            for symbol in (*word, WORD_END):
                state, done = self._child(state, symbol), done + 1
                if done < num_symbols:
                    self.advances[state] = max(self.advances[state], boost * done / num_symbols)
        self.gains[state] += boost
        return state

    def _child(self, state: int, symbol: str) -> int:
        child = self.edges[state].setdefault(symbol, len(self.edges))
        if child == len(self.edges):
            self.edges.append({})
            self.failures.append(self.ROOT)
            self.gains.append(0.0)
            self.advances.append(0.0)
        return child

    def _link(self) -> None:
        """Failure links breadth first; a state inherits what its suffixes gain and advance."""
        queue = deque(self.edges[self.ROOT].values())
        while queue:
            state = queue.popleft()
            failure = self.failures[state]
            self.gains[state] += self.gains[failure]
            self.advances[state] = max(self.advances[state], self.advances[failure])
            for symbol, child in self.edges[state].items():
                self.failures[child] = self.step(failure, symbol)
                queue.append(child)


def spelled(boosts: Mapping[str, float], vocabulary: Vocabulary) -> dict[str, float]:
    """Phrases in the case of the vocabulary.

    Raises:
        ValueError: an empty phrase, a character that no token has, or a boost that is no number.
    """
    result: dict[str, float] = {}
    for phrase, boost in boosts.items():
        if not phrase.strip():
            raise ValueError("A hotword is empty.")
        if not math.isfinite(boost):
            raise ValueError(f"The boost of the hotword {phrase!r} is {boost}; it must be finite.")
        ways = [" ".join(way.split()) for way in (phrase, phrase.upper(), phrase.lower())]
        unknown = [set(way) - vocabulary.letters - {" "} for way in ways]
        if all(unknown):
            listed = ", ".join(map(repr, sorted(unknown[0])))
            raise ValueError(
                f"The hotword {phrase!r} has characters that the vocabulary lacks: {listed}. "
                "Spell it as the transcripts would."
            )
        result[ways[unknown.index(set())]] = boost
    return result
