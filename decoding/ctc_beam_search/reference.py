"""The definition of the search, in Python: the compiled one is tested against it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from decoding.ctc_beam_search.hotwords import WORD_END, HotwordTree
from decoding.ctc_beam_search.hypothesis import CTCToken, Vocabulary
from decoding.ctc_beam_search.ngram import ReferenceNgram, State
from decoding.ctc_beam_search.settings import Found, Job, Settings, Wanted


@dataclass(frozen=True)
class Prefix:
    """A text with what n-gram and hotwords make of it; beams of the same text share one.

    Attributes:
        words: finished ones.
        partial: characters of the word after them.
        lm: weighted score of the finished words.
        lm_state: of the n-gram after them.
        hotword_state: of the hotwords' automaton after all characters.
        hotword_gain: of the phrases that are finished.
    """

    words: tuple[str, ...]
    partial: str
    lm: float
    lm_state: State
    hotword_state: int
    hotword_gain: float


class Emission(NamedTuple):
    """A frame of a token in an alignment; ``before`` is the one before it."""

    before: Emission | None
    token: int
    frame: int
    log_prob: float
    repeats: bool


class Beam(NamedTuple):
    """A text and the last token of its alignments.

    Attributes:
        score: log probability of these alignments together.
        best: that of the most probable one.
        emissions: of the most probable one.
    """

    prefix: Prefix
    last_token: int
    score: float
    best: float
    emissions: Emission | None

    @property
    def key(self) -> tuple:
        """What beams must share to be merged."""
        return self.prefix.words, self.prefix.partial, self.last_token


class Row(NamedTuple):
    """State of an utterance between two chunks."""

    beams: tuple[Beam, ...]
    frame: int


class ReferenceSearch:
    """CTC beam search over one utterance at a time.

    The beams are those of SpeechBrain's ``CTCBeamSearcher``: one for each text and last token.

    Args:
        settings: sizes and weights.
        vocabulary: the tokens.
        ngram: of words.
    """

    def __init__(
        self, settings: Settings, vocabulary: Vocabulary, ngram: ReferenceNgram | None
    ) -> None:
        self.settings, self.vocabulary, self.ngram = settings, vocabulary, ngram

    def run(self, jobs: Iterable[Job], wanted: Wanted) -> list[Row | list[Found]]:
        """Rows after their next frames, or their hypotheses."""
        return [_Utterance(self, job.hotwords).run(job, wanted) for job in jobs]


class _Utterance:
    def __init__(self, search: ReferenceSearch, hotwords: HotwordTree | None) -> None:
        self.settings, self.vocabulary = search.settings, search.vocabulary
        self.ngram, self.hotwords = search.ngram, hotwords

    def run(self, job: Job, wanted: Wanted) -> Row | list[Found]:
        beams, first = job.state or self._start()
        for frame, log_probs_V in enumerate(job.log_probs_TV, start=first):
            beams = self._step(beams, frame, log_probs_V)
        if wanted is Wanted.STATE:
            return Row(tuple(beams), first + len(job.log_probs_TV))
        return list(self._hypotheses(beams, ended=wanted is Wanted.FINAL))

    def _start(self) -> Row:
        state = self.ngram.start(self.settings.score_boundary) if self.ngram else ()
        hotword_state = self.hotwords.start if self.hotwords else HotwordTree.ROOT
        prefix = Prefix((), "", 0.0, state, hotword_state, 0.0)
        return Row((Beam(prefix, self.vocabulary.blank, 0.0, 0.0, None),), 0)

    def _step(self, beams: Iterable[Beam], frame: int, log_probs_V: np.ndarray) -> list[Beam]:
        least = self.settings.token_prune_min_logp
        likely_V = log_probs_V > np.float32(least)
        likely_V[log_probs_V.argmax()] = True
        if self.hotwords is not None:
            least = min(least, self.settings.hotword_token_min_logp)
        kept_V = likely_V | (log_probs_V > np.float32(least))
        extended = []
        for token in kept_V.nonzero()[0].tolist():
            for beam in beams:
                longer = self._extended(beam, token, frame, float(log_probs_V[token]))
                if likely_V[token] or self._spells_hotword(longer.prefix):
                    extended.append(longer)
        beams = self._pruned(_merged(extended), self._total)
        return self._distinct_of_late(beams) if self.settings.prune_history else beams

    def _extended(self, beam: Beam, token: int, frame: int, log_prob: float) -> Beam:
        score, best = beam.score + log_prob, beam.best + log_prob
        if token == self.vocabulary.blank:
            return Beam(beam.prefix, token, score, best, beam.emissions)
        repeats = token == beam.last_token
        prefix = beam.prefix if repeats else self._spelled(beam.prefix, token)
        emission = Emission(beam.emissions, token, frame, log_prob, repeats)
        return Beam(prefix, token, score, best, emission)

    def _spelled(self, prefix: Prefix, token: int) -> Prefix:
        """The text with another token."""
        if self.vocabulary.begins_word[token]:
            prefix = self._ended(prefix)
        state, gain = prefix.hotword_state, prefix.hotword_gain
        for character in self.vocabulary.spelling[token]:
            state, gain = self._heard(state, gain, character)
        return Prefix(
            prefix.words,
            prefix.partial + self.vocabulary.spelling[token],
            prefix.lm,
            prefix.lm_state,
            state,
            gain,
        )

    def _ended(self, prefix: Prefix) -> Prefix:
        """The text with its last word finished."""
        if not prefix.partial:
            return prefix
        lm, lm_state = prefix.lm, prefix.lm_state
        if self.ngram:
            log10_prob, lm_state = self.ngram.score(lm_state, prefix.partial)
            lm += self.settings.word_score(log10_prob, prefix.partial in self.ngram)
        state, gain = self._heard(prefix.hotword_state, prefix.hotword_gain, WORD_END)
        return Prefix((*prefix.words, prefix.partial), "", lm, lm_state, state, gain)

    def _heard(self, state: int, gain: float, symbol: str) -> tuple[int, float]:
        if self.hotwords is None:
            return state, gain
        state = self.hotwords.step(state, symbol)
        return state, gain + self.hotwords.gains[state]

    def _spells_hotword(self, prefix: Prefix) -> bool:
        """Whether a hotword goes on or is finished; that a word begins is not enough."""
        assert self.hotwords is not None
        return prefix.hotword_state not in (HotwordTree.ROOT, self.hotwords.start)

    def _total(self, beam: Beam) -> float:
        """Score with n-gram and hotwords, while a word may go on."""
        prefix = beam.prefix
        lm, hotwords = prefix.lm, prefix.hotword_gain
        if self.hotwords:
            hotwords += self.hotwords.advances[prefix.hotword_state]
        is_hotword = prefix.hotword_state != HotwordTree.ROOT
        if self.ngram and prefix.partial and not is_hotword:
            lm += self.settings.partial_score(
                len(prefix.partial), self.ngram.is_prefix(prefix.partial)
            )
        return beam.score + (lm + hotwords)

    def _final_total(self, beam: Beam) -> float:
        """Score with n-gram and hotwords at the end, where no advance holds."""
        return beam.score + (beam.prefix.lm + beam.prefix.hotword_gain)

    def _pruned(self, beams: list[Beam], total: Callable[[Beam], float]) -> list[Beam]:
        totals = [total(beam) for beam in beams]
        least = max(totals) + self.settings.beam_prune_logp
        order = sorted(range(len(beams)), key=lambda i: -totals[i])
        return [beams[i] for i in order if totals[i] >= least][: self.settings.beam_size]

    def _distinct_of_late(self, beams: list[Beam]) -> list[Beam]:
        """The best of the beams whose latest words, which are all that an n-gram sees, agree."""
        num_words = max(1, self.ngram.order - 1 if self.ngram else 0)
        best: dict[tuple, Beam] = {}
        for beam in beams:
            late = beam.prefix.words[-num_words:], beam.prefix.partial, beam.last_token
            best.setdefault(late, beam)
        return list(best.values())

    def _hypotheses(self, beams: Iterable[Beam], ended: bool) -> Iterator[Found]:
        total = self._final_total if ended else self._total
        texts = [
            beam._replace(
                prefix=self._ended(beam.prefix) if ended else beam.prefix,
                last_token=self.vocabulary.blank,
            )
            for beam in beams
        ]
        for beam in self._pruned(_merged(texts), total)[: self.settings.topk]:
            yield Found(_tokens(beam.emissions), beam.score, total(beam))


def _merged(beams: Iterable[Beam]) -> list[Beam]:
    """One beam for all of the same key, in the order of the first of them."""
    merged: dict[tuple, Beam] = {}
    for beam in beams:
        other = merged.setdefault(beam.key, beam)
        if other is not beam:
            better = beam if beam.best > other.best else other
            merged[beam.key] = better._replace(score=_log_add(other.score, beam.score))
    return list(merged.values())


def _log_add(a: float, b: float) -> float:
    return max(a, b) + math.log1p(math.exp(-abs(a - b)))


def _tokens(emission: Emission | None) -> list[CTCToken]:
    tokens: list[CTCToken] = []
    end, log_prob = None, -math.inf
    while emission is not None:
        end = emission.frame + 1 if end is None else end
        log_prob = max(log_prob, emission.log_prob)
        if not emission.repeats:
            tokens.append(CTCToken(emission.token, emission.frame, end, log_prob))
            end, log_prob = None, -math.inf
        emission = emission.before
    return tokens[::-1]
