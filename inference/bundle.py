"""Bundles: a trained model as a folder of data, whose loading executes nothing.

    python -m inference.bundle results/CTC/an4/3402 my_model --precision fp16

writes ``config.json``, ``model.safetensors``, ``tokenizer.model``, ``README.md``,
``checksums.json``; of a search with a language model also ``lm.safetensors``; and for SpeechBrain's
loaders ``hyperparams.yaml``, which is never read here.
"""

import argparse
import contextlib
import functools
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.errors import EXIT_USER_ERROR, UserError, in_words
from common.files import atomic_write, file_digest, why_unreadable
from decoding.pretrained_lm import LM_FILE, pretrained_file
from inference.command_line import HOW_TO_GET_A_MODEL
from inference.config import PARTS, check_config, read_json
from inference.model import STATISTICS, Model, check_weights, make_model
from inference.model_card import model_card
from inference.run_config import read_run_config
from inference.speechbrain_yaml import speechbrain_yaml
from inference.weights import NORMALIZER, PRECISIONS, pack, unpack
from text.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
LM_WEIGHTS_FILE = "lm.safetensors"
TOKENIZER_FILE = "tokenizer.model"
CARD_FILE = "README.md"
CHECKSUMS_FILE = "checksums.json"
SPEECHBRAIN_FILE = "hyperparams.yaml"
FILES = (
    CONFIG_FILE,
    WEIGHTS_FILE,
    LM_WEIGHTS_FILE,
    TOKENIZER_FILE,
    CARD_FILE,
    CHECKSUMS_FILE,
    SPEECHBRAIN_FILE,
)
"""All files that a bundle may have."""

RUN_BUNDLE = "bundle"
"""Where a run keeps its own bundle."""

RUN_FILES = (
    "hyperparams.yaml",
    "save/averaged/model.ckpt",
    "save/averaged/normalizer.ckpt",
    "save/tokenizer.model",
)
"""What the bundle of a run is made from, beside its language model."""

_SCRATCH = ".bundle-"


@dataclass(frozen=True)
class _RunModel:
    """The model of a run: its configuration, weights by part, and tokenizer file."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    lm_tensors: dict[str, Tensor] | None
    tokenizer_file: Path


def write_bundle(
    run: str | Path,
    folder: str | Path,
    precision: str = "fp32",
    language: str | None = None,
    licence: str | None = None,
) -> Path:
    """Writes the bundle of a training run; a new folder appears whole or not at all.

    Args:
        run: output folder of a run that has been evaluated.
        folder: of the bundle; the files of an earlier bundle there are replaced one by one, and
            what else lies beside them stays; another folder is not touched.
        precision: how weights are stored: fp32, fp16, or int8 with a scale per row. They are
            float32 again when loaded.
        language: of the speech, as a code such as "en".
        licence: of the weights, as a code such as "cc-by-4.0".

    Returns:
        the folder.

    Raises:
        UserError: the run has no averaged weights, holds classes that a bundle cannot, or the
            folder is something else.
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    if precision not in PRECISIONS:
        raise UserError(f"precision is {precision!r}; known are {', '.join(PRECISIONS)}.")
    if folder.exists() and not _is_free(folder):
        raise UserError(f"{folder} exists and is no bundle: give another folder.")
    model = _read_run(Path(run))
    config = {
        **model.config,
        "stored_precision": precision,
        "language": language,
        "licence": licence,
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A folder that is there may lie on another device than the one above it.
    place = folder if folder.is_dir() else folder.parent
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=place) as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        _save_tensors(pack(model.tensors, precision), new / WEIGHTS_FILE)
        if model.lm_tensors is not None:
            _save_tensors(pack(model.lm_tensors, precision), new / LM_WEIGHTS_FILE)
        shutil.copyfile(model.tokenizer_file, new / TOKENIZER_FILE)
        for path in new.glob("*.safetensors"):
            # safetensors makes files that their owner alone can read.
            shutil.copymode(new / TOKENIZER_FILE, path)
        _write_json(new / CONFIG_FILE, config)
        with atomic_write(new / SPEECHBRAIN_FILE) as stream:
            stream.write(speechbrain_yaml(config))
        checksums = {path.name: file_digest(path) for path in sorted(new.iterdir())}
        _write_json(new / CHECKSUMS_FILE, checksums)
        with atomic_write(new / CARD_FILE) as stream:
            stream.write(model_card(config, checksums))
        if place != folder:
            new.rename(folder)
            return folder
        names = {path.name for path in new.iterdir()}
        for name in names:
            os.replace(new / name, folder / name)
        for name in {*FILES} - names:
            (folder / name).unlink(missing_ok=True)
    return folder


