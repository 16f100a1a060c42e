"""Long recordings: cut in their pauses, joined without losing or doubling a word."""

import itertools
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from inference.long_audio import Piece, cut_at_pauses, join
from inference.transcript import Token, Transcript, Word

RATE = 1000


def recording(speech_s, pause_s, seed=0):
    """Stretches of noise, each followed by a pause of quieter noise."""
    rng = np.random.default_rng(seed)
    parts = []
    for loud, quiet in zip(speech_s, pause_s, strict=True):
        parts.append(0.3 * rng.standard_normal(round(loud * RATE)))
        parts.append(0.003 * rng.standard_normal(round(quiet * RATE)))
    return np.concatenate(parts).astype(np.float32)


def assert_covered(pieces, start, stop):
    """Every sample from start to stop is in some piece."""
    covered = np.zeros(stop, bool)
    for piece in pieces:
        covered[piece.start : piece.stop] = True
    assert covered[start:stop].all()


def test_a_short_recording_stays_whole():
    assert cut_at_pauses(np.zeros(29 * RATE, np.float32), RATE) == [Piece(0, 29 * RATE, 29 * RATE)]


def test_cuts_lie_in_pauses():
    pieces = cut_at_pauses(recording([4.0] * 30, [0.8] * 30), RATE)
    assert len(pieces) >= 5
    for piece, following in itertools.pairwise(pieces):
        assert piece.stop < piece.cut < following.start
        assert piece.cut / RATE % 4.8 > 4.0


def test_where_silero_is_installed_it_says_where_speech_is(monkeypatch):
    rate = 8000
    speech_s = [(0.0, 9.0), (9.8, 21.0), (22.0, 40.0)]
    silero = ModuleType("silero_vad")
    silero.__spec__ = ModuleSpec("silero_vad", None)
    silero.load_silero_vad = lambda: "detector"

    def get_speech_timestamps(wav_S, detector, sampling_rate, return_seconds):
        assert (len(wav_S), detector, sampling_rate, return_seconds) == (
            *(40 * rate, "detector", rate, False),
        )
        return [{"start": round(a * rate), "end": round(b * rate)} for a, b in speech_s]

    silero.get_speech_timestamps = get_speech_timestamps
    monkeypatch.setitem(sys.modules, "silero_vad", silero)
    noise_S = np.random.default_rng(0).standard_normal(40 * rate).astype(np.float32)
    cuts_s = [piece.cut / rate for piece in cut_at_pauses(noise_S, rate)]
    assert cuts_s == pytest.approx([9.4, 21.5, 40.0], abs=0.02)


def test_of_a_long_pause_pieces_keep_a_little():
    pieces = cut_at_pauses(recording([8.0] * 6, [10.0] * 6), RATE)
    assert len(pieces) == 6
    for n, piece in enumerate(pieces):
        assert piece.start / RATE == pytest.approx(max(18 * n - 0.1, 0), abs=0.06)
        assert piece.stop / RATE == pytest.approx(18 * n + 8.1, abs=0.06)


def test_speech_without_a_pause_is_kept_beside_speech_with_one():
    # The background of the first half minute is the speech itself.
    pieces = cut_at_pauses(recording([70.0, 5.0], [20.0, 20.0]), RATE)
    assert_covered(pieces, 0, 70 * RATE)
    assert_covered(pieces, 90 * RATE, 95 * RATE)


@settings(max_examples=30, deadline=None)
@example(speech_s=[1.0, 5.90625], pause_s=5.875, max_s=12.0)
@given(
    speech_s=st.lists(st.floats(0.1, 70), min_size=1, max_size=8),
    pause_s=st.one_of(st.just(0.0), st.floats(0.2, 40.0)),
    max_s=st.floats(12, 40),
)
def test_pieces_cover_all_that_is_loud_and_none_is_too_long(speech_s, pause_s, max_s):
    wav_S = recording(speech_s, [pause_s] * len(speech_s))
    pieces = cut_at_pauses(wav_S, RATE, max_s)
    assert pieces[-1].cut == len(wav_S)
    for piece, following in itertools.pairwise(pieces):
        # Either both have the place of the cut, or it lies between them.
        assert (following.start < piece.cut) == (piece.stop > piece.cut)
        assert following.cut > piece.cut
    assert max(piece.stop - piece.start for piece in pieces) <= max_s * RATE + 1
    start = 0
    for loud_s in speech_s:
        assert_covered(pieces, start, start + round(loud_s * RATE))
        start += round(loud_s * RATE) + round(pause_s * RATE)


