"""The area under the curve that says whether confidences rank right words above wrong ones."""

import pytest

from inference.formats import FORMATS
from inference.scoring.confidence import confidence_area, main, right_words
from inference.scoring.reports import write_split_report
from inference.transcript import Transcript, Word


def words(text, confidences):
    return [Word(w, 0.0, 0.1, c) for w, c in zip(text.split(), confidences, strict=True)]


@pytest.mark.parametrize(
    ("said", "found", "right"),
    [
        ("A B C", "A B C", [True, True, True]),
        ("A B C", "A X C", [True, False, True]),
        ("A B C", "A C", [True, True]),
        ("A C", "A B C", [True, False, True]),
        ("", "A", [False]),
        ("A", "", []),
    ],
)
def test_which_words_are_right(said, found, right):
    assert right_words(said.split(), found.split()) == right


def test_the_area_is_how_often_a_right_word_outranks_a_wrong_one():
    pairs = [("A B", words("A X", [0.9, 0.1])), ("C D", words("C Y", [0.5, 0.7]))]
    # Of four pairs of a right and a wrong word, 0.9 wins both and 0.5 one.
    assert confidence_area(pairs) == pytest.approx(3 / 4)
    assert confidence_area([("A B", words("A X", [0.4, 0.4]))]) == pytest.approx(0.5)


def test_letter_case_may_not_matter():
    pairs = [("a B", words("A x", [0.9, 0.1]))]
    assert confidence_area(pairs) is None
    assert confidence_area(pairs, ignore_case=True) == 1.0


def test_without_right_or_wrong_words_there_is_none():
    assert confidence_area([("A", words("A", [0.4]))]) is None
    assert confidence_area([("A", words("B", [0.4]))]) is None
    assert confidence_area([]) is None


def evaluation(folder, said, found):
    """What evaluate.py leaves of one utterance."""
    folder.mkdir()
    text = " ".join(word.text for word in found)
    write_split_report(folder, "dev", ["u1"], [said], [text], audio_s=1.0, decode_s=0.1)
    transcript = Transcript(text=text, words=tuple(found), duration_s=1.0)
    (folder / "hyp_dev.jsonl").write_text(FORMATS["json"](transcript, "u1"))
    return str(folder)


def test_evaluations_of_several_seeds_are_pooled(tmp_path, capsys):
    folders = [
        evaluation(tmp_path / "1", "A B", words("A X", [0.9, 0.1])),
        evaluation(tmp_path / "2", "C D", words("C Y", [0.5, 0.7])),
    ]
    assert main([*folders, "--split", "dev"]) == 0
    assert "4 words of 2 evaluations" in (printed := capsys.readouterr().out)
    assert "75.0%" in printed


def test_a_folder_without_scores_is_named(tmp_path, capsys):
    assert main([str(tmp_path), "--split", "dev"]) == 2
    assert f"{tmp_path}: evaluate.py left no scores of dev" in capsys.readouterr().err
