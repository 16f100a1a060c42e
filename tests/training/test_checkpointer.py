"""Checkpoints: whole or not there, damage noticed, other architectures named."""

import errno
import json
import logging
import math
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from speechbrain.utils.epoch_loop import EpochCounterWithStopper

from common.errors import UserError
from training.checkpoints.checkpointer import (
    RunCheckpointer,
    find_damage,
    load_model_hook,
    mean_weights,
)


class Weights(torch.nn.Module):
    """A model whose checkpoints can be told apart."""

    def __init__(self, width=3, value=0.0):
        super().__init__()
        self.layer = torch.nn.Linear(width, 2)
        torch.nn.init.constant_(self.layer.weight, value)
        torch.nn.init.zeros_(self.layer.bias)

    @property
    def value(self):
        return self.layer.weight[0, 0].item()


@pytest.fixture
def model():
    return Weights()


@pytest.fixture
def checkpointer(tmp_path, model):
    return RunCheckpointer(tmp_path / "save", {"model": model})


def save(checkpointer, value, **meta):
    torch.nn.init.constant_(checkpointer.recoverables["model"].layer.weight, value)
    return checkpointer.save_checkpoint(meta=meta)


def folders(checkpointer):
    return sorted(path.name for path in checkpointer.checkpoints_dir.iterdir())


def test_a_checkpoint_is_found_and_loaded_again(checkpointer, model):
    saved = save(checkpointer, 1.0, WER=30.0)
    assert saved.path.is_dir()
    assert saved.paramfiles["model"].is_file()
    assert find_damage(saved.path) is None
    torch.nn.init.zeros_(model.layer.weight)
    assert checkpointer.recover_if_possible().path == saved.path
    assert model.value == 1.0


def test_the_latest_is_taken(checkpointer, model):
    for value in (1.0, 3.0, 2.0):
        save(checkpointer, value)
    checkpointer.recover_if_possible()
    assert model.value == 2.0


def test_nothing_to_recover_in_a_new_folder(checkpointer):
    assert checkpointer.recover_if_possible() is None


class Stop(Exception):
    """Raised from the middle of a save."""


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt, MemoryError])
def test_an_exception_while_saving_leaves_no_checkpoint(checkpointer, model, monkeypatch, error):
    save(checkpointer, 1.0)
    before = folders(checkpointer)

    def interrupted_save(obj, path):
        path.write_bytes(b"half of")
        raise error

    checkpointer.custom_save_hooks["model"] = interrupted_save
    with pytest.raises(error):
        save(checkpointer, 2.0)
    assert [name for name in folders(checkpointer) if name.startswith("CKPT")] == before
    checkpointer.recover_if_possible()
    assert model.value == 1.0
    checkpointer.remove_unfinished()
    assert folders(checkpointer) == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("moment", ["while writing", "before renaming"])
def test_a_kill_while_saving_leaves_no_checkpoint(checkpointer, model, moment):
    save(checkpointer, 1.0)
    before = folders(checkpointer)
    child = os.fork()
    if child == 0:

        def die(*args):
            os.kill(os.getpid(), signal.SIGKILL)

        if moment == "while writing":
            checkpointer.custom_save_hooks["model"] = die
        else:
            os.replace = die
        save(checkpointer, 2.0)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert [name for name in folders(checkpointer) if name.startswith("CKPT")] == before
    assert len(folders(checkpointer)) == 2
    checkpointer.recover_if_possible()
    assert model.value == 1.0
    checkpointer.remove_unfinished()
    assert folders(checkpointer) == before


@pytest.mark.skipif(sys.platform == "win32", reason="needs file size limits")
@pytest.mark.parametrize("limit_bytes", [0, 200, 4096])
def test_a_full_disk_is_one_message_and_the_previous_checkpoint_survives(tmp_path, limit_bytes):
    model = Weights(width=2000)
    checkpointer = RunCheckpointer(tmp_path / "save", {"model": model})
    save(checkpointer, 1.0)
    before = folders(checkpointer)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        with pytest.raises(UserError, match="Earlier checkpoints are whole"):
            save(checkpointer, 2.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert folders(checkpointer) == before
    checkpointer.recover_if_possible()
    assert model.value == 1.0
    save(checkpointer, 3.0)
    checkpointer.recover_if_possible()
    assert model.value == 3.0


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EROFS, "Read-only file system"),
        RuntimeError("[enforce fail at inline_container.cc] PytorchStreamWriter failed writing"),
    ],
)
def test_a_disk_that_cannot_be_written_is_named(checkpointer, error):
    def no_space(obj, path):
        raise error

    checkpointer.custom_save_hooks["model"] = no_space
    with pytest.raises(UserError, match="No checkpoint could be written to"):
        save(checkpointer, 1.0)
    assert folders(checkpointer) == []


