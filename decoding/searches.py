"""Searches of a configuration, completed with what only a trained model knows: its tokenizer."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import sentencepiece as spm
import torch
from speechbrain.decoders.ctc import CTCBaseSearcher

from common.errors import UserError, in_words
from decoding.ctc_beam_search.ngram_kind import NEXT_TO_NONE, WANTED, refuse_tokens
from text.tokenizer import UNK_ID, WORD_MARK, vocabulary

logger = logging.getLogger(__name__)


def prepare_joint_search(
    search: Any, tokenizer: spm.SentencePieceProcessor, num_tokens: int, folder: str | Path
) -> None:
    """Makes the scorers of a beam search that wait for the tokenizer.

    Args:
        search: with a ``scorer``; one without deferred scorers (such as SpeechBrain's own builder)
            stays as it is.
        tokenizer: the recogniser's.
        num_tokens: size of its output layer.
        folder: where downloads go.

    Raises:
        UserError: a language model or an n-gram is missing or does not fit.
    """
    scorer: Any = getattr(search, "scorer", None)
    if hasattr(scorer, "prepare"):
        scorer.prepare(tokenizer, num_tokens, Path(folder))


class CTCSearch(Protocol):
    """What decodes CTC log probabilities."""

    def __call__(
        self, log_probs_BTV: np.ndarray, num_frames_B: np.ndarray
    ) -> Sequence[Sequence[Any]]:
        """Hypotheses of each utterance, the best first, each with its ``text``."""


class SpeechBrainCTCSearch:
    """A CTC searcher of SpeechBrain's, called like ours."""

    def __init__(self, searcher: CTCBaseSearcher):
        self.searcher = searcher

    def __call__(
        self, log_probs_BTV: np.ndarray, num_frames_B: np.ndarray
    ) -> Sequence[Sequence[Any]]:
        """Hypotheses of each utterance; arguments as in ``CTCSearch``."""
        size = len(self.searcher.vocab_list)
        log_probs = torch.from_numpy(log_probs_BTV[..., :size])
        # It truncates length * frames: half a frame more keeps rounding out of it.
        wav_lens = (torch.from_numpy(num_frames_B) + 0.5) / log_probs.shape[1]
        return self.searcher(log_probs, wav_lens)


def check_known_words(search: Any, words: Collection[str], ngram_name: str) -> None:
    """Says how many of the words a search's n-gram knows, and warns where it is less than half.

    Args:
        search: as ``make_ctc_search`` makes it; one without an n-gram is left alone.
        words: different words that are to be recognised.
        ngram_name: what the user knows the n-gram by.

    Raises:
        UserError: it knows next to none of them, because it is one of words in the other letter
            case, of tokens or of characters.
    """
    ngram: Any = getattr(search, "ngram", None)
    if isinstance(search, SpeechBrainCTCSearch) and search.searcher.lm is not None:
        ngram = search.searcher.lm._kenlm_model
        pieces = [*search.searcher.vocab_list, *(WORD_MARK + word for word in words)]
        try:
            refuse_tokens(ngram, pieces, ngram_name)
        except ValueError as error:
            raise UserError(f"{error}") from None
    if not words or not hasattr(ngram, "__contains__"):
        return
    known = sum(word in ngram for word in words)
    message = f"{ngram_name} knows {known} of the {len(words)} words of the test splits"
    longer = [word for word in words if len(word) > 1]
    if sum(word in ngram for word in longer) < NEXT_TO_NONE * len(longer):
        letters = set("".join(longer))
        if 2 * sum(letter in ngram for letter in letters) > len(letters):
            raise UserError(f"{message}, and most of their letters: it is of characters. {WANTED}")
        for case, spelled in (("lower", str.lower), ("upper", str.upper)):
            if 2 * sum(spelled(word) in ngram for word in longer) > len(longer):
                raise UserError(
                    f"{message}: it is written in {case} case. Make it from text in the case of "
                    "the transcripts."
                )
    if 2 * known >= len(words):
        logger.info("%s.", message)
    else:
        logger.warning(
            "%s: it may make recognition worse. Is it of this language and vocabulary?", message
        )


def make_ctc_search(
    searcher: Callable[..., Any],
    settings: Mapping[str, Any],
    tokenizer: spm.SentencePieceProcessor,
) -> CTCSearch:
    """A search over CTC log probabilities.

    Args:
        searcher: ``decoding.ctc_beam_search.CTCBeamSearch``, a CTC searcher of SpeechBrain's, or a
            class that is called like one of them.
        settings: its arguments, without the vocabulary.
        tokenizer: the recogniser's.

    Raises:
        UserError: the n-gram cannot be read, kenlm is wanted and not installed, or there is no such
            setting.
    """
    tokens = vocabulary(tokenizer)
    try:
        if isinstance(searcher, type) and issubclass(searcher, CTCBaseSearcher):
            settings = {"blank_index": UNK_ID, **settings}
            return SpeechBrainCTCSearch(searcher(**settings, vocab_list=tokens))
        return searcher(tokens, **settings)
    except ImportError:
        raise UserError("test_searcher needs kenlm: pip install -e '.[ngram]'") from None
    except OSError as error:
        raise UserError(f"kenlm_model_path: {in_words(error)}") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"test_beam_search: {error}") from None
