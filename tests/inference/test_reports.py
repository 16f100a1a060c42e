"""The files an evaluation leaves, and the numbers in them."""

import json
import re
import unicodedata

import pytest

from inference.scoring.error_analysis import case_hint
from inference.scoring.reports import (
    SplitScore,
    read_hypotheses,
    read_results,
    record_evaluation,
    results_table,
    run_record,
    update_results,
    write_split_report,
)

IDS = ["5-1-0000", "5-1-0001", "6-1-0000", "6-1-0001", "6-1-0002"]
REFERENCES = ["THE CAT SAT ON THE MAT", "", "മലയാളം ഒരു ഭാഷ", "YES", "NO ONE"]
HYPOTHESES = ["THE CAT SAT AT MAT NOW", "UH", "മലയാളം ഭാഷ", "", "NO ONE"]


def score(**changes) -> SplitScore:
    fields = {
        "wer": 12.5,
        "cer": 4.25,
        "ins": 1,
        "del_": 2,
        "sub": 3,
        "words": 48,
        "utterances": 9,
        "audio_s": 100.0,
        "decode_s": 25.0,
    }
    return SplitScore(**(fields | changes))


def write(folder, references=REFERENCES, hypotheses=HYPOTHESES, ids=IDS):
    return write_split_report(
        folder, "test-other", ids, references, hypotheses, audio_s=20, decode_s=5
    )


def test_score_counts_every_kind_of_error(tmp_path):
    result = write(tmp_path)
    # Counted by hand: ON -> AT, THE, YES and the Malayalam word lost, NOW and UH invented.
    assert (result.sub, result.del_, result.ins) == (1, 3, 2)
    assert (result.words, result.utterances) == (12, 5)
    assert result.wer == pytest.approx(50.0)
    assert (result.audio_s, result.decode_s, result.real_time_factor) == (20.0, 5.0, 0.25)


def test_cer_counts_the_boundary_between_words_as_a_character(tmp_path):
    # "_B" is missing from the four characters "A_B" + "C".
    result = write(tmp_path, ["A B", "C"], ["A", "C"], ["x", "y"])
    assert result.cer == pytest.approx(100 * 2 / 4)
    assert result.wer == pytest.approx(100 * 1 / 3)


def test_error_rate_files_begin_with_the_rate_and_align_every_utterance(tmp_path):
    result = write(tmp_path)
    lines = (tmp_path / "wer_test-other.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "%WER 50.00 [ 6 / 12, 2 ins, 3 del, 1 sub ]"
    start = next(i for i, line in enumerate(lines) if line.startswith("5-1-0000, %WER"))
    assert [cell.strip() for cell in lines[start + 1].split(";")] == [
        *["THE", "CAT", "SAT", "ON", "THE", "MAT"],
        "<eps>",
    ]
    assert "".join(lines[start + 2].split(";")).split() == ["=", "=", "=", "S", "D", "=", "I"]
    assert sum(line.split(",")[0] in IDS for line in lines) == len(IDS)
    characters = (tmp_path / "cer_test-other.txt").read_text(encoding="utf-8")
    assert characters.startswith(f"%WER {result.cer:.2f} [")
    # A character takes one column, also where one is missing.
    lines = characters.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("5-1-0000, %WER"))
    reference, operations, hypothesis = (line[::2] for line in lines[start + 1 : start + 4])
    assert reference.replace("*", "") == "THE_CAT_SAT_ON_THE_MAT"
    assert hypothesis.replace("*", "") == "THE_CAT_SAT_AT_MAT_NOW"
    assert len(reference) == len(operations) == len(hypothesis)


def test_hypotheses_are_read_back_as_written(tmp_path):
    references = ["  two  blanks ", 'a "quoted" word', "മലയാളം", "", "x"]
    hypotheses = ["two blanks", "", "മല യാളം", "a\tb\nc", "x"]
    write(tmp_path, references, hypotheses)
    found = read_hypotheses(tmp_path / "hyp_test-other.tsv")
    assert list(found) == IDS
    assert [pair[0] for pair in found.values()] == [text.split() for text in references]
    assert [pair[1] for pair in found.values()] == [text.split() for text in hypotheses]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "first line"),
        ("id,reference,hypothesis\n", "first line"),
        ("id\treference\thypothesis\nx\ty\n", "line 2: 2 columns"),
        ("id\treference\thypothesis\nx\ty\tz\nx\ty\tz\n", "line 3: x is there twice"),
    ],
)
def test_damaged_hypotheses_are_refused(tmp_path, content, message):
    path = tmp_path / "hyp_x.tsv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_hypotheses(path)


