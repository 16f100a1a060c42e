"""Run folders with a tiny network of random weights, made in no time."""

from pathlib import Path

from benchmarks import random_model

SMALL = {
    "d_model": 16,
    "nhead": 2,
    "num_encoder_layers": 1,
    "d_ffn": 16,
    "token_type": "char",
    "output_neurons": 31,
}


def resolved(yaml_file: str, **overrides) -> str:
    """A YAML file of ``hparams`` as a run with these overrides records it."""
    return random_model.resolved(yaml_file, **overrides)


def make_run(folder: Path, yaml_file: str, **overrides) -> Path:
    """The output folder of an evaluated run of this file, as far as a bundle needs it."""
    return random_model.make_run(folder, yaml_file, **{**SMALL, **overrides})
