"""Sentencepiece tokens: trained from transcripts, checked against a model."""

import io
import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import sentencepiece as spm

from common.errors import UserError
from common.files import atomic_write, why_unreadable

logger = logging.getLogger(__name__)

UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
WORD_MARK = "▁"
"""Sentencepiece's sign for the space before a word."""

TOKENIZER_SETTINGS = ("token_type", "output_neurons", "character_coverage")
MOST_CHARACTERS = 100_000
"""More outputs than any tokenizer has tokens."""
TOKEN_TYPES = ("char", "unigram", "bpe")
UNKNOWN_CHARACTERS = ("drop", "skip", "error")


def train_tokenizer(
    sentences: Iterable[str],
    model_file: str | Path,
    *,
    token_type: str,
    output_neurons: int,
    character_coverage: float = 1.0,
) -> None:
    """Train a sentencepiece model with ids unk = 0, bos = 1, eos = 2 and write it atomically.

    Args:
        sentences: training transcripts.
        model_file: where the model goes.
        token_type: ``char``, ``unigram`` or ``bpe``.
        output_neurons: number of tokens; a ``char`` model may have fewer.

    Raises:
        UserError: an unknown type, no text, or a vocabulary that the text does not support.
    """
    if token_type not in TOKEN_TYPES:
        raise UserError(
            f"token_type is {token_type!r}; it must be one of {', '.join(TOKEN_TYPES)}."
        )
    sentences = [s for s in sentences if s.strip()]
    if not sentences:
        raise UserError("No transcript has any text: a tokenizer cannot be trained.")
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type=token_type,
            # A char model takes every character; the check below says whether they fit.
            vocab_size=output_neurons if token_type != "char" else MOST_CHARACTERS,
            hard_vocab_limit=token_type != "char",
            character_coverage=character_coverage,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=-1,
            max_sentencepiece_length=10,
            # Transcripts come normalised; NFKC would change what is scored.
            normalization_rule_name="identity",
            # Longer lines would be left out without a word, and their characters be unknown.
            max_sentence_length=max(4192, *(len(s.encode()) + 1 for s in sentences)),
            minloglevel=2,
        )
    except RuntimeError as error:
        # Without the place in sentencepiece's source that it names first.
        reason = str(error).strip().splitlines()[-1].rpartition("] ")[2]
        raise UserError(
            f"A {token_type} tokenizer of output_neurons={output_neurons} tokens cannot be trained "
            f"on {len(sentences)} transcripts: {reason} "
            "Set --output_neurons to what the text supports."
        ) from None
    size = spm.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size()
    if size > output_neurons:
        raise UserError(
            f"The transcripts have {size - 3} different characters, which with unk, bos and eos "
            f"needs --output_neurons {size}; it is {output_neurons}."
        )
    model_file = Path(model_file)
    model_file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(model_file, "wb") as stream:
        stream.write(model.getvalue())
    logger.info("Trained a %s tokenizer of %d tokens: %s", token_type, size, model_file)


def load_tokenizer(model_file: str | Path, output_neurons: int) -> spm.SentencePieceProcessor:
    """Load a sentencepiece model and check it against the output layer.

    Raises:
        UserError: not a sentencepiece model, more tokens than outputs, or other special ids.
    """
    if reason := why_unreadable(model_file):
        raise UserError(f"{model_file} is not a sentencepiece model: {reason}.")
    try:
        tokenizer = spm.SentencePieceProcessor(model_file=str(model_file))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{model_file} is not a sentencepiece model: {error}") from None
    if tokenizer.get_piece_size() > output_neurons:
        raise UserError(
            f"{model_file} has {tokenizer.get_piece_size()} tokens but output_neurons is "
            f"{output_neurons}: the tokenizer belongs to another model."
        )
    ids = tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id()
    if ids != (UNK_ID, BOS_ID, EOS_ID):
        raise UserError(
            f"{model_file} has unk, bos, eos = {', '.join(map(str, ids))} (-1: none); they must be "
            "0 (the blank, too), 1 and 2. Train it with --unk_id=0 --bos_id=1 --eos_id=2 "
            "--pad_id=-1, or leave it out: the recipe trains one."
        )
    return tokenizer


