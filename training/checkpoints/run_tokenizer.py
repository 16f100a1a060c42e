"""The tokenizer that a run keeps as long as there are checkpoints that were trained with it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from common.errors import UserError
from common.files import atomic_write
from common.record import PreparationRecord
from inference.bundle import CONFIG_FILE, WEIGHTS_FILE
from inference.config import check_config, read_json
from text.tokenizer import MOST_CHARACTERS, load_tokenizer, vocabulary
from training.checkpoints.checkpointer import RunCheckpointer

RECORD_FILE = "tokenizer.json"


def keep_tokenizer(
    model_file: Path,
    settings: Mapping[str, Any],
    source: Any,
    make: Callable[[], None],
    checkpointer: RunCheckpointer,
) -> None:
    """Calls ``make`` where ``model_file`` is missing or was made from something else.

    Checkpoints keep the tokenizer that they were trained with.

    Args:
        model_file: the run's sentencepiece model.
        settings: what the user asks for, by name; in the error message.
        source: what it is made from; a JSON value that changes when that does.
        make: writes ``model_file``.
        checkpointer: of the run.

    Raises:
        UserError: there are checkpoints of a run with other ``settings``; or from ``make``.
    """
    record = PreparationRecord(model_file.parent, RECORD_FILE)
    settings = dict(settings)
    made_from = {"settings": settings, "source": source}
    if model_file.is_file():
        if record.is_current(model_file.name, made_from):
            return
        if checkpointer.find_checkpoint() is not None:
            earlier = record.note(model_file.name, "settings", settings)
            # Characters are as many as there are, unless the user says how many they may be.
            said = {"output_neurons"} & earlier.keys() & settings.keys()
            names = (earlier.keys() | settings.keys()) - {"output_neurons"} | said
            if any(earlier.get(name) != settings.get(name) for name in names):
                raise UserError(
                    f"{model_file.parent} holds checkpoints of a run with {_listed(earlier)}; now "
                    f"it is {_listed(settings)}. Use another output_folder, or the same tokens."
                )
            return
    make()
    record.add(model_file.name, made_from, settings=settings)


def tokenizer_of_weights(file: str | Path, token_type: str) -> Path | None:
    """The tokenizer of the run that weights belong to; None of a file that lies in no run.

    Args:
        file: ``save/<checkpoint>/model.ckpt`` or ``lm/lm.ckpt`` of a run, or ``model.safetensors``
            of a bundle.
        token_type: of the run that begins with these weights.

    Raises:
        UserError: the weights are those of another kind of tokens, or the bundle is damaged.
    """
    model_file = _beside(file)
    if model_file is None:
        return None
    if Path(file).name == WEIGHTS_FILE:
        config = read_json(model_file.with_name(CONFIG_FILE))
        check_config(config)
        kind = config["tokens"].get("type", token_type)
    else:
        record = PreparationRecord(model_file.parent, RECORD_FILE)
        kind = record.note(model_file.name, "settings", {}).get("token_type", token_type)
    if kind != token_type:
        raise UserError(
            f"--init_from {file} has tokens of token_type {kind}, and token_type is {token_type}. "
            f"Give --token_type {kind}."
        )
    return model_file


def check_tokens_of_weights(
    option: str, file: str | Path, tokenizer: SentencePieceProcessor
) -> None:
    """Refuse weights whose outputs stand for other tokens than the run's.

    Args:
        option: that names the file, for the message.

    Raises:
        UserError: names both tokenizers.
    """
    theirs = _beside(file)
    if theirs is None:
        return
    if vocabulary(load_tokenizer(theirs, MOST_CHARACTERS)) != vocabulary(tokenizer):
        raise UserError(
            f"{option} {file} has the tokens of {theirs}, and this run has others: each output "
            "would stand for another token. Let the run have that tokenizer."
        )


def _beside(file: str | Path) -> Path | None:
    folder = Path(file).resolve().parent
    places = (folder.parent / "tokenizer.model", folder / "tokenizer.ckpt")
    if Path(file).suffix == ".safetensors":
        places = (folder / "tokenizer.model",)
    return next((place for place in places if place.is_file()), None)


def copy_tokenizer(source: str | Path, model_file: Path) -> None:
    """A copy that appears whole.

    Raises:
        UserError: the source is no tokenizer.
    """
    load_tokenizer(source, MOST_CHARACTERS)
    model_file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(model_file, "wb") as stream:
        stream.write(Path(source).read_bytes())


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())
