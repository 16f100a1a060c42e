"""What train_CTC.py does beyond training: evaluation, mistakes, loggers, odd data, Python use."""

import csv
import json
import math
import os
import re
import shutil

import numpy as np
import pytest
import soundfile
import speechbrain as sb
import torch

import train_CTC
from common.errors import EXIT_USER_ERROR
from corpora.manifest import read_manifest
from tests.ctc_runs import (
    CONMAMBA,
    REPOSITORY,
    assert_same_end,
    checkpoints,
    command_line,
    metrics,
    train,
    untouched_process,
    weights_of,
)
from tests.generated_corpus import make_corpus
from text.tokenizer import load_tokenizer, tokens_of, vocabulary
from tools.make_ngram import main as make_ngram
from training.brains import asr_brain as brain_module
from training.launch.command_line import help_text, load_hparams, parse_command_line
from training.launch.start import run_options
from training.splicing.segments import read_segments

ONE_BATCH = {"max_batch_length_train": 1000, "num_bucket": 10}
"""Puts the training set into a batch or two, for tests that need no more steps."""


@pytest.fixture(scope="module")
def run(tone_corpus, tmp_path_factory):
    """Folder of a finished run that has not learnt to be silent yet; read only."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert train(command_line(tone_corpus, folder, lr_adam=1e-4), curves=True) == 0
    return folder


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "elsewhere" / "copy")


def results_of(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def texts_of(folder, split):
    with open(folder / f"hyp_{split}.tsv", encoding="utf-8", newline="") as stream:
        return {row["id"]: row["hypothesis"] for row in csv.DictReader(stream, delimiter="\t")}


def test_a_run_leaves_the_files_that_the_design_names(run):
    reports = [f"{kind}_{split}" for kind in ("wer", "cer", "errors") for split in ("test-clean",)]
    names = ["hyperparams.yaml", "train_log.txt", "results.json", "curves.png", "save/averaged"]
    names += ["save/tokenizer.model", "hyp_test-clean.tsv", "hyp_test-other.tsv"]
    assert [name for name in names if not (run / name).exists()] == []
    assert [name for name in reports if not (run / f"{name}.txt").is_file()] == []
    for split in ("test-clean", "test-other"):
        assert (run / f"wer_{split}.txt").read_text(encoding="utf-8").startswith("%WER ")
    assert (run / "skipped.csv").read_text(encoding="utf-8").splitlines() == ["id,reason"]


def test_results_say_what_was_run(run, tone_corpus):
    results = results_of(run)
    assert results["splits"].keys() == {"test-clean", "test-other"}
    clean = results["splits"]["test-clean"]
    assert clean["utterances"] == 3
    assert clean["words"] == 2 + 3 + 4
    assert clean["audio_s"] > 1
    weights = torch.load(run / "save" / "averaged" / "model.ckpt", weights_only=True)
    names = [name for name in weights if "positional" not in name]
    assert results["model"]["parameters"] == sum(weights[name].numel() for name in names)
    assert results["run"]["precision"] == "fp32"
    assert results["run"]["device"] == "cpu"
    assert str(tone_corpus) in str(results["run"]["command"])


def test_manifests_can_be_moved_with_their_corpus(run):
    assert all(row.wav.startswith("$data_root/") for row in read_manifest(run / "train.csv"))


def evaluate(corpus, folder, *more, **keys):
    """The run evaluated with these keys: (names of its evaluations, results.json)."""
    flags = ["--test_only", *more]
    assert train(command_line(corpus, folder, flags=flags, **keys)) == 0
    results = results_of(folder)
    return list(results["evaluations"]), results


def test_test_only_needs_nothing_but_the_split_and_the_run(copy, tmp_path):
    other = make_corpus(tmp_path / "other", {"test-clean": 2}, num_words=1)
    for checkpoint in checkpoints(copy):
        shutil.rmtree(checkpoint)
    for manifest in copy.glob("*.csv"):
        manifest.unlink()
    before = {path.name: path.read_bytes() for path in copy.glob("*_test-*")}
    splits, hyperparams = results_of(copy)["splits"], (copy / "hyperparams.yaml").read_bytes()
    (name,), results = evaluate(other, copy, test_splits="[test-clean]")
    # Another corpus whose split has the same name is another evaluation.
    scored = results["evaluations"][name]["splits"]["test-clean"]
    assert (scored["utterances"], scored["words"]) == (2, 3)
    assert results["splits"] == splits
    assert {path.name: path.read_bytes() for path in copy.glob("*_test-*")} == before
    assert (copy / "hyperparams.yaml").read_bytes() == hyperparams
    assert not list(copy.glob("*.csv"))
    assert not list(copy.glob(".manifests*"))


def test_texts_do_not_depend_on_the_batch(copy, run, tone_corpus):
    for seconds in (0.1, 100):
        arguments = command_line(
            tone_corpus,
            copy,
            flags=["--test_only"],
            max_batch_length_val=seconds,
            max_batch_ex=16,
            num_bucket=40,
        )
        assert train(arguments) == 0
        for split in ("test-clean", "test-other"):
            assert texts_of(copy, split) == texts_of(run, split)
    assert any(texts_of(copy, "test-clean").values())


def test_a_run_can_be_evaluated_from_python(run, tone_corpus):
    with untouched_process():
        hparams = load_hparams(str(run / "hyperparams.yaml"), {})
        loaders = train_CTC.dataio_prepare(hparams, test_only=True)
        hparams["tokenizer"] = loaders.tokenizer
        options = run_options(parse_command_line(["-"], ""), hparams)
        brain = train_CTC.ASR(hparams["modules"], None, hparams, options, hparams["checkpointer"])
        brain.checkpointer.recover_if_possible(min_key="WER")
        batch = next(iter(brain.make_dataloader(loaders.tests["test-clean"], sb.Stage.VALID)))
        brain.modules.eval()
        with torch.no_grad():
            outputs = brain.compute_forward(batch, sb.Stage.VALID)
            texts = brain.decode(outputs, batch, sb.Stage.VALID)
    assert len(texts) == len(batch.id)
    assert outputs.ctc_log_probs[0].isfinite().all()


@pytest.mark.parametrize("place", ["save/averaged/model.ckpt", "bundle"])
def test_training_starts_from_given_weights(run, tone_corpus, tmp_path, place):
    source = run / "save" / "averaged" / "model.ckpt"
    folder = tmp_path / "started"
    arguments = command_line(
        tone_corpus, folder, lr_adam=0.0, number_of_epochs=1, test_splits="[]", **ONE_BATCH
    )
    given = shutil.copytree(run / place, tmp_path / "my") if place == "bundle" else run / place
    assert train([*arguments, "--init_from", str(given)]) == 0
    tokens = [(of / "save" / "tokenizer.model").read_bytes() for of in (run, folder)]
    assert tokens[0] == tokens[1]
    torch.testing.assert_close(
        weights_of(checkpoints(folder)[-1])["model"],
        torch.load(source, weights_only=True),
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("place", ["save/averaged/model.ckpt", "bundle"])
def test_first_weights_bring_their_tokens_along(run, tmp_path, capsys, place):
    # Characters of another corpus would be numbered by their frequencies there.
    corpus = make_corpus(tmp_path / "corpus", {"train-clean-100": 4, "dev-clean": 1}, num_words=5)
    first = ["--init_from", str(run / place)]
    folder, keys = tmp_path / "started", {"test_splits": "[]", **ONE_BATCH}
    assert train([*command_line(corpus, folder, number_of_epochs=1, **keys), *first]) == 0
    assert train(command_line(corpus, folder, number_of_epochs=2, **keys)) == 0
    tokens = (run / "save" / "tokenizer.model").read_bytes()
    assert (folder / "save" / "tokenizer.model").read_bytes() == tokens
    other = command_line(corpus, tmp_path / "other", token_type="bpe", **keys)
    assert train([*other, *first]) == EXIT_USER_ERROR
    assert "Give --token_type char" in capsys.readouterr().err


def test_another_front_end_may_leave_fewer_frames(tone_corpus, tmp_path):
    text = CONMAMBA.read_text()
    for old, new in (
        ("num_blocks: 2", "num_blocks: 3"),
        ("out_channels: [64, 32]", "out_channels: [8, 8, 8]"),
        ("kernel_sizes: [3, 3]", "kernel_sizes: [3, 3, 3]"),
        ("strides: [2, 2]", "strides: [2, 2, 2]"),
        ("residuals: [False, False]", "residuals: [False, False, False]"),
        ("input_size: 640", "input_size: 80"),
    ):
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "eighth.yaml").write_text(text)
    folder = tmp_path / "run"
    arguments = command_line(
        tone_corpus, folder, tmp_path / "eighth.yaml", number_of_epochs=1, **ONE_BATCH
    )
    assert train(arguments) == 0
    assert math.isfinite(metrics(folder)[-1]["valid_loss"])


def test_spliced_training_says_other_sentences_than_the_manifest(
    tone_corpus, tmp_path, monkeypatch
):
    seen = {}
    objectives = train_CTC.ASR.compute_objectives

    def compute_objectives(self, predictions, batch, stage):
        said = [self.tokenizer.decode(tokens_of(self.tokenizer, text)) for text in batch.said]
        counts = batch.num_tokens.tolist()
        tokens = [
            row[:count].tolist() for row, count in zip(batch.tokens.data, counts, strict=True)
        ]
        assert [self.tokenizer.decode(row) for row in tokens] == said
        for text, wrd in zip(batch.said, batch.wrd, strict=True):
            seen.setdefault((stage, self.epoch), []).append((text, wrd))
        return objectives(self, predictions, batch, stage)

    monkeypatch.setattr(train_CTC.ASR, "compute_objectives", compute_objectives)
    folder = tmp_path / "run"
    keys = {"spliced_share": 0.7, "splice_from_epoch": 2, "number_of_epochs": 3, **ONE_BATCH}
    keys["splice_min_log_prob"] = -100
    assert train(command_line(tone_corpus, folder, test_splits="[]", **keys)) == 0
    spliced = {
        key: sum(text != wrd for text, wrd in texts) / len(texts) for key, texts in seen.items()
    }
    assert [spliced[sb.Stage.VALID, epoch] for epoch in (1, 2, 3)] == [0, 0, 0]
    assert spliced[sb.Stage.TRAIN, 1] == 0
    assert spliced[sb.Stage.TRAIN, 2] > 0.2
    assert seen[sb.Stage.TRAIN, 2] != seen[sb.Stage.TRAIN, 3]
    vocabulary_words = {word for _, wrd in seen[sb.Stage.TRAIN, 1] for word in wrd.split()}
    assert {
        word for text, _ in seen[sb.Stage.TRAIN, 3] for word in text.split()
    } <= vocabulary_words
    segments, origin = read_segments(folder / "save" / "segments.json")
    epoch_1_steps = max(entry["step"] for entry in metrics(folder) if entry["epoch"] == 1)
    assert origin == {"step": epoch_1_steps, "epoch": 2, "first_epoch": 2}
    assert sum(len(segment.words.split()) for segment in segments) > 10


def test_a_model_that_does_not_know_the_words_cuts_none(tone_corpus, tmp_path):
    folder = tmp_path / "run"
    keys = {"spliced_share": 1.0, "splice_from_epoch": 2, "splice_min_log_prob": -1e-6, **ONE_BATCH}
    assert train(command_line(tone_corpus, folder, test_splits="[]", **keys)) == 0
    segments, origin = read_segments(folder / "save" / "segments.json")
    assert not segments
    assert origin["epoch"] == 2
    assert "Nothing is spliced" in (folder / "log.txt").read_text(encoding="utf-8")


def test_weights_of_another_architecture_are_named(run, tone_corpus, tmp_path, capsys):
    source = run / "save" / "averaged" / "model.ckpt"
    arguments = command_line(tone_corpus, tmp_path / "started", d_ffn=48)
    assert train([*arguments, "--init_from", str(source)]) == EXIT_USER_ERROR
    assert "(32, 16) in the file, (48, 16) in the model" in capsys.readouterr().err


def test_training_stops_when_validation_no_longer_improves(tone_corpus, tmp_path):
    folder = tmp_path / "run"
    keys = {
        "lr_adam": 0.0,
        "number_of_epochs": 6,
        "test_splits": "[]",
        "optimizer_step_limit": None,
    }

    def epochs():
        return [entry["epoch"] for entry in metrics(folder) if "valid_loss" in entry]

    assert train(command_line(tone_corpus, folder, early_stop_patience=1, **keys)) == 0
    assert epochs() == [1, 2]
    assert train(command_line(tone_corpus, folder, early_stop_patience=1, **keys)) == 0
    assert epochs() == [1, 2]
    assert train(command_line(tone_corpus, folder, early_stop_patience=3, **keys)) == 0
    assert epochs() == [1, 2, 3, 4]


def test_a_score_that_stays_the_same_is_no_gain(tone_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(train_CTC.ASR, "best_is", "max")
    keys = {
        "lr_adam": 0.0,
        "number_of_epochs": 6,
        "test_splits": "[]",
        "optimizer_step_limit": None,
        "counter": "{direction: max}",
        "early_stop_patience": 2,
    }
    assert train(command_line(tone_corpus, tmp_path, **keys)) == 0
    epochs = [entry["epoch"] for entry in metrics(tmp_path) if "valid_loss" in entry]
    assert epochs == [1, 2, 3]


def test_a_run_that_goes_on_has_the_options_it_is_given(tone_corpus, tmp_path, monkeypatch):
    seen, start = [], train_CTC.ASR.on_fit_start

    def note(brain):
        start(brain)
        seen.extend({group["weight_decay"] for group in brain.optimizer.param_groups})

    monkeypatch.setattr(train_CTC.ASR, "on_fit_start", note)
    for epochs, decay in ((1, 0.01), (2, 0.3)):
        keys = {"number_of_epochs": epochs, "weight_decay": decay, "test_splits": "[]"}
        assert train(command_line(tone_corpus, tmp_path, **keys)) == 0
    assert 0.01 in seen[:2]
    assert 0.3 in seen[2:]
    assert 0.01 not in seen[2:]


def test_what_a_run_logged_before_its_first_checkpoint_is_logged_anew(tone_corpus, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train_loss": 5.0, "stale": 1}\n')
    keys = {"number_of_epochs": 1, "test_splits": "[]"}
    assert train(command_line(tone_corpus, tmp_path, **keys)) == 0
    assert not any("stale" in entry for entry in metrics(tmp_path))


def test_a_loss_that_stays_infinite_ends_the_run_and_names_utterances(
    tone_corpus, tmp_path, capsys
):
    folder = tmp_path / "run"
    arguments = command_line(tone_corpus, folder, lr_adam=1e30, max_grad_norm=1e30)
    assert train([*arguments, "--nonfinite_patience", "2"]) == EXIT_USER_ERROR
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith("error: The ")
    assert "was not finite 3 times in epoch 1" in captured.err
    assert "101-1-00" in captured.err
    assert captured.out.count("is not finite; step skipped. Batch: 101-1-00") == 2
    assert checkpoints(folder) == []


def test_a_step_with_an_infinite_loss_changes_nothing(tone_corpus, tmp_path, monkeypatch, capsys):
    spoiled = "101-1-0004"
    whole = train_CTC.ASR.compute_objectives
    seen = []

    def objectives(self, predictions, batch, stage):
        loss = whole(self, predictions, batch, stage)
        return loss * float("nan") if spoiled in batch.id and stage == sb.Stage.TRAIN else loss

    def step(self, batch, outputs, loss, should_step):
        weights = torch.cat([p.detach().flatten() for p in self.modules.parameters()])
        seen.append((spoiled in batch.id, self.optimizer_step, weights))

    monkeypatch.setattr(train_CTC.ASR, "compute_objectives", objectives)
    monkeypatch.setattr(train_CTC.ASR, "on_fit_batch_end", step)
    arguments = command_line(tone_corpus, tmp_path / "run", number_of_epochs=1, test_splits="[]")
    assert train(arguments) == 0
    assert "step skipped. Batch: " in capsys.readouterr().out
    (index,) = [i for i, (was_spoiled, _, _) in enumerate(seen) if was_spoiled]
    for i in range(1, len(seen)):
        same = torch.equal(seen[i][2], seen[i - 1][2])
        assert same == (i == index)
        assert seen[i][1] == seen[i - 1][1] + (i != index)
    assert seen[-1][2].isfinite().all()


def test_utterances_too_short_for_their_tokens_are_listed_and_do_not_count(tone_corpus, tmp_path):
    data = shutil.copytree(tone_corpus, tmp_path / "LibriSpeech")
    (transcript,) = data.glob("train-clean-100/*/*/*.trans.txt")
    lines = transcript.read_text(encoding="utf-8").splitlines()
    lines[0] = lines[0].split()[0] + " " + "TOO " * 40
    transcript.write_text("\n".join(lines) + "\n", encoding="utf-8")
    folder = tmp_path / "run"
    arguments = command_line(data, folder, number_of_epochs=1, test_splits="[]", **ONE_BATCH)
    assert train(arguments) == 0
    with open(folder / "skipped.csv", encoding="utf-8", newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert row["id"] == lines[0].split()[0]
    assert "frames for" in row["reason"]
    assert all(entry["train_loss"] > 1 for entry in metrics(folder) if "train_loss" in entry)


def test_an_utterance_that_speed_makes_too_short_is_listed_once_and_weighs_nothing(
    tone_corpus, tmp_path, monkeypatch
):
    losses = []
    whole = brain_module.mean_over_feasible

    def mean(loss_B, feasible_B):
        losses.append((loss_B.detach(), feasible_B))
        return whole(loss_B, feasible_B)

    monkeypatch.setattr(brain_module, "mean_over_feasible", mean)
    folder = tmp_path / "run"
    # Four times as fast: six frames for a word's letters at 0.1 s each.
    arguments = command_line(
        tone_corpus, folder, test_splits="[]", speed_perturb="{speeds: [400]}", **ONE_BATCH
    )
    assert train(arguments) == 0
    with open(folder / "skipped.csv", encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len({row["id"] for row in rows}) == len(rows) == 10
    assert all("after speed perturbation: no CTC loss" in row["reason"] for row in rows)
    training = [(loss_B, feasible_B) for loss_B, feasible_B in losses if not feasible_B.any()]
    assert training
    assert all((loss_B == 0).all() for loss_B, _ in training)


def test_tensorboard_and_wandb_get_the_figures_of_epochs_and_test_splits(
    tone_corpus, tmp_path, monkeypatch
):
    pytest.importorskip("wandb", reason="needs pip install -e '.[wandb]'")
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="needs pip install -e '.[tensorboard]'",
    )
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = tmp_path / "run"
    keys = {
        "use_wandb": True,
        "use_tensorboard": True,
        "wandb_project": "tones",
        "test_splits": "[test-other]",
        **ONE_BATCH,
    }
    try:
        assert train(command_line(tone_corpus, folder, number_of_epochs=1, **keys)) == 0
        assert wandb.run.project == "tones"
        assert wandb.run.summary["test-other"]["WER"] > 0
    finally:
        wandb.finish()
    assert list((folder / "wandb").glob("offline-run-*/*.wandb"))

    keys["use_wandb"] = False
    assert train(command_line(tone_corpus, folder, number_of_epochs=2, **keys)) == 0
    events = accumulator.EventAccumulator(str(folder / "tensorboard")).Reload()
    tags = events.Tags()["scalars"]
    assert {"loss/train", "loss/valid", "WER/valid", "lr", "WER/test-other"} <= set(tags)
    assert [event.step for event in events.Scalars("WER/valid")] == [1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "fp16"}, "--precision fp16 needs a CUDA device"),
        (
            {"encoder_module": "conmanba"},
            "known are branchformer, conformer, conmamba, mamba",
        ),
        ({"d_modle": 8}, "has no key 'd_modle'. Did you mean d_model"),
        ({"data_folder": "/nowhere"}, "data_folder /nowhere: there is no such folder"),
        ({"data_folder": REPOSITORY / "docs"}, "is not LibriSpeech"),
        ({"test_splits": "[test-all]"}, "missing in"),
        ({"dev_splits": "[]"}, "dev_splits"),
        ({"train_splits": "[]"}, "train_splits"),
        ({"device": "gpu"}, "--device gpu: there is none here"),
        ({"token_type": "letters"}, "char, unigram, bpe"),
        ({"output_neurons": 8}, "--output_neurons"),
        ({"sorting": "length"}, "one of random, ascending, descending"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_mistake_is_one_message_and_status_2(tone_corpus, tmp_path, capsys, changes, message):
    assert train(command_line(tone_corpus, tmp_path / "run", **changes)) == EXIT_USER_ERROR
    stderr = capsys.readouterr().err
    # Above it stand the progress bars of the preparation.
    last = stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in stderr
    assert checkpoints(tmp_path / "run") == []


def test_a_data_folder_is_required(tmp_path, capsys):
    arguments = command_line(None, tmp_path / "run")
    assert train(arguments) == EXIT_USER_ERROR
    assert "--data_folder /path/to/LibriSpeech" in capsys.readouterr().err


def test_an_evaluation_does_not_ask_for_an_augmentation_that_training_would_refuse(
    run, tone_corpus, tmp_path, capsys
):
    copy = shutil.copytree(run, tmp_path / "copy")
    text = CONMAMBA.read_text()
    older = tmp_path / "older.yaml"
    older.write_text(text.replace("  replace: mean", "  replace: random_selection"))
    arguments = command_line(tone_corpus, copy, older, test_splits="[test-other]")
    assert train([*arguments, "--test_only"]) == 0
    arguments = command_line(tone_corpus, tmp_path / "new", older)
    assert train(arguments) == EXIT_USER_ERROR
    assert "replace: random_selection chooses once" in capsys.readouterr().err


def test_test_only_without_a_trained_run_says_so(tone_corpus, tmp_path, capsys):
    arguments = command_line(tone_corpus, tmp_path / "nothing", flags=["--test_only"])
    assert train(arguments) == EXIT_USER_ERROR
    assert "--test_only needs the output_folder of a trained run" in capsys.readouterr().err
    assert list(tmp_path.rglob("*.csv")) == []


def test_a_split_may_be_given_without_brackets(tone_corpus, tmp_path):
    folder = tmp_path / "run"
    arguments = command_line(
        tone_corpus,
        folder,
        train_splits="dev-clean",
        dev_splits="test-other",
        test_splits="test-other",
        number_of_epochs=1,
        **ONE_BATCH,
    )
    assert train(arguments) == 0
    assert results_of(folder)["splits"].keys() == {"test-other"}


def test_evaluations_have_a_name_a_folder_and_a_record_each(copy, tone_corpus, tmp_path, capsys):
    trained, reports = results_of(copy), {p.name: p.read_bytes() for p in copy.glob("*_test-*")}
    averaged = (copy / "save" / "averaged" / "model.ckpt").read_bytes()
    arpa = tmp_path / "words.arpa"
    manifest = str(copy / "train.csv")
    make_ngram([manifest, "--order", "1", "--output", str(arpa)])
    other = {"test_splits": "[test-other]"}
    evaluate(tone_corpus, copy, **other, seed=77, test_beam_size=2, eval_precision="bf16")
    evaluate(tone_corpus, copy, **other, kenlm_model_path=arpa, avg_checkpoints=1)
    names, results = evaluate(tone_corpus, copy, "--eval_name", "mine", **other, alpha=0.9)
    assert names == [
        "test-other_beam2_bf16",
        "test-other_words_beam100_avg_checkpoints1",
        "mine",
    ]
    assert {key: results[key] for key in trained} == trained
    assert {path.name: path.read_bytes() for path in copy.glob("*_test-*")} == reports
    assert (copy / "save" / "averaged" / "model.ckpt").read_bytes() == averaged
    small = results["evaluations"]["test-other_beam2_bf16"]
    assert small["run"]["seed"] == 77
    assert small["run"]["eval_precision"] == small["settings"]["eval_precision"] == "bf16"
    assert trained["run"]["eval_precision"] == "fp32"
    assert small["settings"]["test_beam_size"] == 2
    for name in names:
        last = (copy / "eval" / name / "wer_test-other.txt").read_text().splitlines()[-1]
        scores = results["evaluations"][name]["splits"]["test-other"]
        assert last == f"WER: {scores['wer']:.2f}%  CER: {scores['cer']:.2f}%"
    # The same again is the same; another one cannot take its name.
    again, _ = evaluate(tone_corpus, copy, **other, test_beam_size=2, eval_precision="bf16")
    assert again == names
    capsys.readouterr()
    taken = ["--test_only", "--eval_name", "mine"]
    assert train(command_line(tone_corpus, copy, flags=taken, **other, alpha=0.1)) != 0
    assert "mine is another evaluation of this run (then / now: alpha 0.9 / 0.1" in (
        capsys.readouterr().err
    )


def test_the_runs_own_evaluation_can_be_repeated(copy, tone_corpus):
    before = results_of(copy)
    for name in ("wer_test-other.txt", "hyp_test-clean.tsv"):
        (copy / name).unlink()
    _, results = evaluate(tone_corpus, copy)
    assert results["run"] == before["run"]
    assert results["splits"]["test-clean"]["wer"] == before["splits"]["test-clean"]["wer"]
    assert (copy / "wer_test-other.txt").is_file()
    assert (copy / "hyp_test-clean.tsv").is_file()


def test_a_path_that_was_relative_in_the_training_is_still_the_runs_own(
    tone_corpus, tmp_path, monkeypatch
):
    (tmp_path / "text.txt").write_text("ONE TWO THREE\n" * 9, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert make_ngram(["text.txt", "--output", "words.arpa"]) == 0
    keys = {"number_of_epochs": 1, "test_splits": "[test-clean]", "test_beam_size": 2}
    keys["kenlm_model_path"] = "words.arpa"
    assert train(command_line(tone_corpus, tmp_path / "run", **keys)) == 0
    report = tmp_path / "run" / "wer_test-clean.txt"
    monkeypatch.chdir("/")
    report.unlink()
    assert train([str(tmp_path / "run"), "--test_only", "--device=cpu", "--noprogressbar"]) == 0
    assert report.is_file()


def test_checkpoints_keep_the_tokens_that_they_were_trained_with(copy, tone_corpus, capsys):
    tokenizer = (copy / "save" / "tokenizer.model").read_bytes()
    more = {"number_of_epochs": 50, "test_splits": "[]"}
    other = command_line(tone_corpus, copy, **more, token_type="bpe")
    assert train(other) == EXIT_USER_ERROR
    assert "token_type char" in capsys.readouterr().err
    assert (copy / "save" / "tokenizer.model").read_bytes() == tokenizer
    for checkpoint in checkpoints(copy):
        shutil.rmtree(checkpoint)
    other = command_line(
        tone_corpus, copy, token_type="bpe", output_neurons=20, number_of_epochs=1, test_splits="[]"
    )
    assert train([*other, "--optimizer_step_limit", "1"]) == 0
    assert (copy / "save" / "tokenizer.model").read_bytes() != tokenizer


def test_another_runs_checkpoint_is_resumed_with_its_tokens_alone(
    run, tone_corpus, tmp_path, capsys
):
    flags = ["--resume", str(run)]
    keys = {"number_of_epochs": 9, "test_splits": "[]", "token_type": "bpe", "output_neurons": 31}
    other = command_line(tone_corpus, tmp_path / "other", flags=flags, **keys)
    assert train(other) == EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert "--resume" in error
    assert "each output would stand for another token" in error


def test_a_run_that_has_reached_its_limit_trains_no_further(tone_corpus, tmp_path):
    keys = {"number_of_epochs": 9, "test_splits": "[]", "batch_size": 1, "dynamic_batching": False}
    command = command_line(tone_corpus, tmp_path, **keys, optimizer_step_limit=1)
    assert train(command) == 0
    ends = [path.name for path in checkpoints(tmp_path)]
    assert len(ends) == 1
    assert train(command) == 0
    assert [path.name for path in checkpoints(tmp_path)] == ends
    assert [entry["epoch"] for entry in metrics(tmp_path) if "valid_loss" in entry] == [1]
    assert train(command_line(tone_corpus, tmp_path, **keys, optimizer_step_limit=2)) == 0
    assert [entry["epoch"] for entry in metrics(tmp_path) if "valid_loss" in entry] == [1, 2]


def test_a_word_ngram_decides_between_what_the_audio_leaves_open(run, tone_corpus, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("ONE TWO\nONE TWO THREE\n", encoding="utf-8")
    assert make_ngram([str(text), "--output", str(tmp_path / "words.arpa")]) == 0
    tokenizer = load_tokenizer(run / "save" / "tokenizer.model", 31)
    pieces = vocabulary(tokenizer)
    # Every letter of ONE TWO is a little less likely than another letter.
    spoken = [pieces.index(c) for c in "▁ONE▁TWO"]
    log_probs_1TV = torch.full((1, 2 * len(spoken), len(pieces)), -12.0)
    for i, token in enumerate(spoken):
        log_probs_1TV[0, 2 * i, [token, pieces.index("R")]] = torch.tensor([-0.75, -0.65])
        log_probs_1TV[0, 2 * i + 1, 0] = 0.0
    texts = []
    for path in (None, str(tmp_path / "words.arpa")):
        hparams = load_hparams(
            command_line(tone_corpus, tmp_path)[0],
            {"data_folder": "x", "kenlm_model_path": path, "alpha": 2.0},
        )
        train_CTC.prepare_searches(hparams, tokenizer)
        frames = np.array([log_probs_1TV.shape[1]])
        (beams,) = hparams["test_search"](log_probs_1TV.numpy(), frames)
        texts.append(beams[0].text)
    assert texts[0] != "ONE TWO"
    assert texts[1] == "ONE TWO"


@pytest.mark.parametrize("splits", ["[train, train2]", "[train2]"])
def test_a_split_may_be_called_train_as_the_manifest_of_all_is(tmp_path, splits):
    sizes = {"train": 3, "train2": 2, "dev": 1}
    corpus, folder = make_corpus(tmp_path / "corpus", sizes), tmp_path / "run"
    keys = {"train_splits": splits, "dev_splits": "[dev, train]", "number_of_epochs": 1}
    if splits == "[train, train2]":
        keys["dev_splits"] = "[dev]"
    assert train(command_line(corpus, folder, test_splits="[]", **keys)) == 0
    names = {path.name: len(read_manifest(path)) for path in folder.glob("*[!d].csv")}
    assert names["train.csv"] == 3
    expected = {"[train, train2]": ("all_train.csv", 5), "[train2]": ("train2.csv", 2)}[splits]
    assert expected in names.items()
    transcripts = {row.wrd for row in read_manifest(folder / expected[0])}
    assert len(transcripts) == expected[1]


def test_a_run_may_begin_with_splicing(run, tone_corpus, tmp_path):
    folder, weights = tmp_path / "run", run / "save" / "averaged" / "model.ckpt"
    keys = {"spliced_share": 1.0, "splice_from_epoch": 1, "splice_min_log_prob": -100, **ONE_BATCH}
    arguments = command_line(tone_corpus, folder, test_splits="[]", number_of_epochs=1, **keys)
    assert train([*arguments, "--init_from", str(weights)]) == 0
    assert read_segments(folder / "save" / "segments.json")[0]
    statistics = torch.load(checkpoints(folder)[-1] / "normalizer.ckpt", weights_only=True)
    heard = torch.load(checkpoints(run)[-1] / "normalizer.ckpt", weights_only=True)
    # Spliced utterances have the same words in other proportions.
    assert (statistics["glob_mean"] - heard["glob_mean"]).abs().mean() < 0.5
    # What a run leaves that is killed before its first checkpoint.
    again = tmp_path / "again"
    (again / "save").mkdir(parents=True)
    shutil.copy(folder / "save" / "segments.json", again / "save")
    arguments[arguments.index(str(folder))] = str(again)
    assert train([*arguments, "--init_from", str(weights)]) == 0
    assert_same_end(again, folder)


def test_a_corpus_of_8_khz_is_trained_at_its_rate_or_resampled(run, tmp_path, capsys):
    corpus = make_corpus(tmp_path / "corpus", {"train-clean-100": 4, "dev-clean": 1})
    for path in corpus.rglob("*.flac"):
        samples, rate = soundfile.read(path)
        soundfile.write(path, samples[::2], rate // 2)
    keys = {"test_splits": "[dev-clean]", "number_of_epochs": 1, "test_beam_size": 2}
    folder = tmp_path / "run"
    assert train(command_line(corpus, folder, **keys)) == EXIT_USER_ERROR
    assert "8000 Hz instead of 16000 Hz (--resample True takes it)" in capsys.readouterr().err
    shorter = {"sample_rate": 8000, "n_fft": 256, **keys}
    assert train(command_line(corpus, folder, **shorter)) == 0
    durations = [row.duration for row in read_manifest(folder / "train.csv")]
    assert train(command_line(corpus, tmp_path / "other", resample=True, **keys)) == 0
    assert [row.duration for row in read_manifest(tmp_path / "other" / "train.csv")] == durations
    assert results_of(tmp_path / "other")["splits"]["dev-clean"]["utterances"] == 1


def test_a_corpus_of_tables_is_trained_on_where_it_is(tmp_path, capsys):
    corpus = make_corpus(tmp_path / "audio", {"train": 3, "dev": 1, "test": 1})
    tables = tmp_path / "tables"
    tables.mkdir()
    for split in ("train", "dev", "test"):
        lines = ["path,text"]
        for transcript in sorted((corpus / split).rglob("*.trans.txt")):
            for line in transcript.read_text(encoding="utf-8").splitlines():
                name, _, words = line.partition(" ")
                path = transcript.parent / f"{name}.flac"
                lines.append(f"{os.path.relpath(path, tables)},{words}")
        (tables / f"{split}.csv").write_text("\n".join(lines), encoding="utf-8")
    keys = {"train_splits": "[train]", "dev_splits": "dev", "test_splits": "test"}
    keys |= {"number_of_epochs": 1, "test_beam_size": 2}
    assert train(command_line(tables, tables, **keys)) == EXIT_USER_ERROR
    assert "give an --output_folder" in capsys.readouterr().err
    folder = tmp_path / "run"
    assert train(command_line(tables, folder, **keys)) == 0
    assert results_of(folder)["splits"]["test"]["utterances"] == 1
    # Manifests of several splits that were made elsewhere.
    (folder / "train.csv").rename(folder / "one.csv")
    (folder / "test.csv").rename(folder / "two.csv")
    other = tmp_path / "other"
    other.mkdir()
    for name in ("one", "two", "dev"):
        shutil.copy(folder / f"{name}.csv", other)
    keys |= {"train_splits": "[one, two]", "test_splits": "[]", "skip_prep": True}
    assert train(command_line(tables, other, **keys)) == 0
    assert len(read_manifest(other / "train.csv")) == 4
    # What was made of other splits is not taken for theirs.
    keys["train_splits"] = "[one]"
    capsys.readouterr()
    assert train(command_line(tables, other, **keys)) == EXIT_USER_ERROR
    assert "train.csv (4 utterances) is not what one.csv holds" in capsys.readouterr().err


def test_the_folder_of_a_run_is_all_that_its_command_needs(tmp_path, monkeypatch, capsys):
    make_corpus(tmp_path / "corpus", {"train-clean-100": 4, "dev-clean": 1, "test-clean": 2})
    monkeypatch.chdir(tmp_path)
    keys = {"number_of_epochs": 1, "test_splits": "[test-clean]", "test_beam_size": 2}
    # A relative corpus, a value of another name, a run option, and a name like a number's.
    arguments = command_line("corpus", "1e3", flags=["--precision", "bf16"], **keys)
    assert train([*arguments, "--precision", "bf16"]) == 0
    scores = results_of(tmp_path / "1e3")["splits"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = shutil.move(tmp_path / "1e3", tmp_path / "moved")
    assert train([str(run), "--noprogressbar", "--device", "cpu", "--number_of_epochs", "2"]) == 0
    assert [entry["epoch"] for entry in metrics(run) if "valid_loss" in entry] == [1, 2]
    assert results_of(run)["run"]["precision"] == "bf16"
    assert train([str(run), "--device=cpu", "--test_only", "--test_beam_size", "3"]) == 0
    (name,) = results_of(run)["evaluations"]
    assert "beam3" in name
    assert results_of(run)["evaluations"][name]["splits"].keys() == scores.keys()
    assert not list((tmp_path / "elsewhere").iterdir())
    assert not (tmp_path / "1e3").exists()
    help_of_run = help_text([str(run), "--help"], "")
    assert "--number_of_epochs 2" in help_of_run
    assert "True leaves unusable utterances out" in help_of_run


def test_outputs_follow_the_characters_of_the_transcripts(tmp_path):
    splits = {"train-clean-100": 6, "dev-clean": 2, "test-clean": 2}
    corpus = make_corpus(tmp_path / "corpus", splits, num_words=3)
    alphabet = [chr(ord("\N{GREEK SMALL LETTER ALPHA}") + i) for i in range(24)]
    for path in corpus.rglob("*.trans.txt"):
        lines = path.read_text(encoding="utf-8").splitlines()
        said = [f"{line} {''.join(alphabet[i % 3 :: 3])}" for i, line in enumerate(lines)]
        path.write_text("\n".join(said) + "\n", encoding="utf-8")
    folder = tmp_path / "run"
    keys = {"number_of_epochs": 1, "test_splits": "[test-clean]", "max_batch_length_train": 9}
    arguments = command_line(corpus, folder, **keys)
    assert train(arguments) == 0
    tokens = len(vocabulary(load_tokenizer(folder / "save" / "tokenizer.model", 1000)))
    assert tokens > 31
    assert results_of(folder)["model"]["output_neurons"] == tokens
    # The same commands go on and evaluate; so does what the run wrote down.
    longer = command_line(corpus, folder, **keys | {"number_of_epochs": 2})
    assert train(longer) == 0
    assert train([*arguments, "--test_only"]) == 0
    assert f"output_neurons: {tokens}" in (folder / "hyperparams.yaml").read_text()
    # What is given and too little stops at the start.
    assert train([*arguments, "--output_neurons", "31"]) == EXIT_USER_ERROR


def test_a_cosine_ends_with_the_last_epoch(tone_corpus, tmp_path):
    keys = {"number_of_epochs": 2, "n_warmup_steps": 2, "test_splits": "[]"}
    keys |= {"grad_accumulation_factor": 2, "num_bucket": 4, "lr_adam": 0.01}
    demo = REPOSITORY / "hparams" / "CTC" / "demo.yaml"
    assert train(command_line(tone_corpus, tmp_path / "run", demo, **keys)) == 0
    rates = [entry["lr"] for entry in metrics(tmp_path / "run") if "lr" in entry]
    assert len(rates) > 4
    assert max(rates) == pytest.approx(0.01)
    # The rate that is logged is that of the step after.
    assert rates[-2:] == pytest.approx(2 * [0.01 * 0.01])
    assert rates[-3] > 1.1 * rates[-2]


def test_the_network_takes_what_another_front_end_makes(tone_corpus, tmp_path, capsys):
    folder = tmp_path / "run"
    keys = {"n_mels": 40, "number_of_epochs": 1, "test_splits": "[test-other]", **ONE_BATCH}
    arguments = command_line(tone_corpus, folder, **keys)
    assert train([*arguments, "--Transformer", "{input_size: 640}"]) == EXIT_USER_ERROR
    assert "The front end makes 320 features of 40 mel bins" in capsys.readouterr().err
    assert train(arguments) == 0
    assert train([*arguments, "--test_only"]) == 0
    assert "input_size: 320" in (folder / "hyperparams.yaml").read_text(encoding="utf-8")


def test_a_run_says_nothing_that_its_user_did_not_cause(tone_corpus, tmp_path, capsys, recwarn):
    folder = tmp_path / "run"
    keys = {"number_of_epochs": 1, "num_workers": 4, "test_splits": "[test-other]", **ONE_BATCH}
    assert train(command_line(tone_corpus, folder, precision=None, **keys)) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert [str(warning.message) for warning in recwarn if "Deprec" not in str(warning)] == []
    for noise in ("overridden", "hparams is used", "Generating dynamic", "quirks"):
        assert noise not in printed.out
    assert "Using training precision: `--precision=bf16`" in printed.out
    assert not (folder / "start.py").exists()
    log = (folder / "train_log.txt").read_text(encoding="utf-8")
    assert re.search(r"test WER: \d+\.\d\d, test CER: \d+\.\d\d$", log, re.M)
    assert re.search(r"train loss: \d+\.\d\d,", log)