def test_another_failure_keeps_its_type(checkpointer):
    def broken(obj, path):
        raise RuntimeError("a fault of the code")

    checkpointer.custom_save_hooks["model"] = broken
    with pytest.raises(RuntimeError, match="a fault of the code"):
        save(checkpointer, 1.0)


def cut_short(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [cut_short, flip_a_bit, os.remove])
@pytest.mark.parametrize("name", ["model.ckpt", "CKPT.yaml", "checksums.json"])
def test_a_damaged_checkpoint_is_reported_and_the_previous_used(
    checkpointer, model, caplog, harm, name
):
    first, latest = save(checkpointer, 1.0), save(checkpointer, 2.0)
    harm(latest.path / name)
    with caplog.at_level(logging.WARNING):
        assert checkpointer.recover_if_possible().path == first.path
    assert model.value == 1.0
    # Without its meta file a folder is no checkpoint: that is how SpeechBrain recognises them.
    if (latest.path / "CKPT.yaml").exists():
        assert "is damaged" in caplog.text
        assert latest.path.name in caplog.text


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[1, 2]", b'"text"', b"{"])
def test_a_meta_file_with_any_content_does_not_stop_the_search(checkpointer, model, content):
    save(checkpointer, 1.0)
    latest = save(checkpointer, 2.0)
    (latest.path / "CKPT.yaml").write_bytes(content)
    checkpointer.recover_if_possible()
    assert model.value == 1.0
    checkpointer.keep_best(1)


@pytest.mark.parametrize("content", ["", "[]", '{"model.ckpt": 3}', "{", '{"model.ckpt": [1]}'])
def test_checksums_with_any_content_count_as_damage(checkpointer, content):
    saved = save(checkpointer, 1.0)
    (saved.path / "checksums.json").write_text(content, encoding="utf-8")
    assert find_damage(saved.path) == "checksums.json cannot be read"


def test_a_file_that_nothing_wrote_does_no_harm(checkpointer):
    saved = save(checkpointer, 1.0)
    (saved.path / "notes.txt").write_text("mine", encoding="utf-8")
    assert find_damage(saved.path) is None


@pytest.mark.parametrize("name", ["model.ckpt", "CKPT.yaml"])
def test_when_every_checkpoint_is_damaged_training_does_not_start_anew(checkpointer, name):
    for value in (1.0, 2.0):
        cut_short(save(checkpointer, value).path / name)
    for folder in checkpointer.checkpoints_dir.iterdir():
        if name == "CKPT.yaml":
            (folder / name).write_text("", encoding="utf-8")
    for _ in range(2):
        with pytest.raises(UserError, match="is damaged"):
            checkpointer.recover_if_possible()


def test_a_damaged_checkpoint_is_kept_under_a_name_that_is_not_found(checkpointer):
    save(checkpointer, 1.0, WER=30.0)
    flip_a_bit(save(checkpointer, 2.0, WER=10.0).path / "model.ckpt")
    checkpointer.recover_if_possible()
    for wer in (40.0, 50.0):
        save(checkpointer, wer, WER=wer)
    checkpointer.keep_best(1, min_key="WER")
    kept = {checkpoint.meta["WER"] for checkpoint in checkpointer.list_checkpoints()}
    assert kept == {30.0, 40.0, 50.0}
    assert len([name for name in folders(checkpointer) if name.startswith("damaged+")]) == 1


def test_a_folder_that_cannot_be_written_can_be_recovered_from(checkpointer, model, monkeypatch):
    save(checkpointer, 1.0)
    flip_a_bit(save(checkpointer, 2.0).path / "model.ckpt")

    def read_only(*paths):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "replace", read_only)
    checkpointer.recover_if_possible()
    assert model.value == 1.0


def test_best_checkpoints_skip_the_damaged_ones(checkpointer):
    saved = {wer: save(checkpointer, wer, WER=wer) for wer in (30.0, 10.0, 20.0, 40.0)}
    flip_a_bit(saved[10.0].path / "model.ckpt")
    found = checkpointer.find_intact(min_key="WER", max_num_checkpoints=2)
    assert [checkpoint.meta["WER"] for checkpoint in found] == [20.0, 30.0]


