"""Run folders with random weights, made in no time."""

import io
from pathlib import Path

import torch
from hyperpyyaml import load_hyperpyyaml, resolve_references

from text.tokenizer import train_tokenizer

_HPARAMS = Path(__file__).resolve().parent.parent / "hparams"
TEXT = ("THE QUICK BROWN FOX JUMPS OVER", "A LAZY DOG'S BACK", "ONE TWO THREE")
"""What the characters of the tokenizer are from."""


def resolved(yaml_file: str, **overrides) -> str:
    """A YAML file of ``hparams`` as a run with these overrides records it."""
    text = (_HPARAMS / f"{yaml_file}.yaml").read_text(encoding="utf-8")
    overrides = {"data_folder": "nowhere", **overrides}
    return resolve_references(io.StringIO(text), overrides, overrides_must_match=False).read()


def make_run(folder: Path, yaml_file: str, **overrides) -> Path:
    """The output folder of an evaluated run of this file, as far as a bundle needs it.

    Args:
        folder: of the run.
        yaml_file: in ``hparams``, without its suffix.
        **overrides: of its keys; the tokens must be characters, and at least as many as in
            ``TEXT``.
    """
    averaged = folder / "save" / "averaged"
    averaged.mkdir(parents=True)
    text = resolved(yaml_file, **{"output_folder": str(folder), **overrides})
    (folder / "hyperparams.yaml").write_text(text, encoding="utf-8")
    hparams = load_hyperpyyaml(text)
    torch.manual_seed(0)
    for weight in hparams["ctc_lin"].parameters():
        # Far from the uniform: searches of two implementations agree where nothing is a tie.
        torch.nn.init.normal_(weight)
    train_tokenizer(
        TEXT,
        folder / "save" / "tokenizer.model",
        token_type="char",
        output_neurons=hparams["output_neurons"],
    )
    torch.save(hparams["model"].state_dict(), averaged / "model.ckpt")
    hparams["normalize"].train()
    hparams["normalize"](torch.randn(2, 50, hparams["n_mels"]) * 10 - 30)
    hparams["normalize"]._save(averaged / "normalizer.ckpt")
    return folder
