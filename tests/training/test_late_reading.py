"""A run whose losses are read every few steps is the run whose losses are read at once."""

import json

import pytest
import torch

from tests.ctc_runs import assert_same_end, command_line, metrics, train
from training.brains.asr_brain import ASRBrain
from training.brains.run_brain import RunBrain


@pytest.fixture
def late(monkeypatch):
    """What a GPU does, on the CPU, whose fused optimiser can leave out a step, too."""
    init_optimizers = RunBrain.init_optimizers

    def init(brain):
        init_optimizers(brain)
        brain.reads_late = True

    monkeypatch.setattr(RunBrain, "init_optimizers", init)


KEYS = {
    "number_of_epochs": 2,
    "max_batch_length_train": 3,
    "log_interval_steps": 3,
    "grad_accumulation_factor": 2,
    "test_splits": "[test-clean]",
}


def test_the_same_run(late, tone_corpus, tmp_path, monkeypatch, one_thread):
    assert train(command_line(tone_corpus, tmp_path / "late", **KEYS)) == 0
    monkeypatch.undo()
    assert train(command_line(tone_corpus, tmp_path / "at_once", **KEYS)) == 0
    assert_same_end(tmp_path / "late", tmp_path / "at_once")


def test_a_loss_that_is_not_finite_is_left_out_on_the_device_and_named_later(
    late, tone_corpus, tmp_path, monkeypatch, capsys, one_thread
):
    objectives, weights, ids = ASRBrain.ctc_objective, [], []
    end_of_batch = RunBrain.on_fit_batch_end

    def spoilt(brain, log_probs, front_end, batch, stage):
        loss = objectives(brain, log_probs, front_end, batch, stage)
        if brain.modules.training and brain.step == 2:
            ids.extend(batch.id)
            return loss + torch.inf
        return loss

    def note(brain, *arguments):
        end_of_batch(brain, *arguments)
        weights.append(torch.cat([p.detach().flatten() for p in brain.hparams.model.parameters()]))

    monkeypatch.setattr(ASRBrain, "ctc_objective", spoilt)
    monkeypatch.setattr(RunBrain, "on_fit_batch_end", note)
    keys = KEYS | {"number_of_epochs": 1, "grad_accumulation_factor": 1, "test_splits": "[]"}
    assert train(command_line(tone_corpus, tmp_path, **keys)) == 0
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])
    assert weights[-1].isfinite().all()
    (warning,) = [text for text in capsys.readouterr().out.splitlines() if "not finite" in text]
    assert all(name in warning for name in ids)
    losses = [entry["train_loss"] for entry in metrics(tmp_path) if "train_loss" in entry]
    assert all(loss is not None for loss in losses)


def test_a_window_with_such_a_loss_counts_once(
    late, tone_corpus, tmp_path, monkeypatch, capsys, one_thread
):
    objectives = ASRBrain.ctc_objective

    def spoilt(brain, log_probs, front_end, batch, stage):
        loss = objectives(brain, log_probs, front_end, batch, stage)
        # The first of two batches, whose gradients are summed.
        return loss * torch.nan if brain.modules.training and brain.step in (1, 3) else loss

    monkeypatch.setattr(ASRBrain, "ctc_objective", spoilt)
    keys = KEYS | {"number_of_epochs": 1, "nonfinite_patience": 2, "test_splits": "[]"}
    assert train(command_line(tone_corpus, tmp_path, **keys)) == 0
    told = [text for text in capsys.readouterr().out.splitlines() if "not finite" in text]
    assert len(told) == 2
    assert all("The loss is not finite" in text for text in told)


def test_too_many_of_them_end_the_run(late, tone_corpus, tmp_path, monkeypatch, capsys, one_thread):
    objectives = ASRBrain.ctc_objective
    monkeypatch.setattr(ASRBrain, "ctc_objective", lambda *a: objectives(*a) * torch.nan)
    keys = KEYS | {"nonfinite_patience": 2, "test_splits": "[]"}
    assert train(command_line(tone_corpus, tmp_path, **keys)) == 2
    assert "loss was not finite 3 times in epoch 1" in capsys.readouterr().err


def test_a_line_of_the_log_says_where_the_time_went(tone_corpus, tmp_path, one_thread):
    keys = KEYS | {"number_of_epochs": 1, "test_splits": "[]"}
    assert train(command_line(tone_corpus, tmp_path, **keys)) == 0
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    step, *_, validation = map(json.loads, lines)
    assert step["grad_norm"] > 0
    parts = [step[f"{part}_s"] for part in ("data", "forward", "backward", "optimizer")]
    assert all(seconds > 0 for seconds in parts)
    assert validation["search_s"] >= 0