def test_the_best_and_the_two_latest_are_kept(checkpointer):
    for wer in (30.0, 10.0, 20.0, 40.0, 50.0, 60.0):
        save(checkpointer, wer, WER=wer)
    save(checkpointer, 0.0)
    checkpointer.keep_best(2, min_key="WER")
    kept = {checkpoint.meta.get("WER") for checkpoint in checkpointer.list_checkpoints()}
    assert kept == {10.0, 20.0, 60.0, None}
    checkpointer.keep_best(1, max_key="WER")
    kept = {checkpoint.meta.get("WER") for checkpoint in checkpointer.list_checkpoints()}
    assert kept == {60.0, None}


def test_a_metric_that_is_no_number_ranks_nowhere(checkpointer):
    for wer in (30.0, 10.0, math.nan, 20.0, math.inf, 40.0, math.nan):
        save(checkpointer, wer, WER=wer)
    for best, kept in (
        ({"min_key": "WER"}, {10.0, 20.0, 40.0}),
        ({"max_key": "WER"}, {20.0, 40.0}),
    ):
        checkpointer.keep_best(2, **best)
        left = [checkpoint.meta["WER"] for checkpoint in checkpointer.list_checkpoints()]
        # The two latest stay for going on.
        assert sorted(map(str, left)) == sorted(map(str, kept | {math.nan}))
    found = checkpointer.find_intact(min_key="WER")
    assert [checkpoint.meta["WER"] for checkpoint in found] == [20.0, 40.0]
    assert math.isnan(checkpointer.recover_if_possible().meta["WER"])


def test_one_process_alone_deletes(checkpointer, monkeypatch):
    for wer in (30.0, 10.0, 20.0, 40.0):
        save(checkpointer, wer, WER=wer)
    with monkeypatch.context() as other:
        other.setattr("training.checkpoints.checkpointer.if_main_process", lambda: False)
        checkpointer.keep_best(1, min_key="WER")
    assert len(checkpointer.list_checkpoints()) == 4
    checkpointer.keep_best(1, min_key="WER")
    assert len(checkpointer.list_checkpoints()) == 3


def test_a_given_checkpoint_can_be_taken(checkpointer, model):
    first = save(checkpointer, 1.0)
    save(checkpointer, 2.0)
    checkpointer.go_back_to(str(first.path))
    assert model.value == 1.0


def test_going_back_leaves_later_checkpoints_out(checkpointer):
    first = save(checkpointer, 1.0, WER=30.0)
    save(checkpointer, 2.0, WER=10.0)
    checkpointer.go_back_to(str(first.path))
    again = save(checkpointer, 3.0, WER=20.0)
    found = checkpointer.find_intact(min_key="WER")
    assert [checkpoint.path for checkpoint in found] == [again.path, first.path]
    assert len([name for name in folders(checkpointer) if name.startswith("superseded+")]) == 1


def test_going_on_from_another_run_leaves_all_of_this_one_out(checkpointer, model, tmp_path):
    save(checkpointer, 1.0, WER=10.0)
    other = RunCheckpointer(tmp_path / "other", {"model": Weights(value=2.0)})
    other.save_checkpoint(meta={"WER": 30.0})
    checkpointer.go_back_to(str(tmp_path / "other"))
    assert model.value == 2.0
    assert checkpointer.list_checkpoints() == []
    assert len(other.list_checkpoints()) == 1


@pytest.mark.parametrize("where", ["elsewhere", ".", "CKPT+empty"])
def test_a_folder_that_is_no_checkpoint_is_refused(checkpointer, tmp_path, where):
    (tmp_path / "CKPT+empty").mkdir()
    with pytest.raises(UserError, match="is no checkpoint folder"):
        checkpointer.checkpoint_at(str(tmp_path / where))


@pytest.mark.parametrize("name", ["model.ckpt", "CKPT.yaml"])
def test_a_given_checkpoint_that_is_damaged_is_refused(checkpointer, name):
    saved = save(checkpointer, 1.0)
    cut_short(saved.path / name)
    with pytest.raises(UserError, match=r"--resume: .* is damaged"):
        checkpointer.checkpoint_at(str(saved.path))


def test_another_architecture_names_the_first_parameters_that_differ(checkpointer):
    saved = save(checkpointer, 1.0)
    wider = Weights(width=5)
    with pytest.raises(UserError, match=r"layer\.weight: \(2, 3\) in the checkpoint, \(2, 5\) in"):
        load_model_hook(wider, saved.paramfiles["model"], True)
    assert (wider.layer.weight == 0).all()


def test_checksums_cover_every_file(checkpointer):
    saved = save(checkpointer, 1.0)
    recorded = json.loads((saved.path / "checksums.json").read_text(encoding="utf-8"))
    assert recorded.keys() == {p.name for p in saved.path.iterdir()} - {"checksums.json"}