def read_bundle(folder: str | Path, link_targets: Path | None = None) -> Model:
    """The model of a bundle, float32 on the CPU.

    Args:
        folder: of the bundle. Its files must lie in it.
        link_targets: the folder into which they may be links, nevertheless.

    Raises:
        UserError: a file is missing, was changed, or belongs to a newer version.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"No model: {folder} does not exist or is no folder. {HOW_TO_GET_A_MODEL}")
    if not (folder / CONFIG_FILE).exists():
        raise UserError(f"{folder} is no bundle: it has no {CONFIG_FILE}. {HOW_TO_GET_A_MODEL}")
    checked = functools.partial(_checked_file, folder, link_targets)
    checksums = read_json(checked(CHECKSUMS_FILE))
    config = read_json(checked(CONFIG_FILE, checksums))
    with _located(folder):
        check_config(config)
    lm_file = checked(LM_WEIGHTS_FILE, checksums) if "lm" in config else None
    weights_file = checked(WEIGHTS_FILE, checksums)
    tokenizer = load_tokenizer(checked(TOKENIZER_FILE, checksums), config["tokens"]["outputs"])
    try:
        tensors = unpack(load_file(weights_file))
        lm_tensors = None if lm_file is None else unpack(load_file(lm_file))
    except (SafetensorError, OSError, RuntimeError) as error:
        raise UserError(f"{folder}: its weights cannot be read: {in_words(error)}") from None
    with _located(folder):
        return make_model(config, tokenizer, tensors, lm_tensors)


def read_run(run: str | Path) -> Model:
    """The model of a training run's output folder, float32 on the CPU.

    It is that of the run's bundle, if that is one of the run's present weights and settings.

    Raises:
        UserError: the run has no model to evaluate, or one that cannot be bundled.
    """
    run = Path(run)
    bundle = run / RUN_BUNDLE
    if bundle.is_dir():
        if _is_current(bundle, run):
            return read_bundle(bundle)
        reason = "another model than the run's present one is in its bundle"
    else:
        reason = "it has no bundle"
    model = _read_run(run)
    logger.warning("%s: %s; its files are bundled on the fly, executing none.", run, reason)
    tokenizer = load_tokenizer(model.tokenizer_file, model.config["tokens"]["outputs"])
    with _located(run):
        return make_model(model.config, tokenizer, model.tensors, model.lm_tensors)


def first_weights(folder: str | Path) -> dict[str, Tensor]:
    """What the ``model`` of a recipe takes over from a bundle, to be trained further.

    Raises:
        UserError: see `read_bundle`.
    """
    model = read_bundle(folder)
    parts = model.parts()
    return {
        f"{place}.{name}": tensor
        for place, part in enumerate(PARTS[model.kind])
        for name, tensor in parts[part].state_dict().items()
    }


def is_bundle(folder: Path) -> bool:
    """Whether the folder claims to be a bundle, rather than a run."""
    return (folder / CONFIG_FILE).is_file()


def _read_run(run: Path) -> _RunModel:
    missing = [name for name in RUN_FILES if not (run / name).is_file()]
    if missing:
        what_to_do = HOW_TO_GET_A_MODEL
        if any(run.glob("save/CKPT*")):
            what_to_do = (
                f"It has checkpoints: train_CTC.py {run} --test_only (or train_S2S.py) scores "
                "their mean and leaves it, also while the run trains."
            )
        raise UserError(
            f"{run} is not the folder of an evaluated run: {', '.join(missing)} is missing. "
            + what_to_do
        )
    found = read_run_config(run)
    config = found.config
    config["made_from"] = {name: file_digest(run / name) for name in RUN_FILES}
    averaged = run / "save" / "averaged"
    tensors = {}
    for name, tensor in _load_state(averaged / "model.ckpt").items():
        # The recipe's ``model`` is a list of its parts.
        index, _, rest = name.partition(".")
        order = PARTS[config["kind"]]
        if not index.isdecimal() or int(index) >= len(order):
            raise UserError(f"{averaged / 'model.ckpt'} has {name}, which no recipe's model has.")
        tensors[f"{order[int(index)]}.{rest}"] = tensor
    statistics = _load_state(averaged / "normalizer.ckpt")
    for name in statistics.keys() & STATISTICS:
        tensors[NORMALIZER + name] = torch.as_tensor(statistics[name])
    lm_tensors = None
    if found.lm_source is not None:
        lm_file = pretrained_file(found.lm_source, LM_FILE, run / "save" / "pretrained")
        if not lm_file.is_file():
            raise UserError(
                f"{run} is a run whose search has a language model, but {lm_file} is missing."
            )
        lm_tensors = _load_state(lm_file)
    with _located(run):
        check_config(config)
        config["parameters"] = check_weights(config, tensors, lm_tensors)
    return _RunModel(config, tensors, lm_tensors, run / "save" / "tokenizer.model")


@contextlib.contextmanager
def _located(folder: Path) -> Iterator[None]:
    """Says of which folder an error is."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None


