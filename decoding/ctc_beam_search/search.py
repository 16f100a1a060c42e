"""The search as the rest of the repository calls it: batches of arrays, and streams of chunks."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from decoding.ctc_beam_search import native
from decoding.ctc_beam_search.hotwords import HotwordTree, spelled
from decoding.ctc_beam_search.hypothesis import (
    CTCHypothesis,
    CTCToken,
    Vocabulary,
)
from decoding.ctc_beam_search.ngram import UNKNOWN_LOG10_PROB, Ngram, ReferenceNgram
from decoding.ctc_beam_search.ngram_kind import check_words
from decoding.ctc_beam_search.reference import ReferenceSearch
from decoding.ctc_beam_search.settings import Job, Settings, Wanted

logger = logging.getLogger(__name__)

Hotwords = HotwordTree | Mapping[str, float] | None
"""Phrases and their boosts, made ready or not; None means those of the search."""


@dataclass(frozen=True)
class CTCSearchState:
    """Streams between two chunks, one per row; rows share no clock. Never modified in place.

    A row grows with its text: by 2 kB for a second of speech with ``prune_history``; without it by
    that for each beam, since beams that differ at the beginning differ for good.
    """

    rows: tuple[Any, ...]
    hotwords: tuple[HotwordTree | None, ...]
    made_by: tuple

    def select(self, rows: Sequence[int]) -> CTCSearchState:
        """The state of some rows, in this order; a row may come more than once."""
        return replace(
            self,
            rows=tuple(self.rows[row] for row in rows),
            hotwords=tuple(self.hotwords[row] for row in rows),
        )

    @staticmethod
    def joined(states: Sequence[CTCSearchState]) -> CTCSearchState:
        """The rows of several states of one search, in a row."""
        return replace(
            states[0],
            rows=tuple(row for state in states for row in state.rows),
            hotwords=tuple(tree for state in states for tree in state.hotwords),
        )

    def reset(self, mask: Sequence[bool]) -> CTCSearchState:
        """Begins the rows anew for which ``mask`` holds; their hotwords stay."""
        rows = zip(self.rows, mask, strict=True)
        return replace(self, rows=tuple(None if anew else row for row, anew in rows))


class CTCBeamSearch:
    """CTC beam search with a word n-gram and hotwords; numpy in, texts out, without torch.

    Texts and scores are those of SpeechBrain's ``CTCBeamSearcher``, whose options these are: a beam
    is a text with the last token of its alignments; a frame adds its log probabilities, beams that
    meet add up their probabilities; the n-gram scores finished words, and not the end of a
    sentence.

    A YAML does not know the vocabulary: it gives the options with ``!name:``, and the script calls
    what that makes with the vocabulary.

    Args:
        vocabulary: tokens in the order of their ids, the blank among them; words begin with "▁" or
            are separated by a token " ".
        blank: id of the blank.
        beam_size: beams that survive a frame.
        beam_prune_logp: beams that are so much worse than the best do not, in nats (negative).
        token_prune_min_logp: tokens that are not more probable are left out of a frame; the most
            probable never is.
        prune_history: keep only the best of beams whose last words, as far as the n-gram sees,
            agree; leaves fewer hypotheses, and streams want it.
        ngram: of words, or its ARPA file (plain or .gz, not a binary of KenLM's).
        alpha: weight of the n-gram.
        beta: nats for each word, where there is an n-gram.
        unk_score_offset: log10 that a word unknown to the n-gram costs, before ``alpha``; nats that
            an unfinished word costs that no known word begins with.
        score_boundary: the first word begins a sentence.
        hotwords: nats by phrase, in a case that the vocabulary has; begin with 1 per character. A
            phrase gains them each time it occurs as whole words, and is advanced a share while it
            is spelled; what the n-gram takes for not knowing its words is given back.
        hotword_token_min_logp: tokens down to this are tried where they spell a hotword, which
            cannot win with tokens that are left out; all others stay as they are without hotwords.
        topk: hypotheses per utterance, at most.
        threads: utterances searched at a time.
        backend: ``native`` (C++, built at its first use), ``reference`` (Python, slow) or ``auto``,
            which takes the first that works.

    Raises:
        ValueError: an option out of range, a vocabulary without the blank, a hotword that it cannot
            spell, a file that is no n-gram of words in the vocabulary's letter case, or a backend
            that does not work here.
        OSError: the file cannot be read.
    """

    def __init__(
        self,
        vocabulary: Sequence[str],
        blank: int = 0,
        *,
        beam_size: int = 100,
        beam_prune_logp: float = -10.0,
        token_prune_min_logp: float = -5.0,
        prune_history: bool = True,
        ngram: Ngram | str | Path | None = None,
        alpha: float = 0.5,
        beta: float = 1.5,
        unk_score_offset: float = -10.0,
        score_boundary: bool = True,
        hotwords: Mapping[str, float] | None = None,
        hotword_token_min_logp: float = -5.0,
        topk: int = 1,
        threads: int = 1,
        backend: str = "auto",
    ) -> None:
        for name, value in {"beam_size": beam_size, "topk": topk, "threads": threads}.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        if not beam_prune_logp <= 0:
            raise ValueError(f"beam_prune_logp is {beam_prune_logp}; it must be 0 or negative.")
        self.vocabulary = Vocabulary(vocabulary, blank)
        self.settings = Settings(
            beam_size,
            beam_prune_logp,
            token_prune_min_logp,
            hotword_token_min_logp,
            prune_history,
            alpha,
            beta,
            unk_score_offset,
            score_boundary,
            topk,
            threads,
        )
        search_class, ngram_class = _BACKENDS[_working(backend)]
        self.ngram = ngram_class(ngram) if isinstance(ngram, str | Path) else ngram
        if self.ngram is not None and not isinstance(self.ngram, ngram_class):
            raise ValueError(f"The n-gram was read by another backend than {backend!r}.")
        if self.ngram is not None:
            check_words(self.ngram, self.vocabulary)
        self._backend = search_class(self.settings, self.vocabulary, self.ngram)
        # What a state's numbers mean.
        ngram_size = (self.ngram.order, self.ngram.num_words) if self.ngram is not None else None
        self._kind = search_class.__name__, self.vocabulary.pieces, ngram_size
        self.hotwords = self.compile(hotwords)

    def with_topk(self, topk: int) -> CTCBeamSearch:
        """This search with another number of hypotheses; it goes on from the same states."""
        twin = copy.copy(self)
        twin.settings = replace(self.settings, topk=topk)
        twin._backend = type(self._backend)(twin.settings, self.vocabulary, self.ngram)
        return twin

    def compile(self, hotwords: Mapping[str, float] | None) -> HotwordTree | None:
        """Phrases made ready for this search; worth keeping where they serve many calls.

        Raises:
            ValueError: an empty phrase, one that the vocabulary cannot spell, or an infinite boost.
        """
        if not hotwords:
            return None
        return HotwordTree(spelled(hotwords, self.vocabulary), self._cost_of_unknown)

    def _cost_of_unknown(self, word: str) -> float:
        if self.ngram is None or word in self.ngram:
            return 0.0
        (log10_prob,) = self.ngram.log10_probs([word], in_sentence=False)
        if log10_prob > UNKNOWN_LOG10_PROB:
            # The file has <unk>, and what it says of it counts.
            log10_prob = 0.0
        return self.settings.word_score(0.0, True) - self.settings.word_score(log10_prob, False)

    def __call__(
        self,
        log_probs_BTV: np.ndarray,
        num_frames_B: Sequence[int] | np.ndarray | None = None,
        hotwords: Hotwords | list[Hotwords] = None,
    ) -> list[list[CTCHypothesis]]:
        """The texts found for each utterance, best first.

        Args:
            log_probs_BTV: float32; outputs beyond the vocabulary are left out.
            num_frames_B: frames of each utterance, by default all; padding is not read.
            hotwords: of all utterances, or a list with those of each; None means the search's own.

        Raises:
            ValueError: shapes that do not fit, or a log probability that is not finite.
        """
        state = self.start(len(log_probs_BTV), hotwords)
        return self._hypotheses(self._jobs(state, log_probs_BTV, num_frames_B), Wanted.FINAL)

    def start(self, batch_size: int, hotwords: Hotwords | list[Hotwords] = None) -> CTCSearchState:
        """Streams before their first frame; ``hotwords`` as in a call."""
        of_rows = hotwords if isinstance(hotwords, list) else [hotwords] * batch_size
        if len(of_rows) != batch_size:
            raise ValueError(f"There are {len(of_rows)} hotwords for {batch_size} utterances.")
        trees = {id(phrases): self._tree(phrases) for phrases in of_rows}
        return CTCSearchState(
            (None,) * batch_size, tuple(trees[id(phrases)] for phrases in of_rows), self._kind
        )

    def advance(
        self,
        state: CTCSearchState,
        log_probs_BTV: np.ndarray,
        num_frames_B: Sequence[int] | np.ndarray | None = None,
    ) -> CTCSearchState:
        """The streams after their next frames; a row of 0 frames stays as it is."""
        jobs = self._jobs(state, log_probs_BTV, num_frames_B)
        return replace(state, rows=tuple(self._backend.run(jobs, Wanted.STATE)))

    def partial(self, state: CTCSearchState) -> list[list[CTCHypothesis]]:
        """The texts so far of each stream, whose last word may be unfinished."""
        return self._hypotheses(self._jobs(state), Wanted.PARTIAL)

    def finish(self, state: CTCSearchState) -> list[list[CTCHypothesis]]:
        """The texts of each stream if it ends here."""
        return self._hypotheses(self._jobs(state), Wanted.FINAL)

    def _tree(self, hotwords: Hotwords) -> HotwordTree | None:
        if hotwords is None:
            return self.hotwords
        return hotwords if isinstance(hotwords, HotwordTree) else self.compile(hotwords)

    def _hypotheses(self, jobs: list[Job], wanted: Wanted) -> list[list[CTCHypothesis]]:
        return [
            [self.vocabulary.hypothesis(*found) for found in row]
            for row in self._backend.run(jobs, wanted)
        ]

    def _jobs(
        self,
        state: CTCSearchState,
        log_probs_BTV: np.ndarray | None = None,
        num_frames_B: Sequence[int] | np.ndarray | None = None,
    ) -> list[Job]:
        if state.made_by != self._kind:
            raise ValueError("The state was made by a search with another vocabulary or n-gram.")
        batch_size, size = len(state.rows), len(self.vocabulary)
        if log_probs_BTV is None:
            log_probs_BTV = np.empty((batch_size, 0, size), np.float32)
        log_probs_BTV = np.asarray(log_probs_BTV, np.float32)
        if log_probs_BTV.ndim != 3 or len(log_probs_BTV) != batch_size:
            raise ValueError(
                f"Log probabilities have the shape {log_probs_BTV.shape}; it must be "
                f"({batch_size}, frames, tokens)."
            )
        if log_probs_BTV.shape[2] < size:
            raise ValueError(
                f"There are log probabilities of {log_probs_BTV.shape[2]} tokens, but the "
                f"vocabulary has {size}: it belongs to another model."
            )
        frames = log_probs_BTV.shape[1]
        num_frames_B = np.full(batch_size, frames) if num_frames_B is None else num_frames_B
        num_frames_B = np.asarray(num_frames_B)
        if num_frames_B.shape != (batch_size,) or num_frames_B.dtype.kind not in "iu":
            raise ValueError(
                f"num_frames_B must be {batch_size} integers, not {num_frames_B!r}; relative "
                "lengths are to be multiplied and rounded before."
            )
        if not np.all((num_frames_B >= 0) & (num_frames_B <= frames)):
            raise ValueError(f"num_frames_B is {num_frames_B} and there are {frames} frames.")
        rows = [
            np.ascontiguousarray(log_probs_TV[:num_frames, :size])
            for log_probs_TV, num_frames in zip(log_probs_BTV, num_frames_B, strict=True)
        ]
        for row, log_probs_TV in enumerate(rows):
            if not np.isfinite(log_probs_TV).all():
                frame, token = np.argwhere(~np.isfinite(log_probs_TV))[0]
                raise ValueError(
                    f"Utterance {row} has the log probability {log_probs_TV[frame, token]} in "
                    f"frame {frame} for token {token}; is the output of its model finite?"
                )
        return list(map(Job, state.rows, rows, state.hotwords))


def read_ngram(path: str | Path, backend: str = "auto") -> Ngram:
    """A word n-gram from its ARPA file, plain or .gz; for several searches of this backend.

    Raises:
        ValueError: not an ARPA file, or a damaged one.
        OSError: it cannot be read.
    """
    _, ngram_class = _BACKENDS[_working(backend)]
    return ngram_class(path)


_BACKENDS = {
    "native": (native.NativeSearch, native.NativeNgram),
    "reference": (ReferenceSearch, ReferenceNgram),
}


def _working(backend: str) -> str:
    """The backend that is meant, if it works here."""
    if backend == "reference":
        return backend
    if backend not in ("auto", "native"):
        raise ValueError(f"backend is {backend!r}; it must be auto, native or reference.")
    reason = native.unavailable()
    if reason is None:
        return "native"
    if backend == "native":
        raise ValueError(f"The native backend does not work here: {reason}")
    _tell(reason)
    return "reference"


@functools.cache
def _tell(reason: str) -> None:
    logger.warning("CTC beam search runs in Python, which takes long: %s", reason)


def ctc_greedy(log_probs_TV: np.ndarray, blank: int = 0) -> list[CTCToken]:
    """The tokens of the most probable alignment of one utterance, with their frames."""
    log_probs_TV = np.asarray(log_probs_TV)
    return greedy_path(log_probs_TV.argmax(1), log_probs_TV.max(1, initial=-np.inf), blank)


def greedy_path(ids_T: np.ndarray, log_probs_T: np.ndarray, blank: int = 0) -> list[CTCToken]:
    """The tokens of an alignment: the best token of each frame, and its log probability."""
    starts = np.flatnonzero(np.diff(ids_T, prepend=-1))
    ends = np.append(starts, len(ids_T))[1:]
    return [
        CTCToken(int(ids_T[start]), start, end, float(log_probs_T[start:end].max()))
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
        if ids_T[start] != blank
    ]