def test_error_analysis_ranks_words_and_utterances(tmp_path):
    references = ["FIVE NINE", "FIVE", "THE FIVE", "THE END", "GOOD DAY"]
    hypotheses = ["NINE NINE", "NINE", "FIVE", "A END OH", "GOOD DAY"]
    write(tmp_path, references, hypotheses)
    text = (tmp_path / "errors_test-other.txt").read_text(encoding="utf-8")
    assert text.startswith("%WER 55.56: 5 errors in 9 words; 4 of 5 utterances")
    substitutions, deletions, insertions, worst = text.split("\n\n", 4)[1:]
    assert [line.split(maxsplit=1) for line in substitutions.splitlines()[2:]] == [
        ["2", "FIVE -> NINE"],
        ["1", "THE -> A"],
    ]
    assert deletions.splitlines()[2:] == ["     1  THE (2)"]
    assert insertions.splitlines()[2:] == ["     1  OH"]
    shown = [line.split(",")[0] for line in worst.splitlines() if ", %WER" in line]
    # Of the two at 100 % the one with more errors leads; the correct one is not shown.
    assert shown == ["6-1-0001", "5-1-0001", "5-1-0000", "6-1-0000"]


def test_error_analysis_counts_characters_lengths_and_speakers(tmp_path):
    references = ["THE CAT SAT ON THE MAT", "FIVE", "NINE", "", "FIVE " * 41]
    hypotheses = ["THE CAT SAD ON THE MAD", "NINE", "NINE", "OH", "FIVE " * 41]
    ids = ["a-1", "a-2", "b-1", "b-2", "c-1"]
    speakers = {key: key[0] for key in ids if key != "c-1"}
    write_split_report(
        *(tmp_path, "s", ids, references, hypotheses), audio_s=1, decode_s=1, speakers=speakers
    )
    blocks = (tmp_path / "errors_s.txt").read_text(encoding="utf-8").split("\n\n")
    named = {block.split(":")[0].split("\n")[0]: block.splitlines() for block in blocks}
    assert [line.split() for line in named["CONFUSED CHARACTERS"][2:]] == [
        ["2", "T", "->", "D"],
        ["1", "F", "->", "N"],
        ["1", "V", "->", "N"],
    ]
    assert [line.split(maxsplit=4) for line in named["BY LENGTH"][2:]] == [
        ["-", "1", "0", "1", "0"],
        ["50.00", "1", "2", "2", "1 to 2"],
        ["33.33", "2", "6", "1", "6 to 10"],
        ["0.00", "0", "41", "1", "41 and more"],
    ]
    assert [line.split() for line in named["BY SPEAKER"][2:]] == [
        ["100.00", "1", "1", "2", "b"],
        ["42.86", "3", "7", "2", "a"],
        ["0.00", "0", "41", "1", "unknown"],
    ]
    write(tmp_path)
    assert "BY SPEAKER" not in (tmp_path / "errors_test-other.txt").read_text(encoding="utf-8")


def test_error_analysis_shows_where_nothing_was_recognised(tmp_path):
    write(tmp_path)
    text = (tmp_path / "errors_test-other.txt").read_text(encoding="utf-8")
    assert "3 by WER, then 1 in which nothing was recognised" in text
    assert text.rstrip("\n").splitlines()[-4].startswith("6-1-0001, %WER 100.00")


def test_error_analysis_is_cut_at_the_commonest(tmp_path):
    references = [f"W{i}" for i in range(40)]
    write(tmp_path, references, ["X"] * 40, [f"{i:02d}" for i in range(40)])
    text = (tmp_path / "errors_test-other.txt").read_text(encoding="utf-8")
    assert "SUBSTITUTIONS: 40, 40 different" in text
    assert text.split("CONFUSED")[0].count(" -> X") == 30
    assert "... and 10 more" in text
    assert sum(", %WER" in line for line in text.splitlines()) == 20


def test_flawless_split(tmp_path):
    result = write(tmp_path, REFERENCES, REFERENCES)
    assert (result.wer, result.cer) == (0.0, 0.0)
    text = (tmp_path / "errors_test-other.txt").read_text(encoding="utf-8")
    assert "every utterance is right" in text


def test_split_without_any_reference_word_has_rate_zero_and_counts_insertions(tmp_path, caplog):
    result = write(tmp_path, ["", ""], ["OH NO", ""], ["x", "y"])
    assert (result.wer, result.words, result.ins) == (0.0, 0, 2)
    update_results(tmp_path, {"test-other": result}, {}, {})
    assert "test-other has no words in its references, so it has no error rate" in caplog.text
    assert results_table({"x": result}).splitlines()[-1].split()[:3] == ["x", "-", "-"]
    caplog.clear()
    write(tmp_path, ["", ""], ["", ""], ["x", "y"])
    assert not caplog.text