def _load_state(path: Path) -> dict[str, Any]:
    if reason := why_unreadable(path):
        raise UserError(f"{path} cannot be used: {reason}.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # What torch says is for programmers, and may be nothing.
        raise UserError(
            f"{path} is damaged or no file of weights ({type(error).__name__})."
        ) from None
    if not isinstance(state, dict):
        raise UserError(f"{path} holds no weights.")
    return state


def _is_current(bundle: Path, run: Path) -> bool:
    """Whether the bundle was made from the files that the run has now, as far as it has them."""
    if not is_bundle(bundle):
        return False
    made_from = read_json(bundle / CONFIG_FILE).get("made_from")
    if not isinstance(made_from, Mapping):
        return False
    return all(
        made_from.get(name) == file_digest(run / name)
        for name in RUN_FILES
        if (run / name).is_file()
    )


def _checked_file(
    folder: Path, link_targets: Path | None, name: str, checksums: Mapping[str, Any] | None = None
) -> Path:
    """A file of the bundle that is what was written.

    Raises:
        UserError: it is not.
    """
    path = folder / name
    if not path.is_file():
        raise UserError(f"{folder}: {name} is missing. Copy the bundle again.")
    if path.is_symlink() and (
        link_targets is None or not path.resolve().is_relative_to(link_targets.resolve())
    ):
        raise UserError(f"{folder}: {name} is a link. A bundle's files lie in its folder.")
    if checksums is not None and file_digest(path) != checksums.get(name):
        raise UserError(
            f"{folder}: {name} is not the file that was written ({CHECKSUMS_FILE}). Copy the "
            "bundle again."
        )
    return path


def _is_free(folder: Path) -> bool:
    """Whether a bundle may take the place of what is there."""
    if not folder.is_dir():
        return False
    # A call that was killed may have left its scratch folder.
    if all(path.name.startswith(_SCRATCH) for path in folder.iterdir()):
        return True
    # Many a folder has a config.json.
    try:
        config = json.loads((folder / CONFIG_FILE).read_bytes())
    except (OSError, ValueError):
        return False
    is_ours = isinstance(config, dict) and {"format", "kind"} <= config.keys()
    return is_ours and (folder / CHECKSUMS_FILE).is_file()


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:
        # A full disk, in words of its own.
        raise OSError(f"{path.name} cannot be written: {error}") from None


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with atomic_write(path) as stream:
        json.dump(content, stream, indent=1)
        stream.write("\n")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m inference.bundle",
        description="Write a trained model as a folder of data: weights, tokens, a model card.",
    )
    parser.add_argument("run", help="output folder of a training run")
    parser.add_argument("folder", help="where the bundle goes")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="how weights are stored; loaded, they are float32 (default: fp32)",
    )
    parser.add_argument("--language", help="of the speech, for the model card: en, ml, ...")
    parser.add_argument("--licence", help="of the weights, for the model card: cc-by-4.0, ...")
    parser.add_argument(
        "--push", metavar="NAME", help="upload the bundle to the Hugging Face hub as NAME"
    )
    parser.add_argument(
        "--private", action="store_true", help="if that repository is new, let nobody else see it"
    )
    arguments = parser.parse_args(argv)
    try:
        folder = write_bundle(
            arguments.run,
            arguments.folder,
            arguments.precision,
            arguments.language,
            arguments.licence,
        )
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"{folder}: {size / 2**20:.1f} MiB")
        if arguments.push:
            from inference.hub import push

            print(push(folder, arguments.push, arguments.private))
    except (UserError, OSError) as error:
        print(f"error: {in_words(error)}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