def tokens_of(
    tokenizer: spm.SentencePieceProcessor, text: str, dropped: Counter[str] | None = None
) -> list[int]:
    """Token ids of a transcript without id 0, which is the blank.

    Characters that the tokenizer does not know are left out, and words of nothing else with them.

    Args:
        dropped: gets the characters that are left out, counted.
    """
    tokens = tokenizer.encode(text)
    if UNK_ID not in tokens:
        return tokens
    pieces = list(zip(tokens, tokenizer.encode(text, out_type=str), strict=True))
    if dropped is not None:
        dropped.update("".join(piece for token, piece in pieces if token == UNK_ID))
    known = "".join(piece for token, piece in pieces if token != UNK_ID)
    # The space before a word is a token: that of a word without a character must not stay.
    tokens = tokenizer.encode(" ".join(known.replace(WORD_MARK, " ").split()))
    return [token for token in tokens if token != UNK_ID]


def count_unknown_characters(
    tokenizer: spm.SentencePieceProcessor, sentences: Iterable[str]
) -> Counter[str]:
    """How often each character that the tokenizer does not know occurs."""
    characters: Counter[str] = Counter()
    for sentence in sentences:
        characters.update(sentence)
    return Counter(
        {
            character: count
            for character, count in characters.items()
            if not character.isspace()
            and UNK_ID in tokenizer.encode(WORD_MARK + character, add_bos=False)
        }
    )


def check_unknown_characters(unknown: Counter[str], policy: str, where: str) -> None:
    """Lists what `count_unknown_characters` found; ``policy`` is ``unknown_characters`` of a YAML.

    Raises:
        UserError: there is some and the policy is "error"; or there is no such policy.
    """
    if policy not in UNKNOWN_CHARACTERS:
        raise UserError(
            f"unknown_characters is {policy!r}; it must be one of {', '.join(UNKNOWN_CHARACTERS)}."
        )
    if not unknown:
        return
    listed = ", ".join(f"{char!r} {count}" for char, count in unknown.most_common(20))
    message = f"{where}: {len(unknown)} characters are unknown to the tokenizer: {listed}"
    if policy == "error":
        raise UserError(
            f"{message}. Mend the text, train another tokenizer, or choose --unknown_characters "
            "drop (the characters are left out) or skip (the sentences are)."
        )
    left_out = "the characters" if policy == "drop" else "the sentences with them"
    logger.warning("%s; %s are left out.", message, left_out)


def check_letter_case(
    tokenizer: spm.SentencePieceProcessor, sentences: Iterable[str], where: str
) -> None:
    """Refuses text that is not written as the tokens are: nearly all of it would be unknown.

    Raises:
        UserError: of most letters the tokenizer knows the other case alone.
    """
    letters: Counter[str] = Counter()
    for sentence in sentences:
        letters.update(sentence)
    cased = Counter(
        {c: n for c, n in letters.items() if c.swapcase() != c and len(c.swapcase()) == 1}
    )
    unknown = count_unknown_characters(tokenizer, [*cased, *map(str.swapcase, cased)])
    wrong = {c: n for c, n in cased.items() if c in unknown and c.swapcase() not in unknown}
    if 2 * sum(wrong.values()) > cased.total():
        example = max(wrong, key=wrong.__getitem__)
        command = "'[:lower:]' '[:upper:]'" if example.islower() else "'[:upper:]' '[:lower:]'"
        raise UserError(
            f"{where} is in another letter case than the tokens: {example!r} is unknown to the "
            f"tokenizer, {example.swapcase()!r} is not. Convert it, for instance with tr {command}."
        )


def vocabulary(tokenizer: spm.SentencePieceProcessor) -> list[str]:
    """All pieces in the order of their ids; the blank is the first."""
    return [tokenizer.id_to_piece(i) for i in range(tokenizer.get_piece_size())]
