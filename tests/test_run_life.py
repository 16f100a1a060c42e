"""A run that was killed, stopped, damaged or started elsewhere ends as if nothing had happened."""

import os
import re
import shutil
import signal

import pytest
import torch

import train_CTC
from common.errors import EXIT_SIGTERM, EXIT_USER_ERROR
from tests.ctc_runs import (
    assert_same_end,
    checkpoints,
    command_line,
    metrics,
    progress_of,
    start,
    train,
)
from tests.generated_corpus import make_corpus

LIFE = {
    "number_of_epochs": 3,
    "num_workers": 1,
    "grad_accumulation_factor": 2,
    "ckpt_interval_steps": 1,
    "avg_checkpoints": 2,
    "ema_decay": 0.9,
    "spliced_share": 0.5,
    "splice_from_epoch": 2,
    "splice_min_log_prob": -100,
}
"""Worker, speed, splices, drops and dropout are on; checkpoints fall amid an epoch."""

NUM_BATCHES = 5
"""Of an epoch: the last one does not fill an accumulation."""

SIGNAL_IN_TRAINING = """
import os, signal
whole_step = train_CTC.ASR.on_fit_batch_end
def on_fit_batch_end(self, batch, outputs, loss, should_step):
    whole_step(self, batch, outputs, loss, should_step)
    if self.epoch == 2 and self.step == {batch}:
        {action}
train_CTC.ASR.on_fit_batch_end = on_fit_batch_end
"""

SIGNAL_IN_VALIDATION = """
import os, signal
whole_decode = train_CTC.ASR.decode
def decode(self, outputs, batch, stage):
    if self.epoch == 2 and stage.name == "VALID" and self.step == 1:
        {action}
    return whole_decode(self, outputs, batch, stage)
train_CTC.ASR.decode = decode
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    splits = {"train-clean-100": 8, "dev-clean": 3, "test-clean": 2}
    return make_corpus(tmp_path_factory.mktemp("life") / "LibriSpeech", splits, num_words=1)


def arguments(corpus, output_folder, **keys):
    return command_line(corpus, output_folder, **(LIFE | {"test_splits": "[test-clean]"} | keys))


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory):
    """Folder of a run that nothing happened to; read only."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert train(arguments(corpus, folder)) == 0
    return folder


@pytest.fixture
def copy(uninterrupted, tmp_path):
    """The same run in a folder to be harmed."""
    return shutil.copytree(uninterrupted, tmp_path / "copy")


def stopped(corpus, folder, code):
    """Run in a process of its own with ``code`` first; returns (status, stdout, stderr)."""
    process = start(arguments(corpus, folder), code)
    stdout, stderr = process.communicate(timeout=300)
    return process.returncode, stdout, stderr


def batches_seen(folder):
    """How many batches into its epoch the latest checkpoint was saved."""
    latest = checkpoints(folder)[-1]
    assert "end-of-epoch: false" in (latest / "CKPT.yaml").read_text(encoding="utf-8")
    return progress_of(latest)["step"]


def test_gradients_of_the_last_batches_of_an_epoch_are_not_dropped(uninterrupted):
    steps = [entry["step"] for entry in metrics(uninterrupted) if "valid_loss" in entry]
    assert steps == [3, 6, 9]
    assert progress_of(checkpoints(uninterrupted)[-1])["optimizer_step"] == 9


def test_a_killed_run_goes_on_amid_the_epoch_and_ends_with_the_same_weights(
    corpus, uninterrupted, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    kill = SIGNAL_IN_TRAINING.format(batch=4, action="os.kill(os.getpid(), signal.SIGKILL)")
    status, _, _ = stopped(corpus, folder, kill)
    assert status == -signal.SIGKILL
    assert batches_seen(folder) == 2

    # Stopped once more in the same epoch, by a signal amid an accumulation.
    whole_step = train_CTC.ASR.on_fit_batch_end

    def on_fit_batch_end(self, batch, outputs, loss, should_step):
        whole_step(self, batch, outputs, loss, should_step)
        if self.epoch == 2 and self.step == 3:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(train_CTC.ASR, "on_fit_batch_end", on_fit_batch_end)
        assert train(arguments(corpus, folder)) == EXIT_SIGTERM
    assert batches_seen(folder) == 4

    assert train(arguments(corpus, folder)) == 0
    assert_same_end(folder, uninterrupted)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        pytest.param(signal.SIGINT, SIGNAL_IN_TRAINING, id="SIGINT in training"),
        pytest.param(
            signal.SIGTERM, SIGNAL_IN_VALIDATION, id="SIGTERM in validation", marks=pytest.mark.slow
        ),
    ],
)
def test_a_signal_to_the_process_group_saves_a_checkpoint_and_resuming_ends_the_same(
    corpus, uninterrupted, tmp_path, number, code
):
    folder = tmp_path / "run"
    action = f"os.killpg(os.getpgid(0), {int(number)})"
    status, stdout, stderr = stopped(corpus, folder, code.format(batch=3, action=action))
    assert status == 128 + number
    assert f"{number.name}: saving a checkpoint" in stdout
    assert "Traceback" not in stdout + stderr
    assert "DataLoader worker" not in stdout + stderr
    assert batches_seen(folder) == (4 if number == signal.SIGINT else NUM_BATCHES)
    assert not list((folder / "save").glob("unfinished*"))
    assert train(arguments(corpus, folder)) == 0
    assert_same_end(folder, uninterrupted)


