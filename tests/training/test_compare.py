"""Comparison of runs: what it measures, and what it refuses to compare."""

import json
import math
import shutil

import numpy as np
import pytest

from inference.scoring.bootstrap import resample_counts
from inference.scoring.reports import record_evaluation, update_results, write_split_report
from training import compare as compare_module
from training.compare import compare, main

UTTERANCES = 300
WORDS = "ONE TWO THREE FOUR"


def make_run(
    folder, wrong_words, splits=("test-clean",), reference=WORDS, ids=None, seed=None, **model
):
    """A run whose i-th utterance of four words has ``wrong_words[i]`` wrong ones."""
    ids = ids or [f"1-1-{i:04d}" for i in range(len(wrong_words))]
    words = reference.split()
    hypotheses = [" ".join(["WRONG"] * n + words[n:]) for n in wrong_words]
    scores = {
        split: write_split_report(
            folder, split, ids, [reference] * len(ids), hypotheses, audio_s=100, decode_s=4
        )
        for split in splits
    }
    update_results(folder, scores, {"parameters": 1234567} | model, {"seed": seed})
    return folder


@pytest.fixture
def wrong_words():
    return np.random.default_rng(1).integers(0, 3, UTTERANCES)


def cells(report, row):
    """The cells of the table rows that begin with the names in ``row``."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in report.splitlines()]
    return [found for found in rows if tuple(found[: len(row)]) == row]


def interval(cell):
    return [float(number) for number in cell.split(" to ")]


def test_scores_and_their_interval(tmp_path, wrong_words):
    run = make_run(tmp_path / "a", wrong_words)
    (row,) = cells(compare([run], samples=4000), ("a", "test-clean"))
    wer = 100 * wrong_words.sum() / (4 * UTTERANCES)
    assert row[2:4] == [str(UTTERANCES), f"{wer:.2f}"]
    assert row[6:] == ["1,234,567", "0.040"]
    # All utterances have four words, so that the WER is a mean: its standard error is known.
    error = 100 * wrong_words.std() / 4 / math.sqrt(UTTERANCES)
    low, high = interval(row[4])
    assert low == pytest.approx(wer - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(wer + 1.96 * error, abs=0.15 * error)
    # Without options it is the interval that the run itself recorded.
    (row,) = cells(compare([run]), ("a", "test-clean"))
    recorded = json.loads((run / "results.json").read_text())["intervals"]["test-clean"]["wer"]
    assert row[4] == "{:.2f} to {:.2f}".format(*recorded)


def test_pairing_sees_a_difference_that_the_intervals_alone_do_not(tmp_path, wrong_words):
    better = wrong_words - (np.arange(UTTERANCES) % 10 == 0) * (wrong_words > 0)
    runs = [make_run(tmp_path / "a", wrong_words), make_run(tmp_path / "b", better)]
    report = compare(runs)
    first, second = (interval(cells(report, (name, "test-clean"))[0][4]) for name in "ab")
    assert second[1] > first[0]
    (difference,) = (row[8:] for row in cells(report, ("b", "test-clean")))
    gained = 100 * (better - wrong_words).sum() / (4 * UTTERANCES)
    assert float(difference[0]) == pytest.approx(gained, abs=0.005)
    low, high = interval(difference[1])
    assert low < gained < high < 0
    assert difference[2] == "100.0 %"
    assert cells(report, ("a", "test-clean"))[0][8:] == ["-", "-", "-"]


def test_runs_that_err_alike_are_even(tmp_path, wrong_words):
    runs = [make_run(tmp_path / name, wrong_words) for name in "ab"]
    (difference,) = (row[8:] for row in cells(compare(runs), ("b", "test-clean")))
    assert difference == ["+0.00", "+0.00 to +0.00", "50.0 %"]


def test_the_report_depends_on_the_seed_alone(tmp_path, wrong_words):
    runs = [make_run(tmp_path / "a", wrong_words), make_run(tmp_path / "b", wrong_words[::-1])]
    assert compare(runs, seed=3) == compare(runs, seed=3)
    assert compare(runs, seed=3) != compare(runs, seed=4)


def test_the_order_of_utterances_in_a_file_does_not_matter(tmp_path, wrong_words):
    ids = [f"1-1-{i:04d}" for i in range(UTTERANCES)]
    runs = [
        make_run(tmp_path / "a", wrong_words, ids=ids),
        make_run(tmp_path / "b", wrong_words[::-1], ids=ids[::-1]),
    ]
    (difference,) = (row[8:] for row in cells(compare(runs), ("b", "test-clean")))
    assert difference == ["+0.00", "+0.00 to +0.00", "50.0 %"]


def test_resampled_sums_do_not_depend_on_how_they_are_batched(monkeypatch):
    counts = np.arange(14).reshape(7, 2)
    whole = resample_counts(counts, 50, np.random.default_rng(0))
    monkeypatch.setattr("inference.scoring.bootstrap._ENTRIES_AT_ONCE", 20)
    np.testing.assert_array_equal(resample_counts(counts, 50, np.random.default_rng(0)), whole)
    # The second column exceeds the first by one in each of the seven utterances that are drawn.
    np.testing.assert_array_equal(whole[:, 1] - whole[:, 0], np.full(50, 7))


def test_empty_references_and_missing_facts(tmp_path):
    folder = make_run(tmp_path / "a", [0, 0], reference="")
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    results["model"] = {}
    results["splits"]["test-clean"]["audio_s"] = 0
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    (row,) = cells(compare([folder]), ("a", "test-clean"))
    assert row[3:] == ["0.00", "0.00 to 0.00", "0.00", "-", "-"]


def test_words_recognised_where_none_were_said_are_no_flawless_score(tmp_path, wrong_words):
    silence = make_run(tmp_path / "silence", [0, 0])
    score = write_split_report(
        *(silence, "noise", ["1-1-0000"], [""], ["TWO WORDS"]), audio_s=9, decode_s=1
    )
    update_results(silence, {"noise": score}, {}, {})
    report = compare([silence])
    assert cells(report, ("silence", "test-clean"))
    assert not cells(report, ("silence", "noise"))
    assert "Without a word in the references and so left out: silence on noise." in report
    alone = make_run(tmp_path / "alone", [0])
    results = json.loads((silence / "results.json").read_text(encoding="utf-8"))
    del results["splits"]["test-clean"]
    (alone / "results.json").write_text(json.dumps(results), encoding="utf-8")
    with pytest.raises(ValueError, match="no split that has been evaluated has a word"):
        compare([alone])


def test_seeds_that_were_scored_on_silence_are_compared_in_the_rest(tmp_path):
    for seed, hypothesis in ((1, ""), (2, "A WORD")):
        run = make_run(tmp_path / "recipe" / str(seed), [0, 1])
        folder = run / "evaluations" / "noise"
        score = write_split_report(
            *(folder, "noise", ["n-1"], [""], [hypothesis]), audio_s=9, decode_s=1
        )
        update_results(folder, {"noise": score}, {}, {})
    report = compare([tmp_path / "recipe"])
    assert cells(report, ("recipe, 2 seeds", "test-clean"))
    assert report.endswith("so left out: recipe:evaluations/noise on noise.\n")


def test_splits_that_only_one_run_has_are_named(tmp_path, wrong_words):
    runs = [
        make_run(tmp_path / "a", wrong_words, ["test-clean", "dev-clean"]),
        make_run(tmp_path / "b", wrong_words, ["test-clean", "test-other"]),
    ]
    report = compare(runs)
    assert "Not in both a and b: dev-clean, test-other." in report
    assert cells(report, ("b", "test-other"))[0][8:] == ["-", "-", "-"]
    assert cells(report, ("b", "test-clean"))[0][8] != "-"


def test_runs_are_named_by_what_tells_them_apart(tmp_path, wrong_words):
    runs = [make_run(tmp_path / name / "3407", wrong_words) for name in ("small", "large")]
    report = compare(runs)
    assert cells(report, ("small/3407", "test-clean"))
    assert "against small/3407" in cells(report, ("run",))[0]


def test_command_prints_and_writes_the_table(tmp_path, wrong_words, capsys):
    run = make_run(tmp_path / "a", wrong_words)
    main([str(run), "--markdown", str(tmp_path / "table.md"), "--samples", "100"])
    printed = capsys.readouterr().out
    assert printed.startswith("| run | split ")
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == printed


def break_run(folder, how):
    if how == "no folder":
        return folder / "missing"
    if how == "no results":
        (folder / "results.json").unlink()
    elif how == "no json":
        (folder / "results.json").write_text("{", encoding="utf-8")
    elif how == "no split":
        (folder / "results.json").write_text('{"splits": {}}', encoding="utf-8")
    elif how == "no hypotheses":
        (folder / "hyp_test-clean.tsv").unlink()
    elif how == "other hypotheses":
        hypotheses = folder / "hyp_test-clean.tsv"
        text = hypotheses.read_text(encoding="utf-8")
        hypotheses.write_text(text.replace("WRONG", "ONE", 1), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no folder", "there is no folder"),
        ("no results", "no results.json"),
        ("no json", "not valid JSON"),
        ("no split", "no split has been evaluated"),
        ("no hypotheses", "hyp_test-clean.tsv is missing"),
        ("other hypotheses", "not from one evaluation"),
    ],
)
def test_a_folder_that_is_no_evaluated_run_gives_one_message(tmp_path, capsys, how, message):
    run = break_run(make_run(tmp_path / "a", [1, 1, 1]), how)
    with pytest.raises(SystemExit) as stopped:
        main([str(run)])
    assert stopped.value.code not in (0, None)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert len(printed.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": ["1-1-0000", "9-9-9999"]}, r"test-clean: a and b were not scored on the same"),
        ({"reference": "SOMETHING ELSE"}, r"test-clean: a and b have different references for 2"),
        ({"splits": ["dev-clean"]}, "a and b have no split in common"),
    ],
)
def test_runs_that_do_not_match_are_refused_by_name(tmp_path, changes, message):
    runs = [make_run(tmp_path / "a", [1, 1]), make_run(tmp_path / "b", [1, 1], **changes)]
    with pytest.raises(ValueError, match=message):
        compare(runs)


def test_a_run_is_not_compared_with_itself(tmp_path):
    run = make_run(tmp_path / "a", [1])
    with pytest.raises(ValueError, match="with itself"):
        compare([run, run])


def test_at_least_one_bootstrap_sample(tmp_path):
    with pytest.raises(ValueError, match="at least 1"):
        compare([make_run(tmp_path / "a", [1])], samples=0)


def test_named_evaluations_have_rows_of_their_own(tmp_path, wrong_words):
    run = make_run(tmp_path / "a", wrong_words)
    better = np.maximum(wrong_words - 1, 0)
    for name, split, wrong in (("lm", "test-clean", better), ("mine", "mine", wrong_words[:5])):
        ids = [f"1-1-{i:04d}" for i in range(len(wrong))]
        hypotheses = [" ".join(["WRONG"] * n + WORDS.split()[n:]) for n in wrong]
        score = write_split_report(
            *(run / "eval" / name, split, ids, [WORDS] * len(ids), hypotheses),
            audio_s=100,
            decode_s=4,
        )
        record_evaluation(run, name, {split: score}, {"beam": 1}, {})
    report = compare([run])
    (own,), (lm,), (mine,) = (cells(report, (name,)) for name in ("a", "a:lm", "a:mine"))
    assert [own[1], lm[1], mine[1]] == ["test-clean", "test-clean", "mine"]
    assert float(lm[3]) < float(own[3])
    assert float(lm[8]) == pytest.approx(float(lm[3]) - float(own[3]), abs=0.011)
    assert mine[8:] == ["-", "-", "-"]
    shutil.rmtree(run / "eval" / "lm")
    assert "a:lm" not in compare([run])


def test_runs_are_drawn_by_their_parameters(tmp_path, wrong_words, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(compare_module, "plot_sizes", lambda points, path: drawn.append(points))
    runs = [
        make_run(tmp_path / "a", wrong_words, parameters=3_000_000),
        make_run(tmp_path / "b", wrong_words // 2, parameters=30_000_000),
        make_run(tmp_path / "c", wrong_words, parameters=None),
    ]
    main([*map(str, runs), "--plot", str(tmp_path / "sizes.png")])
    rows = {name: cells(capsys.readouterr().out, (name, "test-clean"))[0] for name in "a"}
    (points,) = drawn
    assert [(point[0], point[2]) for point in points] == [("a", 3_000_000), ("b", 30_000_000)]
    assert f"{points[0][3]:.2f}" == rows["a"][3]
    assert "{:.2f} to {:.2f}".format(*points[0][4:]) == rows["a"][4]
    with pytest.raises(SystemExit):
        main([str(runs[2]), "--plot", str(tmp_path / "sizes.png")])
    assert "nothing to plot" in capsys.readouterr().err


def make_recipe(folder, wrong_words, rng, seeds=(1, 2, 3), spread=0.1):
    """Runs with ``wrong_words`` and some more errors, by chance, and their mean WER in percent."""
    total = []
    for seed in seeds:
        more = rng.random(len(wrong_words)) < rng.uniform(0, 2 * spread)
        make_run(folder / str(seed), wrong_words + more, seed=seed)
        total.append(100 * (wrong_words + more).sum() / (4 * len(wrong_words)))
    return folder, total


def test_seeds_of_a_recipe_are_a_mean_with_their_deviation(tmp_path, wrong_words):
    rng = np.random.default_rng(5)
    folder, wers = make_recipe(tmp_path / "a", wrong_words, rng)
    (row,) = cells(compare([folder], samples=4000), ("a, 3 seeds", "test-clean"))
    assert row[3] == f"{np.mean(wers):.2f} ± {np.std(wers, ddof=1):.2f}"
    # Utterances and seeds: the variance of the mean over seeds is that of one, less correlated.
    low, high = interval(row[4])
    (one,) = cells(compare([folder / "1"], samples=4000), ("1", "test-clean"))
    seeds_error = np.std(wers, ddof=1) / math.sqrt(3)
    utterances_error = 100 * wrong_words.std() / 4 / math.sqrt(UTTERANCES)
    assert high - low > 3.7 * math.hypot(seeds_error, utterances_error)
    assert one[3] == f"{wers[0]:.2f}"


def test_intervals_end_at_zero_and_speeds_are_means(tmp_path):
    # One seed has no error, the other all of them.
    for seed, wrong in ((1, 0), (2, 1)):
        make_run(tmp_path / "a" / str(seed), np.full(20, wrong), seed=seed)
        results = tmp_path / "a" / str(seed) / "results.json"
        told = json.loads(results.read_text())
        told["splits"]["test-clean"]["decode_s"] = 10 + 80 * wrong
        results.write_text(json.dumps(told))
    (row,) = cells(compare([tmp_path / "a"], samples=1000), ("a, 2 seeds", "test-clean"))
    assert interval(row[4])[0] == 0
    assert row[7] == "0.500"


def test_recipes_are_paired_on_their_utterances(tmp_path, wrong_words):
    rng = np.random.default_rng(6)
    first, ours = make_recipe(tmp_path / "a", wrong_words, rng, spread=0.02)
    second, theirs = make_recipe(tmp_path / "b", wrong_words + 1, rng, spread=0.02)
    (difference,) = (row[8:] for row in cells(compare([first, second]), ("b, 3 seeds",)))
    gained = np.mean(theirs) - np.mean(ours)
    assert float(difference[0]) == pytest.approx(gained, abs=0.006)
    low, high = interval(difference[1])
    # The same words are wrong in both: the difference is far surer than either.
    assert low < gained < high < low + 4
    assert difference[2] == "0.0 %"
    mixed = compare([first, second / "1"])
    assert len(cells(mixed, ("b/1", "test-clean"))) == 1


def test_runs_that_are_no_seeds_of_one_recipe_are_named(tmp_path, wrong_words):
    for name, model in (("x", {"seed": 1}), ("y", {"seed": 2, "parameters": 7})):
        make_run(tmp_path / "a" / name, wrong_words, **model)
    with pytest.raises(ValueError, match="different models: a/x has 1234567 parameters, a/y 7"):
        compare([tmp_path / "a"])
    make_run(tmp_path / "b" / "x", wrong_words, seed=4)
    make_run(tmp_path / "b" / "y", wrong_words, seed=4)
    with pytest.raises(ValueError, match="several runs with seed 4"):
        compare([tmp_path / "b"])


def test_splits_that_not_every_seed_has_are_told(tmp_path, wrong_words):
    make_run(tmp_path / "a" / "1", wrong_words, splits=("dev", "test"), seed=1)
    make_run(tmp_path / "a" / "2", wrong_words, splits=("dev",), seed=2)
    report = compare([tmp_path / "a"])
    assert "Not in every run of a: test." in report
    assert cells(report, ("a, 2 seeds", "dev"))


def test_seeds_and_evaluations_that_do_not_count_are_told(tmp_path, wrong_words):
    for seed in (1, 2):
        make_run(tmp_path / "a" / str(seed), wrong_words, seed=seed)
    reports = tmp_path / "a" / "2" / "evaluations" / "beam"
    make_run(reports, wrong_words)
    (tmp_path / "a" / "3").mkdir()
    (tmp_path / "a" / "3" / "recipe.yaml").touch()
    report = compare([tmp_path / "a"])
    assert cells(report, ("a, 2 seeds", "test-clean"))
    assert report.endswith(
        "\n\nNot evaluated yet and so left out: a/3."
        "\n\nNot an evaluation of every run of a: evaluations/beam.\n"
    )
