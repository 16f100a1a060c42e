"""Trained models and recordings for the tests of inference."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import train_S2S
from inference import Recognizer
from tests import ctc_runs


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from another, and 32 callers bring their own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="package")
def ctc_run(one_thread: None, tone_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a CTC run that has learned some letters; read only."""
    folder = tmp_path_factory.mktemp("ctc") / "run"
    keys = {"d_model": 32, "d_ffn": 64, "number_of_epochs": 24, "max_batch_length_train": 20}
    keys |= {"avg_checkpoints": 1, "test_splits": "[test-clean]"}
    assert ctc_runs.train(ctc_runs.command_line(tone_corpus, folder, **keys)) == 0
    return folder


@pytest.fixture(scope="package")
def s2s_run(one_thread: None, tone_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a joint CTC/attention run with a Mamba decoder; read only."""
    folder = tmp_path_factory.mktemp("s2s") / "run"
    keys = {"avg_checkpoints": 1, "test_beam_size": 3, "test_splits": "[test-clean]"}
    yaml_file = ctc_runs.REPOSITORY / "hparams" / "S2S" / "demo.yaml"
    arguments = ctc_runs.command_line(
        tone_corpus, folder, yaml_file, **{**ctc_runs.TINY_S2S, **keys}
    )
    assert ctc_runs.train(arguments, train_S2S.main) == 0
    return folder


@pytest.fixture(params=["ctc", "s2s"])
def run(request: pytest.FixtureRequest) -> Path:
    """Each of the two; read only."""
    return request.getfixturevalue(f"{request.param}_run")


@pytest.fixture
def bundle(ctc_run: Path, tmp_path: Path) -> Path:
    """A bundle of the CTC run, to be spoiled."""
    return shutil.copytree(ctc_run / "bundle", tmp_path / "bundle")


@pytest.fixture(scope="package")
def recognizers(ctc_run: Path, s2s_run: Path) -> dict[str, Recognizer]:
    """The recognisers of both."""
    runs = {"ctc": ctc_run, "s2s": s2s_run}
    return {kind: Recognizer.from_run(run, device="cpu") for kind, run in runs.items()}


@pytest.fixture(params=["ctc", "s2s"])
def recognizer(request: pytest.FixtureRequest, recognizers: dict[str, Recognizer]) -> Recognizer:
    """Each of the two recognisers."""
    return recognizers[request.param]


@pytest.fixture(scope="package")
def audio_files(tone_corpus: Path) -> list[Path]:
    """Recordings of different lengths."""
    return sorted(tone_corpus.rglob("*.flac"))[:8]


@pytest.fixture(scope="package")
def waveforms(audio_files: list[Path]) -> list[np.ndarray]:
    """The same as samples, and some of a few samples or none at all."""
    read = [soundfile.read(path, dtype="float32")[0] for path in audio_files]
    return [*read, read[0][:700], read[1][:1], read[0][:0]]