def seen_by(monkeypatch, stop_after=None):
    """Ids of the utterances that are trained on from now on, by epoch; a SIGTERM amid epoch 2."""
    ids = {}
    whole_step = train_CTC.ASR.on_fit_batch_end

    def on_fit_batch_end(self, batch, outputs, loss, should_step):
        whole_step(self, batch, outputs, loss, should_step)
        ids.setdefault(self.epoch, []).extend(batch.id)
        if self.epoch == 2 and self.step == stop_after:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(train_CTC.ASR, "on_fit_batch_end", on_fit_batch_end)
    return ids


@pytest.fixture(scope="module")
def stopped_amid_an_epoch(corpus, tmp_path_factory):
    """(folder of a run stopped amid epoch 2, ids that it saw by epoch); read only."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patched:
        ids = seen_by(patched, stop_after=1)
        assert train(arguments(corpus, folder)) == EXIT_SIGTERM
    assert batches_seen(folder) == 2
    assert 0 < len(ids[2]) < len(ids[1])
    return folder, ids


@pytest.mark.parametrize(
    "changed",
    [
        {"max_batch_length_train": 12},
        {"max_batch_length_train": 1, "sorting": "ascending"},
        {"dynamic_batching": False, "batch_size": 3, "grad_accumulation_factor": 3},
        {"seed": 5},
    ],
    ids=str,
)
def test_an_interrupted_epoch_goes_on_with_the_utterances_it_has_not_seen_whatever_the_batches(
    corpus, stopped_amid_an_epoch, tmp_path, monkeypatch, changed
):
    stopped_folder, before = stopped_amid_an_epoch
    folder = shutil.copytree(stopped_folder, tmp_path / "run")
    after = seen_by(monkeypatch)
    keys = {"number_of_epochs": 2, "spliced_share": 0, "num_workers": 0} | changed
    assert train(arguments(corpus, folder, **keys)) == 0
    assert sorted(before[2] + after[2]) == sorted(before[1])
    assert [entry["epoch"] for entry in metrics(folder) if "valid_loss" in entry] == [1, 2]


def test_a_damaged_latest_checkpoint_is_passed_over(corpus, copy, uninterrupted, capsys):
    latest = checkpoints(copy)[-1]
    os.truncate(latest / "optimizer.ckpt", 100)
    assert train(arguments(corpus, copy)) == 0
    assert f"{latest.name} is damaged (optimizer.ckpt has 100 bytes" in capsys.readouterr().out
    assert (copy / "save" / f"damaged+{latest.name}").is_dir()
    assert_same_end(copy, uninterrupted)


def test_a_given_checkpoint_is_gone_on_from(corpus, copy, uninterrupted):
    first = checkpoints(copy)[0]
    assert train([*arguments(corpus, copy), "--resume", str(first)]) == 0
    assert_same_end(copy, uninterrupted)


def test_repeating_a_finished_run_trains_nothing_and_keeps_every_checkpoint(
    corpus, copy, uninterrupted
):
    (copy / "results.json").unlink()
    assert train(arguments(corpus, copy)) == 0
    assert [path.name for path in checkpoints(copy)] == [
        path.name for path in checkpoints(uninterrupted)
    ]
    assert metrics(copy) == metrics(uninterrupted)
    assert (copy / "results.json").is_file()


def test_a_finished_run_can_be_trained_for_longer(corpus, copy):
    assert train(arguments(corpus, copy, number_of_epochs=4)) == 0
    epochs = [entry["epoch"] for entry in metrics(copy) if "valid_loss" in entry]
    assert epochs == [1, 2, 3, 4]


def test_a_checkpoint_of_another_architecture_names_parameters(corpus, copy, capsys):
    before = (copy / "hyperparams.yaml").read_bytes()
    assert train(arguments(corpus, copy, d_model=24)) == EXIT_USER_ERROR
    assert (copy / "hyperparams.yaml").read_bytes() == before
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "belongs to another architecture" in message
    assert re.search(r"\w+\.weight: \(16, 640\) in the checkpoint, \(24, 640\) in", message)


def test_a_full_disk_ends_with_one_message_and_resuming_ends_the_same(
    corpus, copy, uninterrupted, monkeypatch, capsys
):
    shutil.rmtree(checkpoints(copy)[-1])
    before = [path.name for path in checkpoints(copy)]
    whole_save = torch.save

    def save_until_full(obj, path, *args, **kwargs):
        if "optimizer" in str(path):
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
        whole_save(obj, path, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", save_until_full)
        assert train(arguments(corpus, copy)) == EXIT_USER_ERROR
    message = capsys.readouterr().err
    assert message.startswith("error: No checkpoint could be written")
    assert message.count("\n") == 1
    assert [path.name for path in checkpoints(copy)] == before
    assert not list((copy / "save").glob("unfinished*"))
    assert train(arguments(corpus, copy)) == 0
    assert_same_end(copy, uninterrupted)
