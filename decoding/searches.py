"""Searches of a configuration, completed with what only a trained model knows: its tokenizer."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import sentencepiece as spm

from common.errors import UserError
from text.tokenizer import vocabulary


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
    scorer = getattr(search, "scorer", None)
    if hasattr(scorer, "prepare"):
        scorer.prepare(tokenizer, num_tokens, Path(folder))


def make_ctc_search(
    searcher: Callable[..., Any],
    settings: Mapping[str, Any],
    tokenizer: spm.SentencePieceProcessor,
) -> Any:
    """A search over CTC log probabilities.

    Args:
        searcher: SpeechBrain's ``CTCBeamSearcher`` or a class that is called alike.
        settings: its arguments, without the vocabulary.
        tokenizer: the recogniser's.

    Raises:
        UserError: the n-gram cannot be read, kenlm is not installed, or there is no such setting.
    """
    try:
        return searcher(**settings, vocab_list=vocabulary(tokenizer))
    except ImportError:
        raise UserError("--kenlm_model_path needs kenlm: pip install -e '.[ngram]'") from None
    except OSError as error:
        raise UserError(f"kenlm_model_path {settings.get('kenlm_model_path')}: {error}") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"test_beam_search: {error}") from None