def test_pieces_shorter_than_their_overlaps_are_refused():
    with pytest.raises(ValueError, match="at least 12 s"):
        cut_at_pauses(np.zeros(10), RATE, 5.0)


def words_between(texts, times, start, stop, jitter):
    """What a piece hears: the words within it, at times that are off by a little."""
    rng = np.random.default_rng(round(start))
    words = []
    for text, time in zip(texts, times, strict=True):
        begin = time + rng.uniform(-jitter, jitter)
        if start <= time and time + 0.3 <= stop:
            words.append(Word(text, begin - start, begin + 0.3 - start, 0.9))
    return tuple(words)


@settings(max_examples=40, deadline=None)
@given(
    # Words of 0.3 s, which do not overlap wherever they are heard.
    gaps=st.lists(st.floats(0.53, 1.5), min_size=20, max_size=60),
    cuts=st.lists(st.floats(0.1, 0.9), min_size=1, max_size=3),
    jitter=st.floats(0, 0.1),
)
def test_no_word_is_lost_or_doubled_where_pieces_overlap(gaps, cuts, jitter):
    times = np.cumsum(gaps)
    # Of few words: some are said twice in a row.
    texts = np.random.default_rng(len(gaps)).choice(["NOW", "OWN", "SOW"], len(gaps)).tolist()
    end_s = times[-1] + 1.0
    marks = sorted({round(cut * end_s, 2) for cut in cuts})
    marks = [m for i, m in enumerate(marks) if i == 0 or m - marks[i - 1] > 7]
    starts = [0.0, *(mark - 3.0 for mark in marks)]
    stops = [*(min(mark + 3.0, end_s) for mark in marks), end_s]
    pieces = [
        Piece(round(max(a, 0) * RATE), round(b * RATE), round(c * RATE))
        for a, b, c in zip(starts, stops, [*marks, end_s], strict=True)
    ]
    transcripts = []
    for piece in pieces:
        words = words_between(texts, times, piece.start / RATE, piece.stop / RATE, jitter)
        # The mark of a word is a token of its own, before the word's first letter.
        tokens = tuple(
            Token(letter, w.start_s + a, w.start_s + b, 0.9)
            for w in words
            for letter, a, b in zip(
                f"▁{w.text}", (-0.02, 0, 0.1, 0.2), (0, 0.1, 0.2, 0.3), strict=True
            )
        )
        transcripts.append(Transcript(" ".join(w.text for w in words), words, tokens))
    joined = join(pieces, transcripts, RATE)
    assert joined.text.split() == texts
    assert "".join(token.text for token in joined.tokens) == "".join(f"▁{text}" for text in texts)
    assert " ".join(segment.text for segment in joined.segments) == joined.text
    np.testing.assert_allclose([word.start_s for word in joined.words], times, atol=0.101)


def test_tokens_go_with_their_words():
    def heard(text, start_s, *starts_s):
        ends_s = (*starts_s[1:], start_s + 1.0)
        placed = zip(f"▁{text}", starts_s, ends_s, strict=True)
        tokens = tuple(Token(letter, a, b, 1.0) for letter, a, b in placed)
        return Transcript(text, (Word(text, start_s, start_s + 1.0, 1.0),), tokens)

    # The cut, at 10 s, goes through the word, which one piece hears later.
    pieces = [Piece(0, 13000, 10000), Piece(7000, 20000, 20000)]
    left, right = heard("AB", 9.4, 9.4, 9.6, 10.2), heard("CD", 2.45, 2.45, 2.6, 3.25)
    joined = join(pieces, [left, right], RATE)
    assert joined.text == "AB"
    assert "".join(token.text for token in joined.tokens) == "▁AB"


