"""Language models for decoding, from a folder or the hub, checked against the recogniser."""

import logging
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import sentencepiece as spm
from speechbrain.utils.distributed import run_on_main
from speechbrain.utils.fetching import fetch
from torch import nn

from common.errors import UserError, in_words
from decoding.ctc_beam_search.ngram import first_words
from decoding.ctc_beam_search.ngram_kind import NEXT_TO_NONE
from decoding.lm_scorers import KenLMScorer, LMScorer
from modules.weights import load_model_weights
from text.tokenizer import EOS_ID, MOST_CHARACTERS, WORD_MARK, load_tokenizer, vocabulary

logger = logging.getLogger(__name__)

LM_FILE = "lm.ckpt"
TOKENIZER_FILE = "tokenizer.ckpt"


def fetch_pretrained(source: str, name: str, folder: str | Path) -> Path:
    """A file of a local folder, or of a hub repository, which is downloaded into ``folder``.

    Raises:
        UserError: the folder lacks the file, or the hub does not give it.
    """
    path = pretrained_file(source, name, folder)
    if path.is_file():
        return path
    if Path(source).is_dir():
        raise UserError(
            f"pretrained_lm_tokenizer_path {source} has no {name}; it needs {LM_FILE} and "
            f"{TOKENIZER_FILE}, as train_LM.py leaves them."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return Path(fetch(name, source, savedir=str(path.parent)))
    except Exception as error:
        raise UserError(
            f"pretrained_lm_tokenizer_path {source!r} is no folder here and its {name} could not "
            f"be downloaded ({type(error).__name__}: {error}). Give a local folder, or "
            "--no_lm True to go without a language model."
        ) from None


def pretrained_file(source: str, name: str, folder: str | Path) -> Path:
    """Where `fetch_pretrained` leaves a file: of each repository in a folder of its own."""
    if Path(source).is_dir():
        return Path(source) / name
    return Path(folder) / source.replace("/", "--") / name


class PretrainedLM:
    """The language model of a folder or of a hub repository, as a scorer that is made later.

    Args:
        language_model: builds the model; its weights are replaced.
        source: what ``fetch_pretrained`` takes; the folder holds ``lm.ckpt`` and
            ``tokenizer.ckpt``.
        temperature: the logits are divided by it.
        disabled: leave the language model out; then nothing is built or read.
    """

    key = "lm"

    def __init__(
        self,
        language_model: Callable[[], nn.Module],
        source: str | None,
        temperature: float = 1.0,
        disabled: bool = False,
    ):
        self.language_model = language_model
        self.source = source
        self.temperature = temperature
        self.disabled = disabled

    def make(
        self, tokenizer: spm.SentencePieceProcessor, num_tokens: int, folder: Path
    ) -> LMScorer | None:
        """The scorer; see ``decoding.scorers.DeferredScorer``.

        Raises:
            UserError: no source, weights of another architecture, or another vocabulary.
        """
        if self.disabled:
            return None
        if not self.source:
            raise UserError(
                "no_lm is False but pretrained_lm_tokenizer_path is empty. Give a folder with "
                f"{LM_FILE} and {TOKENIZER_FILE} (train_LM.py makes one), or --no_lm True."
            )
        for name in (TOKENIZER_FILE, LM_FILE):
            # One process downloads; the others find what it left.
            run_on_main(fetch_pretrained, args=[self.source, name, folder])
        check_same_tokenizer(pretrained_file(self.source, TOKENIZER_FILE, folder), tokenizer)
        model = self.language_model()
        load_model_weights(model, pretrained_file(self.source, LM_FILE, folder), "language model")
        model.eval().requires_grad_(False)
        return LMScorer(model, self.temperature)


class TokenNgram:
    """An n-gram of the recogniser's tokens, as a scorer that is made later.

    Args:
        path: ARPA file or kenlm binary; None leaves the n-gram out.
    """

    key = "kenlm"

    def __init__(self, path: str | Path | None):
        self.path = path

    def make(
        self, tokenizer: spm.SentencePieceProcessor, num_tokens: int, folder: Path
    ) -> KenLMScorer | None:
        """The scorer; see ``decoding.scorers.DeferredScorer``.

        Raises:
            UserError: kenlm is not installed, or the file is no n-gram, or one of other tokens.
        """
        path = self.path
        if not path:
            return None
        tokens = vocabulary(tokenizer)
        # The output layer may be wider than the tokenizer.
        spare = [f"<spare{i}>" for i in range(num_tokens - len(tokens))]
        try:
            scorer = KenLMScorer(str(path), num_tokens, [*tokens, *spare])
        except ImportError:
            raise UserError("--token_ngram_path needs kenlm: pip install -e '.[ngram]'") from None
        except OSError as error:
            raise UserError(f"token_ngram_path {path}: {in_words(error)}") from None
        _check_tokens(path, scorer.lm, tokens)
        return scorer


def _check_tokens(path: str | Path, ngram: Collection[str], tokens: Sequence[str]) -> None:
    """Says how many tokens an n-gram knows, and warns where it is less than half.

    Raises:
        UserError: it is of words, or of other tokens.
    """
    # unk, bos and eos are in every n-gram.
    pieces = tokens[EOS_ID + 1 :]
    known = {piece for piece in pieces if piece in ngram}
    begin_words = {piece for piece in pieces if piece.startswith(WORD_MARK)}
    try:
        words = first_words(path)
    except ValueError:
        # A binary of kenlm's does not list its words.
        words = []
    others = sorted(set(words).difference(tokens))
    message = f"token_ngram_path {path} knows {len(known)} of the {len(pieces)} tokens"
    knows_no_beginning = bool(begin_words) and not begin_words & known
    if (
        len(known) < NEXT_TO_NONE * len(pieces)
        or knows_no_beginning
        or 2 * len(others) > len(words)
    ):
        if others:
            message += f" ({others[0]!r} is none of them)"
        if knows_no_beginning:
            message += f", and none that begins words, such as {sorted(begin_words)[0]!r}"
        raise UserError(
            f"{message}: it is an n-gram of words or of other tokens. "
            "python -m tools.make_ngram --tokenizer makes one of these."
        )
    if 2 * len(known) < len(pieces):
        logger.warning("%s: it may make recognition worse. Is it of enough text?", message)
    else:
        logger.info("%s.", message)


def check_same_tokenizer(model_file: Path, tokenizer: spm.SentencePieceProcessor) -> None:
    """Refuse a language model over other tokens than the recogniser's.

    Raises:
        UserError: names the first tokens that differ; or it is no tokenizer.
    """
    theirs = vocabulary(load_tokenizer(model_file, MOST_CHARACTERS))
    ours = vocabulary(tokenizer)
    if theirs == ours:
        return
    differing = [
        f"{i}: {a!r} / {b!r}" for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b
    ]
    raise UserError(
        f"The language model's tokenizer {model_file} ({len(theirs)} tokens) is not the "
        f"recogniser's ({len(ours)} tokens); first differences (recogniser / language model): "
        f"{'; '.join(differing[:3]) or 'one is longer'}. Both must be trained with one tokenizer."
    )
