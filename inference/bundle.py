"""Bundles: a trained model as a folder of data, whose loading executes nothing.

    python -m inference.bundle results/CTC/an4/3402 my_model --precision fp16

writes ``config.json``, ``model.safetensors``, ``tokenizer.model``, ``README.md`` and
``checksums.json``.
"""

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece as spm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.errors import EXIT_USER_ERROR, UserError
from common.files import atomic_write, file_digest
from inference.classes import UnknownClassError, build
from inference.model_card import model_card
from inference.run_config import FORMAT, read_run_config
from modules.speech_encoder import SpeechEncoder

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.model"
CARD_FILE = "README.md"
CHECKSUMS_FILE = "checksums.json"
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16}
STORED_PRECISIONS = (*PRECISIONS, "int8")

# Of the modules in the YAML's ``model``.
_MODEL_ORDER = ("CNN", "Transformer", "seq_lin", "ctc_lin")
_SCALE_SUFFIX = "#scale"
_NORMALIZER = "normalize."
_HOW_TO_GET_ONE = (
    "Train one (make demo, or train_CTC.py), and give its output_folder, or the folder that "
    "python -m inference.bundle RUN FOLDER writes."
)


@dataclass
class Model:
    """A recogniser in parts, in evaluation mode.

    Attributes:
        config: what ``config.json`` holds.
        encoder: waveforms to encoder output.
        ctc_lin: encoder output to logits of the CTC branch.
        seq_lin: decoder output to logits; None of a CTC model.
        tokenizer: of the text.
    """

    config: dict[str, Any]
    encoder: SpeechEncoder
    ctc_lin: nn.Module
    seq_lin: nn.Module | None
    tokenizer: spm.SentencePieceProcessor

    @property
    def kind(self) -> str:
        """ctc or s2s."""
        return self.config["kind"]

    def parts(self) -> dict[str, nn.Module]:
        """The modules that have weights, by their names in a bundle."""
        found = {
            "CNN": self.encoder.CNN,
            "Transformer": self.encoder.Transformer,
            "ctc_lin": self.ctc_lin,
            "seq_lin": self.seq_lin,
        }
        return {name: module for name, module in found.items() if module is not None}


def build_model(config: Mapping[str, Any], tokenizer: spm.SentencePieceProcessor) -> Model:
    """A model with arbitrary weights.

    Raises:
        UserError: the configuration describes none.
    """
    try:
        features = {key: build(node, {}) for key, node in config["features"].items()}
        network = {key: build(node, {}) for key, node in config["network"].items()}
        encoder = SpeechEncoder(
            features["compute_features"],
            features["normalize"],
            network["CNN"],
            network["Transformer"],
        )
        model = Model(dict(config), encoder, network["ctc_lin"], network.get("seq_lin"), tokenizer)
    except (UnknownClassError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{CONFIG_FILE} describes no model of ours: {error}") from None
    for part in [encoder, *model.parts().values()]:
        part.eval().requires_grad_(False)
    return model


def write_bundle(run: str | Path, folder: str | Path, precision: str = "fp32") -> Path:
    """Writes the bundle of a training run; the folder appears whole or not at all.

    Args:
        run: output folder of a run that has been evaluated.
        folder: of the bundle; an earlier bundle there is replaced, another folder is not.
        precision: how weights are stored: fp32, fp16, or int8 with a scale per row. They are
            float32 again when loaded.

    Returns:
        the folder.

    Raises:
        UserError: the run has no averaged weights, holds classes that a bundle cannot, or the
            folder is something else.
    """
    run, folder = Path(run), Path(folder)
    if precision not in STORED_PRECISIONS:
        raise UserError(f"precision is {precision!r}; known are {', '.join(STORED_PRECISIONS)}.")
    if folder.exists() and any(folder.iterdir()) and not (folder / CONFIG_FILE).is_file():
        raise UserError(f"{folder} exists and is no bundle: give another folder.")
    averaged = run / "save" / "averaged"
    files = (run / "hyperparams.yaml", averaged / "model.ckpt", averaged / "normalizer.ckpt")
    missing = [str(path) for path in files if not path.is_file()]
    if missing:
        raise UserError(
            f"{run} is not the folder of an evaluated run: {', '.join(missing)} is missing. "
            + _HOW_TO_GET_ONE
        )
    config = read_run_config(run / "hyperparams.yaml")
    config["stored_precision"] = precision
    order = [
        name for name in ("CNN", "Transformer", "seq_lin", "ctc_lin") if name in config["network"]
    ]
    state = torch.load(averaged / "model.ckpt", map_location="cpu", weights_only=True)
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        index, _, rest = name.partition(".")
        tensors[f"{order[int(index)]}.{rest}"] = tensor
    statistics = torch.load(averaged / "normalizer.ckpt", map_location="cpu", weights_only=True)
    for name in ("glob_mean", "glob_std"):
        tensors[_NORMALIZER + name] = statistics[name].float().reshape(-1)
    tokenizer = spm.SentencePieceProcessor(model_file=str(run / "save" / "tokenizer.model"))
    # Proves that what is written is a model before anything is.
    load_weights(build_model(config, tokenizer), tensors)

    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        new = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder.parent)))
        new.chmod(0o755)
        save_file(pack(tensors, precision), new / WEIGHTS_FILE)
        shutil.copyfile(run / "save" / "tokenizer.model", new / TOKENIZER_FILE)
        with atomic_write(new / CONFIG_FILE) as stream:
            json.dump(config, stream, indent=1)
            stream.write("\n")
        with atomic_write(new / CARD_FILE) as stream:
            stream.write(model_card(config, run))
        checksums = {path.name: file_digest(path) for path in sorted(new.iterdir())}
        with atomic_write(new / CHECKSUMS_FILE) as stream:
            json.dump(checksums, stream, indent=1)
            stream.write("\n")
        if folder.exists():
            shutil.rmtree(folder)
        shutil.copytree(new, folder)
    return folder


