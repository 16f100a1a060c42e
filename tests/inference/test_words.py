"""Tokens with their frames become the words of the text, each exactly once, in order."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.words import Placed, words_of

PIECES = st.lists(
    st.text(alphabet="AB'é▁", min_size=1, max_size=5) | st.sampled_from(["▁", "▁A", "B"]),
    max_size=12,
)


def text_of(pieces):
    """What sentencepiece spells."""
    return "".join(pieces).replace("▁", " ").strip()


@st.composite
def placements(draw, pieces):
    """Frames in order for each token; for some runs of tokens none."""
    placed, frame = [], 0
    for piece in pieces:
        start = frame + draw(st.integers(0, 3))
        frame = start + draw(st.integers(1, 3))
        if draw(st.integers(0, 3)):
            placed.append(Placed(piece, start, frame, draw(st.floats(-50, 0))))
        else:
            placed.append(Placed(piece, None, None, -math.inf))
    return placed


@given(data=st.data(), pieces=PIECES, frame_s=st.sampled_from([0.01, 0.04, 1 / 3]))
def test_one_word_per_word_of_text_with_times_in_order(data, pieces, frame_s):
    placed = data.draw(placements(pieces))
    duration_s = data.draw(st.floats(0, 20))
    texts = text_of(pieces).split()
    words, tokens = words_of(texts, placed, frame_s, duration_s)
    assert [word.text for word in words] == texts
    times = [t for word in words for t in (word.start_s, word.end_s)]
    if not any("▁" in piece[1:] for piece in pieces):
        # A piece of two words is in both.
        assert times == sorted(times)
    assert all(0 <= t <= duration_s for t in times)
    for word in words:
        assert word.start_s <= word.end_s
        assert 0 <= word.confidence <= 1
        assert word.is_placed or word.confidence == 0
    assert [t.text for t in tokens] == [p.piece for p in placed if p.start_frame is not None]


@given(pieces=PIECES, words=st.lists(st.text("AB", min_size=1), max_size=5))
def test_tokens_that_spell_another_text_leave_every_word_its_share(pieces, words):
    placed = [Placed(piece, i, i + 1, -0.1) for i, piece in enumerate(pieces)]
    found, _ = words_of(words, placed, 0.1, 3.0)
    assert [word.text for word in found] == words
    if len(words) != len(text_of(pieces).split()):
        assert not any(word.is_placed for word in found)
        for word in found:
            assert word.end_s - word.start_s == pytest.approx(3.0 / len(words))


def test_words_without_a_place_share_the_gap():
    placed = [
        Placed("▁ON", 0, 1, math.log(0.5)),
        Placed("E", 3, 4, math.log(0.125)),
        *(Placed(piece, None, None, -math.inf) for piece in ("▁TWO", "▁TH", "REE")),
        Placed("▁FOUR", 20, 21, 0.0),
    ]
    words, tokens = words_of(["ONE", "TWO", "THREE", "FOUR"], placed, 0.1, 2.4)
    assert [(w.text, w.start_s, w.end_s, w.is_placed) for w in words] == [
        ("ONE", 0.0, 0.4, True),
        ("TWO", 0.4, pytest.approx(1.2), False),
        ("THREE", pytest.approx(1.2), 2.0, False),
        ("FOUR", 2.0, 2.1, True),
    ]
    assert [w.confidence for w in words] == [pytest.approx(0.25), 0, 0, 1.0]
    assert [t.text for t in tokens] == ["▁ON", "E", "▁FOUR"]


def test_a_piece_of_two_words_is_in_both():
    placed = [Placed("▁OF▁THE", 3, 4, 0.0), Placed("M", 6, 7, 0.0)]
    words, _ = words_of(["OF", "THEM"], placed, 0.1, 1.0)
    assert [(w.start_s, w.end_s) for w in words] == [(0.3, 0.4), (0.3, 0.7)]


@pytest.mark.parametrize(("frame_s", "longest_s"), [(0.02, 0.08), (0.04, 0.08), (0.1, 0.1)])
def test_a_token_that_is_held_ends_all_the_same(frame_s, longest_s):
    placed = [Placed("▁A", 2, 3, 0.0), Placed("B", 4, 30, -0.1), Placed("▁C", 31, 32, 0.0)]
    words, tokens = words_of(["AB", "C"], placed, frame_s, 5.0)
    assert [token.end_s - token.start_s for token in tokens] == pytest.approx(
        [frame_s, longest_s, frame_s]
    )
    assert words[0].start_s == pytest.approx(2 * frame_s)
    assert words[0].end_s == pytest.approx(4 * frame_s + longest_s)
    assert words[1].start_s == pytest.approx(31 * frame_s)
