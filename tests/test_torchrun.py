"""Two processes on the CPU train one model, see all the data, and write every report once."""

import csv
import json
import os
import subprocess
import sys

import pytest
import torch

from corpora.manifest import read_manifest
from tests.ctc_runs import REPOSITORY, checkpoints, command_line, metrics
from tests.generated_corpus import make_corpus

UTTERANCES = 8
EPOCHS = 2

DRIVER = f"""
import json, os, sys
sys.path.insert(0, {str(REPOSITORY)!r})
import torch, train_CTC
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
run_script(train_CTC.main)
"""
"""Trains, notes what each process holds, and gives the second process one infinite loss."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(output folder, folder of notes, stdout) of a run with two processes."""
    folder = tmp_path_factory.mktemp("two")
    splits = {"train-clean-100": UTTERANCES, "dev-clean": 2, "test-clean": 3, "test-other": 1}
    corpus = make_corpus(folder / "LibriSpeech", splits, num_words=1)
    driver = folder / "driver.py"
    driver.write_text(DRIVER, encoding="utf-8")
    arguments = command_line(
        corpus,
        folder / "run",
        number_of_epochs=EPOCHS,
        dynamic_batching=False,
        batch_size=1,
        speed_perturb="null",
        spliced_share=1.0,
        splice_from_epoch=EPOCHS,
        splice_min_log_prob=-100,
    )
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
    return folder / "run", folder, process.stdout


@pytest.fixture(scope="module")
def ranks(finished):
    return [torch.load(finished[1] / f"rank{rank}.pt") for rank in range(2)]


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