def test_without_a_common_word_each_side_of_the_cut_gives_its_own():
    pieces = [Piece(0, 13000, 10000), Piece(7000, 20000, 20000)]
    left = Transcript("A B", (Word("A", 2.0, 2.4, 1.0), Word("B", 10.5, 11.0, 1.0)))
    right = Transcript("C D", (Word("C", 1.0, 1.5, 1.0), Word("D", 5.0, 5.5, 1.0)))
    assert join(pieces, [left, right], RATE).text == "A D"


def test_words_do_not_overlap_where_pieces_meet():
    # Both have B, the right piece half a second earlier.
    pieces = [Piece(0, 13000, 10000), Piece(7000, 20000, 20000)]
    left = Transcript("A B", (Word("A", 2.0, 2.4, 1.0), Word("B", 9.8, 10.2, 1.0)))
    right = Transcript("B C", (Word("B", 2.5, 2.9, 1.0), Word("C", 2.95, 3.4, 1.0)))
    joined = join(pieces, [left, right], RATE)
    assert joined.text == "A B C"
    assert joined.words[1].end_s == joined.words[2].start_s == pytest.approx(9.95)


def test_a_word_that_one_piece_hears_late_is_that_of_the_other():
    pieces = [Piece(0, 13000, 10000), Piece(7000, 20000, 20000)]
    left = Transcript("A B", (Word("A", 2.0, 2.4, 1.0), Word("B", 9.95, 10.05, 1.0)))
    right = Transcript("B C", (Word("B", 2.5, 2.6, 1.0), Word("C", 2.62, 2.9, 1.0)))
    joined = join(pieces, [left, right], RATE)
    assert joined.text == "A B C"
    times = [time for word in joined.words for time in (word.start_s, word.end_s)]
    assert times == pytest.approx([2.0, 2.4, 9.5, 9.6, 9.62, 9.9])


@settings(max_examples=200, deadline=None)
@given(
    left=st.lists(st.tuples(st.floats(0, 1.5), st.floats(0, 1.5)), max_size=12),
    right=st.lists(st.tuples(st.floats(0, 1.5), st.floats(0, 1.5)), max_size=12),
    seed=st.integers(0, 99),
)
def test_times_never_go_back(left, right, seed):
    """Whatever the pieces hear, words that last and follow each other at once or later."""
    rng = np.random.default_rng(seed)
    pieces = [Piece(0, 13000, 10000), Piece(7000, 20000, 20000)]
    transcripts = []
    for gaps, first_s in ((left, 5.0), (right, 0.0)):
        edges = first_s + np.cumsum(np.array(gaps).ravel())
        texts = rng.choice(["A", "B"], len(gaps)).tolist()
        spans = list(zip(texts, edges[::2].tolist(), edges[1::2].tolist(), strict=True))
        words = tuple(Word(text, a, b, 1.0) for text, a, b in spans)
        tokens = tuple(Token(text, a, b, 1.0) for text, a, b in spans)
        transcripts.append(Transcript(" ".join(texts), words, tokens))
    joined = join(pieces, transcripts, RATE)
    for parts in (joined.words, joined.tokens):
        times = [time for part in parts for time in (part.start_s, part.end_s)]
        assert times == sorted(times)


def test_alternatives_are_those_of_the_parts():
    pieces = [Piece(0, 9000, 10000), Piece(11000, 20000, 20000)]
    parts = [
        Transcript(text, (Word(text, 1.0, 1.5, 1.0),), alternatives=(text + "S",)) for text in "AB"
    ]
    joined = join(pieces, parts, RATE)
    assert [segment.alternatives for segment in joined.segments] == [("AS",), ("BS",)]
    assert joined.alternatives == ()
