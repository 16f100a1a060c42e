"""A log of metrics that survives being killed and resumed."""

import json
import math

import numpy as np
import pytest
import torch

from training.reporting.metrics_log import MetricsLog


@pytest.fixture
def log(tmp_path):
    return MetricsLog(tmp_path / "run" / "metrics.jsonl")


def test_nothing_logged_yet(log):
    assert log.read() == []
    log.truncate_after(0)
    assert not log.path.exists()


def test_entries_come_back_in_order(log):
    log.append(step=1, epoch=1, train_loss=3.5, lr=1e-3)
    log.append(step=2, epoch=1, valid_loss=2.5, wer=90.0, note="മലയാളം")
    assert log.read() == [
        {"step": 1, "epoch": 1, "train_loss": 3.5, "lr": 1e-3},
        {"step": 2, "epoch": 1, "valid_loss": 2.5, "wer": 90.0, "note": "മലയാളം"},
    ]
    assert MetricsLog(log.path).read() == log.read()


def test_an_entry_is_on_disk_when_append_returns(log):
    log.append(step=1, train_loss=1.0)
    assert json.loads(log.path.read_text(encoding="utf-8")) == {"step": 1, "train_loss": 1.0}


def test_tensors_and_numpy_numbers_become_plain_ones(log):
    log.append(step=np.int64(4), train_loss=torch.tensor(0.5), wer=np.float32(0.25))
    assert log.read() == [{"step": 4, "train_loss": 0.5, "wer": 0.25}]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, torch.tensor(math.nan)])
def test_what_is_not_finite_is_null_so_that_the_file_stays_json(log, value):
    log.append(step=1, train_loss=value)
    assert log.read() == [{"step": 1, "train_loss": None}]
    assert "NaN" not in log.path.read_text(encoding="utf-8")


@pytest.mark.parametrize("length", [1, 30, 5000])
def test_a_line_cut_off_by_a_kill_is_dropped_and_overwritten(log, length):
    log.append(step=1, train_loss=1.0)
    with open(log.path, "a", encoding="utf-8") as file:
        file.write('{"step": 2, "train_loss": 2.0, "note": "'[:length].ljust(length, "x"))
    assert log.read() == [{"step": 1, "train_loss": 1.0}]
    log.append(step=3, train_loss=3.0)
    assert [entry["step"] for entry in log.read()] == [1, 3]
    assert len(log.path.read_text(encoding="utf-8").splitlines()) == 2


def test_a_first_line_cut_off_by_a_kill_leaves_an_empty_log(log):
    log.path.parent.mkdir()
    log.path.write_text('{"step"', encoding="utf-8")
    assert log.read() == []
    log.append(step=1)
    assert log.read() == [{"step": 1}]


def test_damaged_lines_are_left_out_with_a_warning(log, caplog):
    log.append(step=1)
    with open(log.path, "ab") as file:
        file.write(b'\0\0\0\n[1]\n{"no": "step"}\n\xff\xfe\n')
    log.append(step=2)
    assert [entry["step"] for entry in log.read()] == [1, 2]
    assert "4 unreadable lines" in caplog.text


def test_resuming_forgets_what_will_be_logged_again(log):
    for step in (1, 2, 3):
        log.append(step=step, train_loss=float(step))
    log.append(step=3, valid_loss=9.0)
    log.truncate_after(2)
    assert [entry["step"] for entry in log.read()] == [1, 2]
    log.append(step=3, train_loss=3.5)
    assert [entry["step"] for entry in log.read()] == [1, 2, 3]
    assert [path.name for path in log.path.parent.iterdir()] == ["metrics.jsonl"]


def test_truncating_after_the_last_step_changes_nothing(log):
    log.append(step=1)
    before = log.path.read_bytes()
    log.truncate_after(1)
    assert log.path.read_bytes() == before


def test_an_epoch_that_was_not_ended_is_validated_again(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in (1, 2):
        log.append(step=step, epoch=step, train_loss=1.0)
        log.append(step=step, epoch=step, valid_loss=2.0)
    log.truncate_after(2, ended_epochs=1)
    assert [sorted(entry) for entry in log.read()] == [
        ["epoch", "step", "train_loss"],
        ["epoch", "step", "valid_loss"],
        ["epoch", "step", "train_loss"],
    ]
