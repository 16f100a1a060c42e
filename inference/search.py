"""Texts for encoder output: the model's own search, or another one of its CTC branch."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError, in_words
from decoding.ctc_alignment import align_tokens
from decoding.ctc_beam_search import (
    CTCBeamSearch,
    CTCGreedySearch,
    CTCToken,
    HotwordTree,
    ctc_greedy,
    greedy_path,
    read_ngram,
)
from decoding.ctc_beam_search.hotwords import spelled
from decoding.ctc_beam_search.hypothesis import Vocabulary
from decoding.ctc_beam_search.ngram import Ngram
from decoding.hotword_scorer import HotwordScorer
from inference.config import CTC_SETTINGS
from inference.kept import Kept
from inference.model import Model, build_joint_search
from inference.words import Placed
from modules.lengths import relative_lengths
from text.tokenizer import EOS_ID, WORD_MARK, vocabulary

_KEPT = 8


@dataclass(frozen=True)
class SearchOptions:
    """How texts are searched for; None means as the model's recipe has it.

    Attributes:
        search: ``beam``: that of the recipe; or ``greedy``: the likeliest path of the CTC branch.
        beam_size: hypotheses that are kept.
        hotwords: phrases that are preferred, with their boosts in nats (of a beam search).
        ngram: ARPA file of words, plain or .gz (CTC models), or what was read of it.
        alpha: weight of the n-gram.
        beta: nats for each word, where there is an n-gram.
        alternatives: further texts that are wanted.

    Raises:
        UserError: a value that cannot be.
    """

    search: str = "beam"
    beam_size: int | None = None
    hotwords: Mapping[str, float] | None = None
    ngram: str | Path | Ngram | None = None
    alpha: float | None = None
    beta: float | None = None
    alternatives: int = 0

    def __post_init__(self) -> None:
        if self.search not in ("beam", "greedy"):
            raise UserError(f"search is {self.search!r}; it must be beam or greedy.")
        if self.beam_size is not None and self.beam_size < 1:
            raise UserError(f"beam_size is {self.beam_size}; it must be at least 1.")
        of_beam = ("beam_size", "hotwords", "ngram", "alpha", "beta")
        given = [name for name in of_beam if getattr(self, name) not in (None, {})]
        if self.search == "greedy" and given:
            raise UserError(f"{given[0]} belongs to search beam: the greedy one weighs nothing.")
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise UserError(f"{name} is {value}; it must be finite.")
        if self.alternatives < 0:
            raise UserError(f"alternatives is {self.alternatives}; it cannot be negative.")
        if self.alternatives and self.search == "greedy":
            raise UserError("alternatives need search beam: the greedy one finds one text.")

    def describe(self) -> str:
        """The same for options that find the same."""
        ngram = self.ngram.path if isinstance(self.ngram, Ngram) else self.ngram
        return repr(
            replace(
                self,
                ngram=None if ngram is None else os.fspath(ngram),
                hotwords={k: float(v) for k, v in sorted((self.hotwords or {}).items())} or None,
                alpha=None if self.alpha is None else float(self.alpha),
                beta=None if self.beta is None else float(self.beta),
            )
        )


class Found(NamedTuple):
    """What a search found for one recording.

    Attributes:
        hypotheses: tokens of each text, the likeliest first; never empty.
        placed: those of the first with their frames.
    """

    hypotheses: list[list[int]]
    placed: list[Placed]


class TextSearch:
    """Searches for texts with a model; one object serves many threads.

    Args:
        model: whose branches and search they are.
    """

    def __init__(self, model: Model):
        self.model = model
        self.vocabulary = vocabulary(model.tokenizer)
        self.blank = model.config["tokens"]["blank"]
        self._ngrams: Kept[Ngram] = Kept(_KEPT)
        self._ctc_searches: Kept[CTCBeamSearch] = Kept(_KEPT)
        self._hotwords: Kept[HotwordTree | None] = Kept(_KEPT)
        self._hotword_scorers: Kept[HotwordScorer] = Kept(_KEPT)

    def pinned(self, options: SearchOptions) -> SearchOptions:
        """The options with what the file of their n-gram holds now, whatever becomes of the file.

        What is kept of earlier contents of the file is dropped.

        Raises:
            UserError: it cannot be read.
        """
        if options.ngram is None or isinstance(options.ngram, Ngram):
            return options
        path = os.fspath(options.ngram)
        version = path, _version(path)
        try:
            ngram = self._ngrams.get(version, lambda: read_ngram(path))
        except (ValueError, OSError) as error:
            raise UserError(in_words(error)) from None
        self._ngrams.drop(lambda key: key[0] == path and key != version)
        for kept in (self._ctc_searches, self._hotwords):
            kept.drop(lambda key: key[0] not in (None, ngram) and key[0].path == ngram.path)
        return replace(options, ngram=ngram)

    @torch.inference_mode()
    def __call__(
        self,
        encoder_out_BTD: Tensor,
        log_probs_BTV: Tensor,
        num_frames_B: Tensor,
        options: SearchOptions,
    ) -> list[Found]:
        """Texts of each item.

        Args:
            encoder_out_BTD: float32.
            log_probs_BTV: of the CTC branch, float32.
            num_frames_B: integer frames of each item.
            options: of the search.

        Raises:
            UserError: an option that this model's search does not have.
        """
        if options.search == "greedy":
            return self._greedy(log_probs_BTV, num_frames_B)
        if self.model.kind == "s2s":
            return self._joint(encoder_out_BTD, log_probs_BTV, num_frames_B, options)
        search, hotwords = self._ctc_search(options)
        # An output layer may have more places than there are tokens.
        log_probs = log_probs_BTV[..., : len(self.vocabulary)].cpu().numpy()
        found = search(log_probs, num_frames_B.cpu().numpy(), hotwords)
        return [self._found([hypothesis.tokens for hypothesis in item]) for item in found]

    def in_pieces(self, log_probs: Iterable[Tensor], options: SearchOptions) -> Found:
        """The text of one recording that comes piece by piece: that of the CTC branch.

        Args:
            log_probs: log probabilities (T, V) of the CTC branch for each piece, float32.
            options: of the search.
        """
        arrays = (piece_TV[:, : len(self.vocabulary)].cpu().numpy() for piece_TV in log_probs)
        if options.search == "greedy":
            best = [(piece_TV.argmax(1), piece_TV.max(1)) for piece_TV in arrays]
            ids_T, log_probs_T = (np.concatenate(parts) for parts in zip(*best, strict=True))
            return self._found([greedy_path(ids_T, log_probs_T, self.blank)])
        # Beams that differ early would never meet: without this a state grows with each of them.
        search, hotwords = self._ctc_search(options, prune_history=True)
        state = search.start(1, hotwords)
        for piece_TV in arrays:
            state = search.advance(state, piece_TV[None])
        return self._found([hypothesis.tokens for hypothesis in search.finish(state)[0]])

    def of_streams(
        self, options: SearchOptions
    ) -> tuple[CTCBeamSearch | CTCGreedySearch, HotwordTree | None]:
        """The search of streams, which goes on with the CTC branch's frames; and its hotwords.

        Raises:
            UserError: an option that streams do not have.
        """
        if options.alternatives:
            raise UserError("alternatives: a stream, or a recording in chunks, has one text.")
        if options.search == "greedy":
            return CTCGreedySearch(self.vocabulary, self.blank), None
        # Beams that differ early would never meet: without this a state grows with each of them.
        return self._ctc_search(options, prune_history=True)

    def found(self, tokens: Sequence[CTCToken]) -> tuple[str, list[Placed]]:
        """What tokens of the CTC branch spell, and those that spell it with their frames."""
        ((ids,), placed) = self._found([tokens])
        return self.text(ids), placed

    def text(self, tokens: Sequence[int]) -> str:
        """What tokens spell."""
        return self.model.tokenizer.decode(list(tokens))

    def _greedy(self, log_probs_BTV: Tensor, num_frames_B: Tensor) -> list[Found]:
        log_probs = log_probs_BTV[..., : len(self.vocabulary)].cpu().numpy()
        return [
            self._found([ctc_greedy(item_TV[:count], self.blank)])
            for item_TV, count in zip(log_probs, num_frames_B.tolist(), strict=True)
        ]

    def _found(self, hypotheses: Sequence[Sequence[CTCToken]]) -> Found:
        """What a search of the CTC branch found."""
        spelling = [self._spelling([token.id for token in tokens]) for tokens in hypotheses]
        texts = [
            [tokens[i].id for i in kept] for tokens, kept in zip(hypotheses, spelling, strict=True)
        ]
        best = [hypotheses[0][i] for i in spelling[0]]
        placed = [
            Placed(self.vocabulary[id_], start_frame, end_frame, log_prob)
            for id_, start_frame, end_frame, log_prob in best
        ]
        return Found(texts, placed)

    def _ctc_search(
        self, options: SearchOptions, **overrides: Any
    ) -> tuple[CTCBeamSearch, HotwordTree | None]:
        """The search of these options, and its hotwords.

        Some searches and n-grams are kept, since these take a while to read.
        """
        options = self.pinned(options)
        settings = {k: v for k, v in self.model.config["search"].items() if k in CTC_SETTINGS}
        chosen = {
            "beam_size": options.beam_size,
            "alpha": options.alpha,
            "beta": options.beta,
        }
        settings |= {key: value for key, value in chosen.items() if value is not None}
        for name in ("alpha", "beta"):
            if chosen[name] is not None and options.ngram is None:
                raise UserError(f"{name} belongs to an n-gram, and there is none.")
        settings |= {"topk": 1 + options.alternatives, **overrides}
        key = options.ngram, tuple(sorted(settings.items()))
        try:
            search = self._ctc_searches.get(
                key,
                lambda: CTCBeamSearch(self.vocabulary, self.blank, ngram=options.ngram, **settings),
            )
            phrases = tuple((options.hotwords or {}).items())
            hotwords = self._hotwords.get((*key, phrases), lambda: search.compile(options.hotwords))
        except (ValueError, OSError) as error:
            raise UserError(in_words(error)) from None
        return search, hotwords

    def _joint(
        self,
        encoder_out_BTD: Tensor,
        log_probs_BTV: Tensor,
        num_frames_B: Tensor,
        options: SearchOptions,
    ) -> list[Found]:
        of_ngram = {"ngram": options.ngram, "alpha": options.alpha, "beta": options.beta}
        refused = [name for name, value in of_ngram.items() if value is not None]
        if refused:
            raise UserError(
                f"{', '.join(refused)}: the joint search of CTC and attention has no n-gram of "
                "words; a CTC model's search has."
            )
        settings = self.model.config["search"]
        beam_size = options.beam_size or settings["beam_size"]
        # Built anew, since SpeechBrain's keeps its batch in itself.
        search = build_joint_search(
            self.model,
            beam_size=beam_size,
            return_topk=True,
            topk=min(1 + options.alternatives, beam_size),
            scorer=self._with_hotwords(settings.get("scorer"), options.hotwords),
        )
        wav_lens = relative_lengths(num_frames_B, encoder_out_BTD.shape[1])
        tokens_BKU, lengths_BK, _, _ = search(encoder_out_BTD, wav_lens)
        num_tokens_BK = (lengths_BK * tokens_BKU.shape[2]).round().long().tolist()
        found = []
        for item, (tokens_KU, counts, frames) in enumerate(
            zip(tokens_BKU.tolist(), num_tokens_BK, num_frames_B.tolist(), strict=True)
        ):
            hypotheses = []
            for tokens_U, count in zip(tokens_KU, counts, strict=True):
                tokens = [t for t in tokens_U[:count] if EOS_ID < t < len(self.vocabulary)]
                hypotheses.append([tokens[i] for i in self._spelling(tokens)])
            placed = self._placed(hypotheses[0], log_probs_BTV[item, :frames])
            found.append(Found(hypotheses, placed))
        return found

    def _with_hotwords(
        self, scorer: Mapping[str, Any] | None, hotwords: Mapping[str, float] | None
    ) -> Mapping[str, Any] | None:
        """A description of scorers, with one of hotwords, if there are any."""
        if not hotwords:
            return scorer

        def make() -> HotwordScorer:
            vocabulary = Vocabulary(self.vocabulary, self.blank)
            tree = HotwordTree(spelled(hotwords, vocabulary))
            return HotwordScorer(tree, vocabulary, self.model.config["tokens"]["outputs"], EOS_ID)

        try:
            of_hotwords = self._hotword_scorers.get(tuple(hotwords.items()), make)
        except ValueError as error:
            raise UserError(str(error)) from None
        scorer = scorer or {"class": "ScorerBuilder"}
        return {
            **scorer,
            "full_scorers": [*scorer.get("full_scorers", []), of_hotwords],
            "weights": {**scorer.get("weights", {}), "hotword": 1.0},
        }

    def _placed(self, tokens: list[int], log_probs_TV: Tensor) -> list[Placed]:
        """Where the CTC branch has the tokens of a text that another search found."""
        aligned = align_tokens(log_probs_TV.cpu(), tokens, self.blank)
        pieces = [self.vocabulary[token] for token in tokens]
        if aligned is None:
            return [Placed(piece, None, None, -math.inf) for piece in pieces]
        return [
            Placed(piece, span.start_frame, span.end_frame, span.log_prob)
            for piece, span in zip(pieces, aligned[0], strict=True)
        ]

    def _spelling(self, tokens: Sequence[int]) -> list[int]:
        """Indices of the tokens without those that would put one space beside another."""
        kept: list[int] = []
        for i in reversed(range(len(tokens))):
            is_space = not self.vocabulary[tokens[i]].strip(WORD_MARK)
            if is_space and (not kept or self.vocabulary[tokens[kept[-1]]].startswith(WORD_MARK)):
                continue
            kept.append(i)
        return kept[::-1]


def _version(path: str) -> tuple[int, int] | None:
    """What changes with a file's content."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def options_of(given: Mapping[str, Any]) -> SearchOptions:
    """Options by their names.

    Raises:
        UserError: there is no such option, or it cannot have this value.
    """
    try:
        return SearchOptions(**given)
    except TypeError as error:
        raise UserError(f"transcribe: {error}") from None
