"""Two processes on the CPU train one model, see all the data, and write every report once."""

import csv
import json
import os
import subprocess
import sys

import pytest
import torch

from corpora.manifest import read_manifest
from tests.ctc_runs import (
    CONMAMBAMAMBA,
    REPOSITORY,
    TINY_S2S,
    checkpoints,
    command_line,
    metrics,
)
from tests.generated_corpus import make_corpus

UTTERANCES = 8
EPOCHS = 2

DRIVER = f"""
import json, os, sys
sys.path.insert(0, {str(REPOSITORY)!r})
import torch, train_CTC
from tests.ctc_runs import quick_runs
from training import evaluation
from training.launch.command_line import run_script

rank, folder = int(os.environ["RANK"]), sys.argv.pop(1)
ASR = train_CTC.ASR
whole_end, whole_batch_end, whole_objectives = (
    ASR.on_stage_end, ASR.on_fit_batch_end, ASR.compute_objectives
)
whole_update = evaluation.update_results
ids, frames, spliced = {{}}, {{}}, {{}}

def on_fit_batch_end(self, batch, *others):
    ids.setdefault(self.epoch, []).extend(batch.id)
    spliced.setdefault(self.epoch, []).extend(
        said != wrd for said, wrd in zip(batch.said, batch.wrd)
    )
    whole_batch_end(self, batch, *others)

def compute_objectives(self, predictions, batch, stage):
    loss = whole_objectives(self, predictions, batch, stage)
    spoiled = rank == 1 and self.epoch == 1 and self.step == 2 and stage.name == "TRAIN"
    return loss * float("nan") if spoiled else loss

def on_stage_end(self, stage, loss, epoch=None):
    if stage.name == "TRAIN":
        normalize = self.hparams.normalize
        frames[epoch] = normalize.count
        torch.save(
            {{
                "model": self.hparams.model.state_dict(),
                "optimizer": self.optimizer.state_dict()["state"],
                "normalizer": [normalize.count, normalize.glob_mean, normalize.glob_std],
                "steps": self.optimizer_step,
                "ids": ids,
                "frames": frames,
                "spliced": spliced,
                "pieces": [vars(piece) for piece in self.splicing.pieces],
            }},
            f"{{folder}}/rank{{rank}}.pt",
        )
    whole_end(self, stage, loss, epoch)

def update_results(*args, **kwargs):
    with open(f"{{folder}}/writes.txt", "a") as stream:
        print(rank, file=stream)
    whole_update(*args, **kwargs)

ASR.on_fit_batch_end, ASR.compute_objectives = on_fit_batch_end, compute_objectives
ASR.on_stage_end, evaluation.update_results = on_stage_end, update_results
with quick_runs():
    run_script(train_CTC.main)
"""
"""Trains, notes what each process holds, and gives the second process one infinite loss."""