def read_bundle(folder: str | Path) -> Model:
    """The model of a bundle, float32 on the CPU.

    Raises:
        UserError: a file is missing, was changed, or belongs to a newer version.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"No model: {folder} does not exist or is no folder. {_HOW_TO_GET_ONE}")
    if not (folder / CONFIG_FILE).is_file() or not (folder / CHECKSUMS_FILE).is_file():
        raise UserError(f"{folder} is no bundle: it has no {CONFIG_FILE}. {_HOW_TO_GET_ONE}")
    checksums = _read_json(folder / CHECKSUMS_FILE)
    for name in (CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE):
        path = folder / name
        if not path.is_file():
            raise UserError(f"{folder}: {name} is missing. Copy the bundle again.")
        if file_digest(path) != checksums.get(name):
            raise UserError(
                f"{folder}: {name} is not the file that was written ({CHECKSUMS_FILE}). Copy the "
                "bundle again."
            )
    config = _read_json(folder / CONFIG_FILE)
    version = config.get("format")
    if not isinstance(version, int) or version > FORMAT:
        raise UserError(
            f"{folder} has format {version!r}; this version reads formats up to {FORMAT}. Update "
            "Mamba-ASR."
        )
    try:
        tokenizer = spm.SentencePieceProcessor(model_file=str(folder / TOKENIZER_FILE))
        tensors = unpack(load_file(folder / WEIGHTS_FILE))
    except (SafetensorError, OSError, RuntimeError) as error:
        raise UserError(f"{folder} cannot be read: {error}") from None
    model = build_model(config, tokenizer)
    load_weights(model, tensors)
    return model


def load_weights(model: Model, tensors: Mapping[str, Tensor]) -> None:
    """Puts the tensors of a bundle in their places.

    Raises:
        UserError: some are missing, left over, or of another shape.
    """
    rest = dict(tensors)
    normalize = model.encoder.normalize
    try:
        normalize.glob_mean = rest.pop(_NORMALIZER + "glob_mean")
        normalize.glob_std = rest.pop(_NORMALIZER + "glob_std")
        normalize.count = 1
        for part, module in model.parts().items():
            own = {name: rest.pop(f"{part}.{name}") for name in module.state_dict()}
            module.load_state_dict(own)
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{WEIGHTS_FILE} does not fit {CONFIG_FILE}: {error}") from None
    if rest:
        raise UserError(
            f"{WEIGHTS_FILE} does not fit {CONFIG_FILE}: {next(iter(rest))} has no place."
        )


def pack(tensors: Mapping[str, Tensor], precision: str) -> dict[str, Tensor]:
    """Tensors as they are stored; with int8 every matrix has a scale per row beside it."""
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        floating = tensor.is_floating_point() and not name.startswith(_NORMALIZER)
        if not floating:
            stored[name] = tensor.contiguous()
        elif precision != "int8":
            stored[name] = tensor.to(PRECISIONS[precision]).contiguous()
        elif tensor.dim() < 2:
            stored[name] = tensor.float().contiguous()
        else:
            rows = tensor.float().flatten(1)
            scale_R1 = rows.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
            stored[name] = (rows / scale_R1).round().to(torch.int8).reshape(tensor.shape)
            stored[name + _SCALE_SUFFIX] = scale_R1[:, 0].contiguous()
    return stored


def unpack(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of ``pack``, in float32."""
    tensors = {}
    for name, tensor in stored.items():
        if name.endswith(_SCALE_SUFFIX):
            continue
        scale_R = stored.get(name + _SCALE_SUFFIX)
        if scale_R is not None:
            shape = (-1,) + (1,) * (tensor.dim() - 1)
            tensor = tensor.float() * scale_R.reshape(shape)
        tensors[name] = tensor.float() if tensor.is_floating_point() else tensor
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}. Copy the bundle again.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no mapping. Copy the bundle again.")
    return content


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
        choices=STORED_PRECISIONS,
        default="fp32",
        help="how weights are stored; loaded, they are float32 (default: fp32)",
    )
    arguments = parser.parse_args(argv)
    try:
        folder = write_bundle(arguments.run, arguments.folder, arguments.precision)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
