"""A run's folder holds one model, trained on one thing by one run at a time."""

import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import EXIT_USER_ERROR, UserError
from inference import Recognizer
from inference.scoring.reports import SplitScore, record_evaluation
from tests.ctc_runs import REPOSITORY, command_line, train
from tests.generated_corpus import make_corpus

HOLD = """
import sys, time
from training.launch.run_lock import sole_run
with sole_run(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def copy(tiny_run, tmp_path):
    return shutil.copytree(tiny_run, tmp_path / "copy")


def files_of(folder):
    """Contents of all files but the log."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("log.txt", "env.log", ".run.lock", "start.py")
    }


def as_trained(corpus, folder, **keys):
    return command_line(corpus, folder, **({"number_of_epochs": 1, "lr_adam": 1e-6} | keys))


def test_another_corpus_is_refused_in_the_folder_of_a_run(copy, tmp_path, capsys):
    splits = {"train-clean-100": 4, "dev-clean": 2, "test-clean": 1, "test-other": 1}
    other = make_corpus(tmp_path / "other", splits, num_words=1)
    before = files_of(copy)
    assert train(as_trained(other, copy, number_of_epochs=9)) == EXIT_USER_ERROR
    message = capsys.readouterr().err.split("error: ")[1]
    assert message.count("\n") == 1
    assert "10 utterances" in message
    assert f"{other}, train-clean-100, 4 utterances" in message
    assert "another --output_folder" in message
    assert files_of(copy) == before


def test_a_corpus_that_was_moved_is_the_same(copy, tone_corpus, tmp_path):
    moved = shutil.copytree(tone_corpus, tmp_path / "moved", copy_function=shutil.copyfile)
    assert train(as_trained(moved, copy)) == 0
    fingerprint = json.loads((copy / "fingerprint.json").read_text(encoding="utf-8"))
    assert fingerprint["training data"]["corpus"] == str(moved)
    assert {"tokenizer", "hyperparameters", "test split test-clean"} <= fingerprint.keys()


def test_a_run_in_training_is_a_recogniser_once_it_is_scored(copy, tone_corpus):
    shutil.rmtree(copy / "save" / "averaged")
    shutil.rmtree(copy / "bundle")
    (copy / "results.json").unlink()
    with pytest.raises(UserError, match=re.escape(f"train_CTC.py {copy} --test_only")):
        Recognizer.from_run(copy)
    assert train([str(copy), "--test_only", "--device=cpu", "--noprogressbar"]) == 0
    Recognizer.from_run(copy)


def test_other_validation_data_are_said(copy, tone_corpus):
    keys = {"dev_splits": "[test-clean]", "test_splits": "[test-other]"}
    assert train(as_trained(tone_corpus, copy, **keys)) == 0
    log = (copy / "log.txt").read_text(encoding="utf-8")
    assert re.search(r"were validated on dev-clean \(.*will be on test-clean \(", log)


def test_another_tokenizer_in_its_place_is_refused(copy, tone_corpus, capsys):
    tokenizer = copy / "save" / "tokenizer.model"
    tokenizer.write_bytes(tokenizer.read_bytes() + b"\n")
    assert train(as_trained(tone_corpus, copy)) == EXIT_USER_ERROR
    assert "a run with the tokenizer" in capsys.readouterr().err


def test_a_finished_run_is_not_scored_as_one_of_another_seed(copy, tone_corpus, capsys):
    before = files_of(copy)
    seed = json.loads((copy / "results.json").read_text(encoding="utf-8"))["run"]["seed"]
    assert train(as_trained(tone_corpus, copy, seed=seed + 1)) == EXIT_USER_ERROR
    assert f"a finished run of seed {seed}; now it is {seed + 1}" in capsys.readouterr().err
    assert files_of(copy) == before
    assert train(as_trained(tone_corpus, copy, seed=seed)) == 0


def test_a_second_run_in_a_folder_is_refused_until_the_first_has_died(copy, tone_corpus, capsys):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(copy)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        before = files_of(copy)
        assert train(as_trained(tone_corpus, copy)) == EXIT_USER_ERROR
        message = capsys.readouterr().err
        assert re.search(rf"Another run trains in .*: process {holder.pid} on \S+, since", message)
        assert files_of(copy) == before
        evaluation = as_trained(tone_corpus, copy, test_splits="[test-other]")
        assert train([*evaluation, "--test_only", "--eval_name", "beside"]) == 0
    finally:
        holder.kill()
        holder.wait()
    assert train(as_trained(tone_corpus, copy)) == 0


def _record(folder, process):
    score = SplitScore(1.0, 1.0, 0, 0, 1, 100, 10, 1.0, 1.0)
    for i in range(10):
        record_evaluation(folder, f"{process}-{i}", {"a": score}, {}, {})


def test_evaluations_at_the_same_time_lose_nothing(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_record, args=(tmp_path, i)) for i in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert len(results["evaluations"]) == 40
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_ids_that_two_dev_splits_share_are_named(tone_corpus, tmp_path, capsys):
    corpus = shutil.copytree(tone_corpus, tmp_path / "corpus")
    shutil.copytree(corpus / "dev-clean", corpus / "dev-more")
    folder = tmp_path / "run"
    assert train(as_trained(corpus, folder, dev_splits="[dev-clean, dev-more]")) == EXIT_USER_ERROR
    message = capsys.readouterr().err
    assert "3 utterance ids come more than once" in message
    assert re.search(r"\d+-1-0000 in dev-clean and dev-more", message)


def test_an_id_that_a_manifest_made_by_hand_has_twice_is_named(copy, tone_corpus, capsys):
    manifest = copy / "train.csv"
    lines = manifest.read_text(encoding="utf-8").splitlines()
    manifest.write_text("\n".join([*lines, lines[1]]) + "\n", encoding="utf-8")
    assert train(as_trained(tone_corpus, copy, skip_prep=True)) == EXIT_USER_ERROR
    message = capsys.readouterr().err
    assert f"{lines[1].split(',')[0]} in train.csv and train.csv" in message


@pytest.mark.parametrize("by_permission", [False, True])
def test_a_run_that_may_only_be_read_is_evaluated_beside(
    copy, tone_corpus, tmp_path, monkeypatch, by_permission
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    if by_permission and os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    for path in (copy, *copy.rglob("*")) if by_permission else ():
        path.chmod(0o555 if path.is_dir() else 0o444)
    if not by_permission:
        access = os.access
        monkeypatch.setattr(
            os, "access", lambda path, mode: Path(path) != copy and access(path, mode)
        )
    before = files_of(copy)
    arguments = as_trained(tone_corpus, copy, test_splits="[test-other]", test_beam_size=3)
    assert train([*arguments, "--test_only"]) == 0
    assert files_of(copy) == before
    place = tmp_path / "here" / "evaluation_of_copy"
    (name,) = json.loads((place / "results.json").read_text(encoding="utf-8"))["evaluations"]
    assert (place / "eval" / name / "wer_test-other.txt").is_file()
    assert (place / "log.txt").is_file()