def test_accents_count_as_the_same_however_they_are_written(tmp_path):
    said = [unicodedata.normalize(form, "ÉTÉ") for form in ("NFC", "NFD")]
    result = write(tmp_path, said, said[::-1], ["x", "y"])
    assert (result.wer, result.cer) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("ids", "references", "hypotheses", "message"),
    [
        ([], [], [], "no utterance"),
        (["x"], ["A", "B"], ["A"], "1 ids, 2 references and 1 hypotheses"),
        (["x", "y", "x"], ["A"] * 3, ["A"] * 3, "more than once: x$"),
        (["x\ty"], ["A"], ["A"], "without tabs"),
        (["x\ny"], ["A"], ["A"], "one line"),
    ],
)
def test_utterances_that_cannot_be_reported_are_refused_before_anything_is_written(
    tmp_path, ids, references, hypotheses, message
):
    with pytest.raises(ValueError, match=message):
        write(tmp_path, references, hypotheses, ids)
    assert not list(tmp_path.iterdir())


def test_reports_replace_older_ones_and_leave_nothing_else(tmp_path):
    write(tmp_path, REFERENCES, REFERENCES)
    write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "wer_test-other.txt",
        "cer_test-other.txt",
        "hyp_test-other.tsv",
        "errors_test-other.txt",
    }
    assert "50.00" in (tmp_path / "wer_test-other.txt").read_text(encoding="utf-8")


def test_results_have_the_agreed_keys(tmp_path):
    path = update_results(tmp_path, {"test-clean": score()}, {"parameters": 7}, {"seed": 1})
    results = json.loads(path.read_text(encoding="utf-8"))
    assert results == {
        "splits": {
            "test-clean": {
                "wer": 12.5,
                "cer": 4.25,
                "ins": 1,
                "del": 2,
                "sub": 3,
                "words": 48,
                "utterances": 9,
                "audio_s": 100.0,
                "decode_s": 25.0,
            }
        },
        "model": {"parameters": 7},
        "run": {"seed": 1},
    }
    assert SplitScore.from_json(results["splits"]["test-clean"]) == score()


def test_results_of_earlier_evaluations_stay(tmp_path):
    update_results(
        tmp_path, {"a": score(wer=1.0), "b": score(wer=2.0)}, {"parameters": 7}, {"x": 1}
    )
    path = update_results(tmp_path, {"b": score(wer=3.0)}, {"parameters": 8}, {"seed": 2})
    results = json.loads(path.read_text(encoding="utf-8"))
    assert {name: entry["wer"] for name, entry in results["splits"].items()} == {"a": 1.0, "b": 3.0}
    assert (results["model"], results["run"]) == ({"parameters": 8}, {"seed": 2})


def test_an_evaluation_that_is_called_like_a_split_stays(tmp_path):
    update_results(tmp_path, {"a": score()}, {}, {"seed": 1})
    record_evaluation(tmp_path, "a", {"a": score(wer=2.0)}, {"beam": 1}, {"seed": 1})
    update_results(tmp_path, {"a": score(), "b": score()}, {}, {"seed": 3}, test_only=True)
    evaluations = read_results(tmp_path)["evaluations"]
    assert evaluations["a"]["splits"]["a"]["wer"] == 2.0
    assert evaluations["b"] == {"seed": 3}


def test_results_have_the_intervals_whatever_the_order_of_the_utterances(tmp_path):
    in_order, reversed_ = (
        write(tmp_path),
        write(tmp_path, REFERENCES[::-1], HYPOTHESES[::-1], IDS[::-1]),
    )
    assert in_order.wer_interval == reversed_.wer_interval
    assert in_order.wer_interval.low < in_order.wer < in_order.wer_interval.high
    assert in_order.cer_interval.low < in_order.cer < in_order.cer_interval.high
    update_results(tmp_path, {"a": in_order, "b": in_order}, {}, {})
    path = update_results(tmp_path, {"b": score()}, {}, {})
    intervals = json.loads(path.read_text(encoding="utf-8"))["intervals"]
    assert intervals == {
        "a": {
            "wer": [in_order.wer_interval.low, in_order.wer_interval.high],
            "cer": [in_order.cer_interval.low, in_order.cer_interval.high],
        }
    }


