"""Short training runs, in this process or in one of their own."""

import contextlib
import json
import logging
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import yaml

import train_CTC
from training.launch.command_line import run_script

REPOSITORY = Path(__file__).resolve().parents[1]
CONMAMBA = REPOSITORY / "hparams" / "CTC" / "conmamba_small.yaml"
CONMAMBAMAMBA = REPOSITORY / "hparams" / "S2S" / "conmambamamba_small.yaml"

TINY = {
    "train_splits": "[train-clean-100]",
    "d_model": 16,
    "nhead": 2,
    "num_encoder_layers": 1,
    "d_ffn": 32,
    "mamba_config": "{d_state: 4}",
    "lr_adam": 0.01,
    "n_warmup_steps": 10,
    "number_of_epochs": 2,
    "max_batch_length_train": 3,
    "max_batch_length_val": 8,
    "num_bucket": 4,
    "num_workers": 0,
    "log_interval_steps": 1,
    "grad_accumulation_factor": 1,
    "precision": "fp32",
    "device": "cpu",
}
"""Overrides that make a run of conmamba_small.yaml a matter of seconds."""

TINY_S2S = {
    "num_decoder_layers": 1,
    "token_type": "char",
    "output_neurons": 31,
    "no_lm": True,
    "pretrained_lm_tokenizer_path": "null",
    "valid_beam_size": 2,
    "test_beam_size": 2,
}
"""Further ones for a file of hparams/S2S."""


def command_line(
    corpus: Path, folder: Path, yaml_file: Path = CONMAMBA, flags: Sequence[str] = (), **keys
) -> list[str]:
    """Arguments of train_CTC.py; keys go over those of ``TINY``, one that is None is left out."""
    keys = TINY | {"data_folder": corpus, "output_folder": folder} | keys
    pairs = [(f"--{key}", str(value)) for key, value in keys.items() if value is not None]
    return [str(yaml_file), "--noprogressbar", *flags, *(word for pair in pairs for word in pair)]


@contextlib.contextmanager
def untouched_process() -> Iterator[None]:
    """Undo what a run does to its process: log handlers, exception hook, generators."""
    root = logging.getLogger()
    handlers, level, hook = root.handlers[:], root.level, sys.excepthook
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        yield
    finally:
        for handler in set(root.handlers) - set(handlers):
            handler.close()
        root.handlers[:], sys.excepthook = handlers, hook
        root.setLevel(level)
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


@contextlib.contextmanager
def quick_runs(curves: bool = False) -> Iterator[None]:
    """Inside, runs leave out what takes longer than their steps and is tested elsewhere.

    That is env.log, for which SpeechBrain asks pip and git, and, unless wanted, the curves that are
    drawn after every epoch.
    """
    with patch("speechbrain.utils.logger.get_environment_description", str):
        if curves:
            yield
            return
        with patch("training.brains.run_brain.plot_curves"):
            yield


def train(arguments: Sequence[str], main: Callable = train_CTC.main, curves: bool = False) -> int:
    """Run the recipe in this process, as the script would; returns the exit status."""
    with untouched_process(), quick_runs(curves):
        try:
            run_script(main, arguments)
        except SystemExit as ended:
            return ended.code
        return 0


def start(arguments: Sequence[str], before: str = "") -> subprocess.Popen:
    """Start train_CTC.py in a process group of its own, two threads, output in pipes.

    Args:
        before: Python code to run first, with ``train_CTC`` imported.
    """
    code = (
        f"import sys, train_CTC\nfrom tests.ctc_runs import quick_runs\n{before}\n"
        "from training.launch.command_line import run_script\n"
        "with quick_runs():\n    run_script(train_CTC.main)"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=REPOSITORY,
        env=os.environ
        | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(torch.get_num_threads())),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def large_ones_slow(names: Sequence[str]) -> list:
    """Names of YAML files as parameters: large models, and files much like another, are slow."""
    slow = ("_large", "_crctc", "_streaming", "_conformer", "conformer_small", "mini_librispeech")
    return [
        pytest.param(name, marks=[pytest.mark.slow] if name.endswith(slow) else [])
        for name in names
    ]


def metrics(output_folder: Path) -> list[dict]:
    """What a run logged, without what its machine took for it."""
    text = (output_folder / "metrics.jsonl").read_text(encoding="utf-8")
    entries = [json.loads(line) for line in text.splitlines()]
    return [
        {key: value for key, value in entry.items() if not key.endswith(("_s", "_gib", "_percent"))}
        for entry in entries
    ]


def checkpoints(output_folder: Path) -> list[Path]:
    """Checkpoint folders in the order in which they were written.

    Names alone do not tell it: within one second a name that rotation freed is given again.
    """

    def written(checkpoint: Path) -> float:
        return yaml.safe_load((checkpoint / "CKPT.yaml").read_text(encoding="utf-8"))["unixtime"]

    return sorted((output_folder / "save").glob("CKPT+*"), key=written)


def weights_of(checkpoint: Path) -> dict:
    """Everything in a checkpoint that is made of tensors."""
    names = ("model", "optimizer", "normalizer", "noam_scheduler")
    return {name: torch.load(checkpoint / f"{name}.ckpt", weights_only=True) for name in names}


def progress_of(checkpoint: Path) -> dict:
    """How far a run had come: step, optimizer_step, current_epoch, best_score, ..."""
    texts = [(checkpoint / f"{name}.ckpt").read_text("utf-8") for name in ("counter", "brain")]
    return {key: value for text in texts for key, value in yaml.safe_load(text).items()}


def assert_same_end(first: Path, second: Path) -> None:
    """Two runs ended with exactly the same weights, optimiser, statistics, logs and texts."""
    ends = checkpoints(first)[-1], checkpoints(second)[-1]
    torch.testing.assert_close(*map(weights_of, ends), rtol=0, atol=0)
    assert progress_of(ends[0]) == progress_of(ends[1])
    torch.testing.assert_close(
        torch.load(first / "save" / "averaged" / "model.ckpt", weights_only=True),
        torch.load(second / "save" / "averaged" / "model.ckpt", weights_only=True),
        rtol=0,
        atol=0,
    )
    assert metrics(first) == metrics(second)
    for report in first.glob("hyp_*.tsv"):
        assert report.read_text(encoding="utf-8") == (second / report.name).read_text(
            encoding="utf-8"
        )
