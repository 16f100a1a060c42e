"""The command evaluate.py: a trained model's scores on any corpus, and what it refuses."""

import csv
import json
import os
import shutil

import pytest

import evaluate
from inference import Recognizer
from inference.scoring.reports import read_hypotheses, read_results
from tests.inference.command_lines import answer_of, assert_answers_without_torch
from tests.inference.runs import make_run
from tools.make_ngram import main as make_ngram
from training.compare import compare

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(capsys):
    """Runs the command on the CPU; returns (status, standard output, error)."""
    return lambda *arguments: answer_of(evaluate.main, arguments, capsys)


def without_time(results, split):
    return {key: value for key, value in results["splits"][split].items() if key != "decode_s"}


def write_table(path, rows):
    with open(path, "w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([("ID", "duration", "wav", "spk_id", "wrd"), *rows])
    return path


def test_a_run_scores_as_in_its_own_evaluation(run, tiny_run, tone_corpus, tmp_path):
    status, out, error = run(
        *(tiny_run, tone_corpus, "--output_dir", tmp_path, "--split", "test-other", "test-clean")
    )
    assert (status, error) == (0, "")
    results, trained = read_results(tmp_path), read_results(tiny_run)
    told = results["model"].keys() - {"digest"}
    assert told == trained["model"].keys() - {"weights"}
    assert all(results["model"][key] == trained["model"][key] for key in told)
    assert results["run"].keys() == trained["run"].keys() | {"evaluated"}
    # Seeds tell the runs of a recipe apart.
    assert results["run"]["seed"] == trained["run"]["seed"] > 0
    assert results["intervals"] == trained["intervals"]
    for split in ("test-clean", "test-other"):
        assert without_time(results, split) == without_time(trained, split)
        assert results["splits"][split]["decode_s"] > 0
        for name in ("hyp_{}.tsv", "wer_{}.txt", "cer_{}.txt", "errors_{}.txt"):
            ours, theirs = tmp_path / name.format(split), tiny_run / name.format(split)
            assert ours.read_bytes() == theirs.read_bytes()
        assert f"{results['splits'][split]['wer']:.2f}" in out
        low, high = results["intervals"][split]["wer"]
        assert f"{low:.2f} to {high:.2f}" in out
    assert "real-time factor" in out
    assert (tmp_path / "skipped.csv").read_text(encoding="utf-8") == "id,reason\n"


def test_hypotheses_have_their_times(run, tiny_bundle, tone_corpus, tmp_path):
    run(tiny_bundle, tone_corpus, "--output_dir", tmp_path, "--split", "test-clean")
    lines = (tmp_path / "hyp_test-clean.jsonl").read_text(encoding="utf-8").splitlines()
    texts = {
        name: pair[1] for name, pair in read_hypotheses(tmp_path / "hyp_test-clean.tsv").items()
    }
    found = [json.loads(line) for line in lines]
    assert {entry["file"]: entry["text"].split() for entry in found} == texts
    words = [
        [entry["file"], "1", f"{word['start_s']:.3f}", word["text"]]
        for entry in found
        for word in entry["words"]
    ]
    assert words
    table = (tmp_path / "hyp_test-clean.ctm").read_text(encoding="utf-8").splitlines()
    assert [line.split()[:3] + line.split()[4:5] for line in table] == words


def test_all_splits_but_those_for_training_are_the_default(run, tiny_bundle, tone_corpus, tmp_path):
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    status, out, _ = run(bundle, tone_corpus, "--search", "greedy")
    assert status == 0
    folder = bundle / "evaluations" / f"{tone_corpus.parent.name}_search-greedy"
    assert f"Reports: {folder}" in out
    assert list(read_results(folder)["splits"]) == ["dev-clean", "test-clean", "test-other"]
    assert Recognizer.from_bundle(bundle, device="cpu").sample_rate == 16000


def test_other_corpora_and_searches_have_folders_of_their_own(
    run, tiny_bundle, tone_corpus, tmp_path
):
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    tables = []
    for number, name in enumerate(("calls.v1", "meetings")):
        (tmp_path / name).mkdir()
        tables.append(write_table(tmp_path / name / "test.csv", [audio_row(tone_corpus, number)]))
    for table in (tables[0], *tables):
        assert run(bundle, table)[0] == 0
    assert run(bundle, tables[0], "--search", "greedy", "--ignore_case")[0] == 0
    corpus = shutil.copytree(tone_corpus, tmp_path / "tones.v1")
    assert run(bundle, corpus, "--split", "test-clean", "--search", "greedy")[0] == 0
    assert sorted(path.name for path in (bundle / "evaluations").iterdir()) == [
        "test",
        "test-2",
        "test_search-greedy_ignore_case",
        "tones.v1_search-greedy",
    ]


def test_where_the_model_cannot_be_written_reports_are_here(
    run, tiny_bundle, tone_corpus, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tiny_bundle)
    table = write_table(tmp_path / "calls.csv", [audio_row(tone_corpus)])
    assert run(tiny_bundle, table)[0] == 0
    assert (tmp_path / f"evaluation_{tiny_bundle.name}_calls" / "results.json").is_file()


def audio_row(corpus, number=0, words="ONE"):
    audio = sorted((corpus / "test-clean").rglob("*.flac"))[number]
    return f"u{number}", 1.0, str(audio), "1", words


def test_a_manifest_is_a_split(run, tiny_run, tone_corpus, tmp_path):
    manifest = tiny_run / "test-clean.csv"
    status, _, error = run(tiny_run, manifest, "--output_dir", tmp_path)
    assert status == 2
    assert "is in $data_root: say with --data_root where that is" in error
    arguments = ["--data_root", tone_corpus, "--output_dir", tmp_path]
    assert run(tiny_run, manifest, *arguments)[0] == 0
    results, trained = read_results(tmp_path), read_results(tiny_run)
    assert without_time(results, "test-clean") == without_time(trained, "test-clean")


def test_paths_of_a_table_are_from_its_folder(run, tiny_bundle, tone_corpus, tmp_path):
    (tmp_path / "audio").mkdir()
    shutil.copy(audio_row(tone_corpus)[2], tmp_path / "audio" / "a.flac")
    rows = [("a", 1.0, "audio/a.flac", "1", "ONE TWO"), audio_row(tone_corpus, 1, "")]
    table = write_table(tmp_path / "table.csv", rows)
    assert run(tiny_bundle, table, "--output_dir", tmp_path / "out")[0] == 0
    entry = read_results(tmp_path / "out")["splits"]["table"]
    assert (entry["utterances"], entry["words"]) == (2, 2)


def test_later_evaluations_join_earlier_ones_and_can_be_compared(
    run, tiny_run, tone_corpus, tmp_path
):
    for split, search in (("test-clean", "beam"), ("test-other", "greedy")):
        arguments = ["--output_dir", tmp_path / "out", "--split", split, "--search", search]
        assert run(tiny_run, tone_corpus, *arguments)[0] == 0
    results = read_results(tmp_path / "out")
    assert list(results["splits"]) == ["test-clean", "test-other"]
    assert "--search beam" in results["run"]["command"]
    assert "--search greedy" in results["evaluations"]["test-other"]["command"]
    report = compare([tiny_run, tmp_path / "out"])
    assert report.count("test-clean") == 2


def test_references_in_another_case_are_told_kindly(run, tiny_bundle, tone_corpus, tmp_path):
    recognizer = Recognizer.from_bundle(tiny_bundle, device="cpu")
    rows = [audio_row(tone_corpus, number) for number in range(3)]
    texts = [recognizer.transcribe(row[2]).text for row in rows]
    rows = [(*row[:4], text.lower()) for row, text in zip(rows[:2], texts[:2], strict=True)] + rows[
        2:
    ]
    table = write_table(tmp_path / "table.csv", rows)
    arguments = [tiny_bundle, table, "--output_dir", tmp_path / "out"]
    status, _, error = run(*arguments)
    assert status == 0
    assert "letter case" in error
    assert "33.33 % instead of 100.00 %" in error
    status, _, error = run(*arguments, "--ignore_case")
    assert (status, error) == (0, "")
    assert read_results(tmp_path / "out")["splits"]["table"]["wer"] == pytest.approx(100 / 3)


def test_bad_recordings_are_left_out_and_listed(run, tiny_bundle, tone_corpus, tmp_path):
    corpus = shutil.copytree(tone_corpus, tmp_path / "corpus")
    first, second, _ = sorted((corpus / "test-clean").rglob("*.flac"))
    first.write_bytes(b"")
    second.unlink()
    arguments = [tiny_bundle, corpus, "--split", "test-clean", "--output_dir", tmp_path / "out"]
    status, _, error = run(*arguments)
    assert status == 1
    assert "2 could not be scored" in error
    assert read_results(tmp_path / "out")["splits"]["test-clean"]["utterances"] == 1
    with open(tmp_path / "out" / "skipped.csv", encoding="utf-8", newline="") as stream:
        reasons = {row["id"]: row["reason"] for row in csv.DictReader(stream)}
    assert "the file is empty" in reasons[first.stem]
    assert "missing audio" in reasons[second.stem]
    assert len(reasons) == 2


def test_nothing_that_can_be_read_is_no_score(run, tiny_bundle, tmp_path):
    table = write_table(tmp_path / "table.csv", [("a", 1.0, "none.wav", "1", "ONE")])
    status, out, error = run(tiny_bundle, table, "--output_dir", tmp_path / "out")
    assert status == 1
    assert "WER" not in out
    assert "none.wav: no such file" in error


def test_mistakes_do_not_wait_for_torch(tmp_path, tone_corpus):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").touch()
    twice = write_table(tmp_path / "twice.csv", [("a", 1.0, "a.wav", "1", "ONE")] * 2)
    (tmp_path / "columns.csv").write_text("ID,text\na,ONE\n", encoding="utf-8")
    empty = write_table(tmp_path / "empty.csv", [])
    tab = write_table(tmp_path / "tab.csv", [("a\tb", 1.0, "a.wav", "1", "ONE")])
    (tmp_path / "folder").mkdir()
    training = tmp_path / "training"
    shutil.copytree(tone_corpus / "dev-clean", training / "train-clean-5")
    (tmp_path / "letters.txt").write_text("O N E T W O", encoding="utf-8")
    letters = tmp_path / "letters.arpa"
    assert make_ngram([str(tmp_path / "letters.txt"), "--output", str(letters)]) == 0
    cases = [
        (["--help"], 0, ""),
        ([model], 2, "required: CORPUS_OR_MANIFEST"),
        (["nowhere", tone_corpus], 2, "there is no folder nowhere. Train one (make demo"),
        ([model, tmp_path / "none"], 2, "No corpus:"),
        ([model, tmp_path / "folder"], 2, "is not LibriSpeech"),
        ([model, tone_corpus / "test-clean"], 2, "looks like one split"),
        ([model, tone_corpus, "--split", "test-noisy"], 2, "its splits are dev-clean, test-clean"),
        ([model, training], 2, "choose with --split"),
        ([model, tone_corpus, "--data_root", tone_corpus], 2, "--data_root belongs to a manifest"),
        ([model, twice, "--split", "a"], 2, "--split belongs to a folder"),
        ([model, twice], 2, "ids more than once: a."),
        ([model, tab], 2, "has the id 'a\\tb'; wanted one line without tabs"),
        ([model, tmp_path / "columns.csv"], 2, "has the columns"),
        ([model, empty], 2, "has no utterances"),
        ([model, tone_corpus, "--kenlm_model_path", "none"], 2, "none: there is no such file"),
        ([model, tone_corpus, "--kenlm_model_path", letters], 2, "an n-gram of characters"),
    ]
    assert_answers_without_torch("evaluate", cases)


def test_chunks_of_several_lengths_are_rows_of_a_comparison(run, tone_corpus, tmp_path):
    lengths = ("full", "1280ms", "160ms")
    for seed in (1, 2):
        folder = make_run(tmp_path / "runs" / str(seed), "CTC/demo_streaming", seed=seed)
        status, out, _ = run(
            *(folder, tone_corpus, "--split", "test-clean", "--search", "greedy"),
            *("--output_dir", folder / "evaluations" / "tones"),
            *("--chunk_ms", "full", "1280", "160", "160"),
        )
        assert status == 0
        assert [out.count(f"test-clean {length} ") for length in lengths] == [1, 1, 1]
        for length in lengths:
            reports = folder / "evaluations" / "tones" / length
            texts = read_hypotheses(reports / "hyp_test-clean.tsv")
            recordings = {path.stem: path for path in tone_corpus.rglob("test-clean/**/*.flac")}
            chunk_ms = None if length == "full" else float(length.removesuffix("ms"))
            recognizer = Recognizer.from_run(folder, device="cpu")
            assert texts
            for name, (_, words) in texts.items():
                found = recognizer.transcribe(recordings[name], search="greedy", chunk_ms=chunk_ms)
                assert words == found.text.split()
        for file in (folder / "evaluations" / "tones" / "full").iterdir():
            shutil.copy(file, folder)
        results = json.loads((folder / "results.json").read_text())
        results["run"] = {**results["run"], "seed": seed}
        (folder / "results.json").write_text(json.dumps(results))
    table = compare([tmp_path / "runs"])
    names = [line.split("|")[1].strip() for line in table.splitlines()[2:] if "|" in line]
    assert names == [
        "runs, 2 seeds",
        *(f"runs:evaluations/tones/{name}, 2 seeds" for name in ("160ms", "1280ms", "full")),
    ]


def test_lengths_that_cannot_be_are_named_before_anything_is_recognised(run, tone_corpus, tmp_path):
    folder = make_run(tmp_path / "run", "CTC/demo_streaming")
    for length, message in (("650", "multiple of 40 ms"), ("-1", "above zero"), ("all", "all")):
        status, out, error = run(folder, tone_corpus, "--chunk_ms", "full", length)
        assert status
        assert message in error
        assert "Reports" not in out