def test_table_shows_the_intervals_on_request(tmp_path):
    result = write(tmp_path)
    low, high = result.wer_interval.low, result.wer_interval.high
    table = results_table({"a": result, "b": score()}, intervals=True)
    cells = [re.split("  +", line) for line in table.splitlines()]
    assert cells[0][:3] == ["split", "WER %", "95 % interval"]
    assert cells[2][:3] == ["a", "50.00", f"{low:.2f} to {high:.2f}"]
    assert cells[3][:5] == ["b", "12.50", "-", "4.25", "-"]


def test_a_failed_update_leaves_the_results_as_they_were(tmp_path):
    path = update_results(tmp_path, {"a": score()}, {}, {})
    before = path.read_bytes()
    with pytest.raises(TypeError):
        update_results(tmp_path, {"b": score()}, {"parameters": object()}, {})
    assert path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("content", ['{"splits": {', "[]", "{}"])
def test_unreadable_results_are_set_aside_not_lost(tmp_path, caplog, content):
    (tmp_path / "results.json").write_text(content, encoding="utf-8")
    path = update_results(tmp_path, {"a": score()}, {}, {})
    assert list(json.loads(path.read_text(encoding="utf-8"))["splits"]) == ["a"]
    assert (tmp_path / "results.json.unreadable").read_text(encoding="utf-8") == content
    assert "kept as" in caplog.text


def test_a_score_with_unknown_keys_is_refused():
    with pytest.raises(ValueError, match="not the scores of a split"):
        SplitScore.from_json({"wer": 1.0})


def test_run_record_tells_versions_and_a_command_that_can_be_pasted():
    record = run_record(
        seed=3, precision="bf16", device="cpu", command=["train.py", "a b", "--x=1"]
    )
    assert record.keys() == {"seed", "commit", "versions", "precision", "device", "command"}
    assert record["command"] == "train.py 'a b' --x=1"
    assert record["versions"].keys() == {"python", "torch", "speechbrain", "mamba_asr"}
    assert all(record["versions"][name] for name in ("python", "torch", "speechbrain"))


SPLITS = {
    "test-clean": score(wer=2.0, audio_s=7384.0, decode_s=738.4),
    "x": score(audio_s=59.94, decode_s=6.0),
    "empty": score(audio_s=0.0, decode_s=0.0),
}


def test_terminal_table_is_aligned():
    lines = results_table(SPLITS).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [line.split() for line in lines[2:]] == [
        ["test-clean", "2.00", "4.25", "2", "h", "03", "min", "0.100"],
        ["x", "12.50", "4.25", "59.9", "s", "0.100"],
        ["empty", "12.50", "4.25", "0.0", "s", "-"],
    ]


@pytest.mark.parametrize(
    "results",
    [
        {"splits": {"a": None}},
        {"splits": {"a": {"wer": None}}},
        {"splits": {}, "run": None},
        {"splits": {}, "evaluations": {"x": None}},
        {"splits": {}, "intervals": []},
    ],
    ids=json.dumps,
)
def test_results_with_a_hole_are_kept_aside_and_named(tmp_path, results):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results), encoding="utf-8")
    with pytest.raises(ValueError, match=r"results\.json.*[Ee]valuate again"):
        read_results(tmp_path)
    update_results(tmp_path, {"b": score()}, {}, {})
    assert read_results(tmp_path)["splits"].keys() == {"b"}
    assert json.loads((tmp_path / "results.json.unreadable").read_text()) == results


def test_it_is_said_where_words_differ_in_letter_case_alone():
    texts = [("one two", "ONE TWO"), ("three", "FOUR")]
    assert "WER would be 33.33 % instead of 100.00 %" in case_hint(texts, 100.0)
    assert case_hint([("ONE TWO", "ONE"), ("three", "four")], 50.0) is None


def test_scores_of_other_weights_do_not_stay(tmp_path):
    update_results(tmp_path, {"a": score(), "b": score()}, {"weights": "one"}, {})
    update_results(tmp_path, {"a": score(wer=5.0)}, {"weights": "one"}, {})
    assert read_results(tmp_path)["splits"].keys() == {"a", "b"}
    update_results(tmp_path, {"a": score(wer=3.0)}, {"weights": "two"}, {})
    results = read_results(tmp_path)
    assert results["splits"].keys() == {"a"}
    assert "b" not in results.get("intervals", {})
    for weights, kept in (("two", {"a"}), ("two", {"a", "b"}), ("three", {"c"})):
        split = sorted(kept)[-1]
        record_evaluation(tmp_path, "lm", {split: score()}, {"beam": 1}, {"weights": weights})
        assert read_results(tmp_path)["evaluations"]["lm"]["splits"].keys() == kept