def test_an_early_stop_and_the_best_score_are_in_a_checkpoint(tmp_path):
    counter = EpochCounterWithStopper(limit=9, limit_to_stop=2, limit_warmup=0, direction="min")
    for score in (5.0, 4.0, 6.0, 7.0):
        next(counter)
        counter.update_metric(score)
    RunCheckpointer(tmp_path, {"counter": counter}).save_checkpoint()
    restored = EpochCounterWithStopper(limit=9, limit_to_stop=2, limit_warmup=0, direction="min")
    RunCheckpointer(tmp_path, {"counter": restored}).recover_if_possible()
    assert vars(restored) == vars(counter)
    assert list(restored) == []


def test_a_save_folder_a_run_and_a_pattern_stand_for_their_newest_whole_checkpoint(
    checkpointer, tmp_path
):
    first, second = save(checkpointer, 1.0), save(checkpointer, 2.0)
    saves = Path(checkpointer.checkpoints_dir)
    run = tmp_path / "run"
    run.mkdir()
    (run / "save").symlink_to(saves)
    for place in (saves, run, f"{saves}/CKPT*", f"{tmp_path}/*un", second.path):
        assert checkpointer.checkpoint_at(str(place)).path.name == second.path.name
    cut_short(second.path / "model.ckpt")
    for place in (saves, run, f"{saves}/CKPT*", first.path):
        assert checkpointer.checkpoint_at(str(place)).path.name == first.path.name
    cut_short(first.path / "model.ckpt")
    with pytest.raises(UserError, match=r"model.ckpt has .*; .*model.ckpt has"):
        checkpointer.checkpoint_at(str(run))


def test_who_only_reads_leaves_damaged_checkpoints_where_they_are(checkpointer):
    for value in (1.0, 2.0):
        save(checkpointer, value, WER=10 * value)
    best = checkpointer.find_intact(min_key="WER", max_num_checkpoints=1)[0]
    os.truncate(best.paramfiles["model"], 10)
    before = folders(checkpointer)
    checkpointer.only_reads = True
    (found,) = checkpointer.find_intact(min_key="WER", max_num_checkpoints=1)
    assert found.meta["WER"] == 20.0
    assert folders(checkpointer) == before


def test_a_checkpoint_that_is_deleted_is_whole_or_gone_to_others(checkpointer, monkeypatch):
    for value in (1.0, 2.0, 3.0, 4.0):
        save(checkpointer, value, WER=value)
    seen = []
    rmtree = shutil.rmtree

    def removal(path, **options):
        seen.append(len(checkpointer.list_checkpoints()))
        rmtree(path, **options)

    monkeypatch.setattr("training.checkpoints.checkpointer.shutil.rmtree", removal)
    checkpointer.keep_best(1, min_key="WER")
    # The two latest and the best stay; the fourth was gone before its files were.
    assert seen == [3]
    assert len(folders(checkpointer)) == 3


def test_the_folder_is_made_with_the_first_checkpoint(tmp_path):
    save = tmp_path / "run" / "save"
    checkpointer = RunCheckpointer(save, {"model": torch.nn.Linear(1, 1)})
    assert checkpointer.list_checkpoints() == []
    assert checkpointer.recover_if_possible() is None
    checkpointer.check_architecture()
    checkpointer.keep_best(1)
    assert list(tmp_path.iterdir()) == []
    checkpointer.save_checkpoint()
    assert len(checkpointer.list_checkpoints()) == len(list(save.iterdir())) == 1


def test_the_best_that_a_training_beside_replaces_are_looked_for_again(checkpointer):
    for value in (1.0, 2.0):
        save(checkpointer, value, WER=30.0)
    replaced = []

    def read(best):
        if len(replaced) < 2:
            replaced.append(best[-1].path)
            save(checkpointer, 3.0 + len(replaced), WER=30.0 - len(replaced))
            shutil.rmtree(best[-1].path)
        return mean_weights(best)["layer.weight"][0, 0].item()

    # Two attempts lose a checkpoint each, and the new ones are better.
    assert checkpointer.of_best(read, 2, min_key="WER") == 4.5
    assert len(replaced) == 2


def test_what_is_wrong_with_the_best_themselves_is_said_at_once(checkpointer):
    assert checkpointer.of_best(mean_weights, 2, min_key="WER") is None
    save(checkpointer, 1.0, WER=30.0)
    calls = []

    def read(best):
        calls.append(best)
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        checkpointer.of_best(read, 2, min_key="WER")
    assert len(calls) == 1
    checkpointer.recoverables["model"] = Weights(width=5)
    with pytest.raises(UserError, match="another architecture"):
        checkpointer.of_best(mean_weights, 2, min_key="WER")