def start_two_processes(code, folder, arguments):
    """Run Python code under torchrun with ``folder`` and ``arguments``; returns its stdout."""
    driver = folder / "driver.py"
    driver.write_text(code, encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.run(
        [*torchrun, str(driver), str(folder), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def notes_of(folder):
    """What each of the two processes wrote down."""
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(output folder, folder of notes, stdout) of a run with two processes."""
    folder = tmp_path_factory.mktemp("two")
    splits = {"train-clean-100": UTTERANCES, "dev-clean": 2, "test-clean": 3, "test-other": 1}
    corpus = make_corpus(folder / "LibriSpeech", splits, num_words=1)
    arguments = command_line(
        corpus,
        folder / "run",
        number_of_epochs=EPOCHS,
        dynamic_batching=False,
        batch_size=1,
        # Old checkpoints are deleted beside another process.
        ckpt_interval_minutes=0,
        ckpt_interval_steps=1,
        avg_checkpoints=1,
        speed_perturb="null",
        spliced_share=1.0,
        splice_from_epoch=EPOCHS,
        splice_min_log_prob=-100,
    )
    stdout = start_two_processes(DRIVER, folder, arguments)
    return folder / "run", folder, stdout


@pytest.fixture(scope="module")
def ranks(finished):
    return notes_of(finished[1])


def test_both_processes_end_with_identical_weights_optimisers_and_statistics(ranks):
    for key in ("model", "optimizer", "normalizer", "steps"):
        torch.testing.assert_close(ranks[0][key], ranks[1][key], rtol=0, atol=0)


def test_the_checkpoint_holds_these_weights(finished, ranks):
    latest = checkpoints(finished[0])[-1]
    torch.testing.assert_close(
        torch.load(latest / "model.ckpt", weights_only=True), ranks[0]["model"], rtol=0, atol=0
    )


def test_every_utterance_is_seen_by_one_process_in_each_epoch(ranks):
    for epoch in range(1, EPOCHS + 1):
        shares = [set(rank["ids"][epoch]) for rank in ranks]
        assert shares[0].isdisjoint(shares[1])
        assert len(shares[0]) == len(shares[1]) == UTTERANCES // 2
    assert ranks[0]["ids"][1] != ranks[0]["ids"][2]


def test_normaliser_statistics_cover_the_data_of_both_processes(finished, ranks):
    rows = read_manifest(finished[0] / "train.csv")
    frames = sum(1 + round(row.duration * 16000) // 160 for row in rows)
    # Later epochs train on spliced utterances of other lengths.
    assert [rank["frames"][1] for rank in ranks] == [frames, frames]


def test_both_processes_splice_from_the_same_pieces(ranks):
    assert ranks[0]["pieces"] == ranks[1]["pieces"]
    assert len(ranks[0]["pieces"]) > UTTERANCES
    for rank in ranks:
        assert not any(rank["spliced"][1])
        assert any(rank["spliced"][EPOCHS])


def test_an_infinite_loss_in_one_process_skips_the_step_in_both(ranks, finished):
    steps = EPOCHS * UTTERANCES // 2
    assert [rank["steps"] for rank in ranks] == [steps - 1, steps - 1]
    assert "Batch: that of another process" in finished[2]


def test_reports_are_written_once_and_cover_all_utterances(finished):
    run, notes, _ = finished
    # Once for each test split, by the main process.
    assert (notes / "writes.txt").read_text(encoding="utf-8").split() == ["0", "0"]
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))["splits"]
    assert {split: entry["utterances"] for split, entry in results.items()} == {
        "test-clean": 3,
        "test-other": 1,
    }
    with open(run / "hyp_test-clean.tsv", encoding="utf-8", newline="") as stream:
        ids = [row["id"] for row in csv.DictReader(stream, delimiter="\t")]
    assert len(ids) == len(set(ids)) == 3


def test_there_is_one_log(finished):
    run, _, stdout = finished
    lines = (run / "train_log.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split(",")[0].split(" -")[0] for line in lines] == [
        "epoch: 1",
        "epoch: 2",
        "split: test-clean",
        "split: test-other",
    ]
    epochs = [entry["epoch"] for entry in metrics(run) if "valid_loss" in entry]
    assert epochs == [1, 2]
    assert (run / "log.txt").read_text(encoding="utf-8").count("Beginning experiment!") == 1
    assert stdout.count("real-time factor") == 1


NOTING_DRIVER = f"""
import importlib, os, sys
sys.path.insert(0, {str(REPOSITORY)!r})
import torch
from training.brains.run_brain import RunBrain
from training.launch.command_line import run_script

rank, folder, script = int(os.environ["RANK"]), sys.argv.pop(1), sys.argv.pop(1)
batch_end, stage_end = RunBrain.on_fit_batch_end, RunBrain.on_stage_end
batches = {{}}

def on_fit_batch_end(self, batch, *others):
    items = batch.id if hasattr(batch, "id") else map(str, batch.tokens_bos.tolist())
    batches.setdefault(self.epoch, []).append(list(items))
    batch_end(self, batch, *others)

def on_stage_end(self, stage, *others):
    if stage.name == "TRAIN":
        weights = self.hparams.model.state_dict()
        torch.save({{"model": weights, "batches": batches}}, f"{{folder}}/rank{{rank}}.pt")
    stage_end(self, stage, *others)

RunBrain.on_fit_batch_end, RunBrain.on_stage_end = on_fit_batch_end, on_stage_end
run_script(importlib.import_module(script).main)
"""
"""Trains by the script that is named, and notes what each process saw and holds."""


def assert_trained_together(folder, items_per_epoch):
    """Both processes hold the same weights, and no item is seen twice or never in an epoch."""
    first, second = notes_of(folder)
    torch.testing.assert_close(first["model"], second["model"], rtol=0, atol=0)
    for epoch in range(1, EPOCHS + 1):
        shares = [rank["batches"][epoch] for rank in (first, second)]
        assert len(shares[0]) == len(shares[1])
        items = [item for share in shares for batch in share for item in batch]
        assert len(items) == len(set(items)) == items_per_epoch


@pytest.mark.slow
def test_a_joint_recogniser_with_dynamic_batches_in_two_processes(tmp_path):
    # They make six batches of one to three; of an odd number, one would be trained on twice.
    splits = {"train-clean-100": UTTERANCES, "dev-clean": 2, "test-clean": 3}
    corpus = make_corpus(tmp_path / "LibriSpeech", splits, num_words=1)
    arguments = command_line(
        corpus,
        tmp_path / "run",
        CONMAMBAMAMBA,
        number_of_epochs=EPOCHS,
        dynamic_batching=True,
        max_batch_length_train=2.5,
        num_bucket=3,
        test_splits="[test-clean]",
        speed_perturb="null",
        **TINY_S2S,
    )
    start_two_processes(NOTING_DRIVER, tmp_path, ["train_S2S", *arguments])
    assert_trained_together(tmp_path, UTTERANCES)
    first, second = notes_of(tmp_path)
    for epoch in range(1, EPOCHS + 1):
        sizes = {len(batch) for rank in (first, second) for batch in rank["batches"][epoch]}
        assert len(sizes) > 1
    assert first["batches"][1] != first["batches"][2]
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert results["splits"]["test-clean"]["utterances"] == 3


@pytest.mark.slow
def test_a_language_model_in_two_processes(tmp_path):
    digits = "ONE TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE ZERO".split()  # noqa: SIM905
    sentences = [f"{first} {second}" for first in digits for second in digits]
    text = tmp_path / "text.txt"
    text.write_text("\n".join(sentences), encoding="utf-8")
    arguments = [
        str(REPOSITORY / "hparams" / "LM" / "transformer_small.yaml"),
        *("--train_text", str(text), "--valid_text", str(text)),
        *("--output_folder", str(tmp_path / "run"), "--number_of_epochs", str(EPOCHS)),
        *("--token_type", "char", "--output_neurons", "24", "--max_batch_tokens", "200"),
        *("--d_model", "16", "--nhead", "2", "--num_layers", "1", "--d_ffn", "32"),
        *("--num_workers", "0", "--device", "cpu", "--precision", "fp32", "--noprogressbar"),
    ]
    start_two_processes(NOTING_DRIVER, tmp_path, ["train_LM", *arguments])
    assert_trained_together(tmp_path, len(sentences))
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert results["splits"]["valid"]["sentences"] == len(sentences)


@pytest.mark.slow
@pytest.mark.parametrize(("utterances", "dynamic"), [(1, True), (1, False), (2, True)])
def test_fewer_utterances_than_processes_or_a_batch_each(tmp_path, utterances, dynamic):
    sizes = {"train-clean-100": utterances, "dev-clean": 1, "test-clean": 1}
    corpus = make_corpus(tmp_path / "corpus", sizes, num_words=1)
    keys = {"max_batch_length_train": 0.1, "dynamic_batching": dynamic, "number_of_epochs": 2}
    arguments = command_line(corpus, tmp_path / "run", test_splits="[test-clean]", **keys)
    code = (
        f"import sys\nsys.path.insert(0, {str(REPOSITORY)!r})\nimport train_CTC\n"
        "from training.launch.command_line import run_script\n"
        "run_script(train_CTC.main, sys.argv[2:])"
    )
    start_two_processes(code, tmp_path, arguments)
    entries = [entry for entry in metrics(tmp_path / "run") if "valid_loss" in entry]
    assert [entry["epoch"] for entry in entries] == [1, 2]
    assert entries[-1]["step"] == 2


LATE_DRIVER = f"""
import os, sys
sys.path.insert(0, {str(REPOSITORY)!r})
import torch, train_CTC
from training.brains.run_brain import RunBrain
from training.launch.command_line import run_script

rank, folder = int(os.environ["RANK"]), sys.argv.pop(1)
init_optimizers, objectives = RunBrain.init_optimizers, train_CTC.ASR.compute_objectives
stage_end, steps = RunBrain.on_stage_end, []

def late(self):
    init_optimizers(self)
    self.reads_late = True

def spoilt(self, predictions, batch, stage):
    loss = objectives(self, predictions, batch, stage)
    return loss * float("nan") if rank == 1 and self.step == 2 and stage.name == "TRAIN" else loss

def on_stage_end(self, stage, *others):
    if stage.name == "TRAIN":
        notes = {{"model": self.hparams.model.state_dict(), "steps": self.optimizer_step}}
        torch.save(notes, f"{{folder}}/rank{{rank}}.pt")
    stage_end(self, stage, *others)

RunBrain.init_optimizers, RunBrain.on_stage_end = late, on_stage_end
train_CTC.ASR.compute_objectives = spoilt
run_script(train_CTC.main)
"""
"""Reads losses late, as on a GPU, and gives the second process one infinite loss."""


@pytest.mark.slow
def test_two_processes_that_read_their_losses_late_leave_out_the_same_step(tmp_path):
    corpus = make_corpus(tmp_path / "LibriSpeech", {"train-clean-100": 8, "dev-clean": 2}, 1)
    arguments = command_line(
        corpus,
        tmp_path / "run",
        number_of_epochs=1,
        dynamic_batching=False,
        batch_size=1,
        log_interval_steps=3,
        test_splits="[]",
    )
    stdout = start_two_processes(LATE_DRIVER, tmp_path, arguments)
    first, second = notes_of(tmp_path)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert all(weight.isfinite().all() for weight in first["model"].values())
    assert first["steps"] == 4
    assert stdout.count("The loss is not finite; step skipped. Batch: that of another process") == 1
