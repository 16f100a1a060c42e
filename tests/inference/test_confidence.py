"""The area under the curve that says whether confidences rank right words above wrong ones."""

import pytest

from inference.scoring.confidence import confidence_area, right_words
from inference.transcript import Word


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
