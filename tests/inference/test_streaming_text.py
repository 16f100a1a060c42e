"""Text of log probabilities that come in chunks: endpoints lose nothing, what is stable stays."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from inference.bundle import read_run
from inference.search import SearchOptions, TextSearch
from inference.streaming_text import Endpoints, StreamSearch
from tests.inference.runs import make_run

FRAME_S = 0.04
CHUNK = 16
SEARCHES = [SearchOptions(search="greedy"), SearchOptions(beam_size=8)]


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> TextSearch:
    return TextSearch(read_run(make_run(tmp_path_factory.mktemp("run") / "run", "CTC/demo")))


def frames_of(texts: TextSearch, spoken, noise: float = 0.5, spread: int = 1) -> np.ndarray:
    """Log probabilities of words with so many blank frames before each.

    Args:
        spread: frames of a letter; in two of them none is more probable than the blank, and all
            together it is.
    """
    ids = []
    for silence, word in spoken:
        ids += [0] * silence
        for character in f"▁{word}":
            ids += [texts.vocabulary.index(character)] * spread + [0]
    logits_TV = np.random.default_rng(len(ids)).normal(0, noise, (len(ids), len(texts.vocabulary)))
    logits_TV[np.arange(len(ids)), ids] += 8
    if spread > 1:
        # 0.55 of the blank and 0.45 of the letter.
        logits_TV[np.arange(len(ids)), 0] = logits_TV[np.arange(len(ids)), ids] + 0.2
    return (logits_TV - np.log(np.exp(logits_TV).sum(1, keepdims=True))).astype(np.float32)


def heard(search: StreamSearch, frames_TV: np.ndarray, check=lambda state: None):
    state = search.start()
    for start in range(0, len(frames_TV), CHUNK):
        search.advance([state], [frames_TV[start : start + CHUNK]])
        check(state)
    return state


WORDS = st.sampled_from(["ONE", "TWO", "THREE", "SEVEN", "ZERO"])


@pytest.mark.parametrize("options", SEARCHES, ids=["greedy", "beam"])
@settings(max_examples=25, deadline=None)
@given(
    spoken=st.lists(st.tuples(st.integers(0, 70), WORDS), max_size=12),
    behind=st.integers(0, 90),
    max_segment_s=st.sampled_from([0.5, 1.0, 2.0, 20.0]),
)
def test_endpoints_lose_no_word_and_no_time(texts, options, spoken, behind, max_segment_s):
    frames_TV = frames_of(texts, [*spoken])
    blank_TV = frames_of(texts, [(behind, "ONE")])[:behind]
    frames_TV = np.concatenate([frames_TV, blank_TV])
    duration_s = len(frames_TV) * FRAME_S
    whole = StreamSearch(texts, options, None, FRAME_S)
    wanted = whole.transcript(heard(whole, frames_TV), duration_s)
    assert wanted.text == " ".join(word for _, word in spoken)
    cut = StreamSearch(texts, options, Endpoints(max_segment_s=max_segment_s), FRAME_S)
    found = cut.transcript(heard(cut, frames_TV), duration_s)
    assert found.text == wanted.text
    assert [(w.text, w.start_s, w.end_s) for w in found.words] == [
        (w.text, w.start_s, w.end_s) for w in wanted.words
    ]
    for before, after in itertools.pairwise(found.segments):
        assert before.end_s <= after.start_s + 1e-9


@pytest.mark.parametrize("options", SEARCHES, ids=["greedy", "beam"])
@settings(max_examples=25, deadline=None)
@given(spoken=st.lists(st.tuples(st.integers(0, 40), WORDS), min_size=1, max_size=8))
def test_what_is_stable_stays(texts, options, spoken):
    search = StreamSearch(texts, options, Endpoints(max_segment_s=2.0), FRAME_S)
    seen = []

    def check(state):
        stable, _ = search.words(state)
        assert stable[: len(seen)] == seen
        seen[:] = stable
        transcript = search.transcript(state, 1e3)
        assert transcript.text.split()[: len(seen)] == seen

    frames_TV = frames_of(texts, spoken, noise=2.5)
    state = heard(search, frames_TV, check)
    again = search.restarted(state)
    assert search.transcript(again, 1e3) == search.transcript(state, 1e3)


def test_each_rule_ends_a_segment(texts):
    rules = Endpoints(silence_s=1.3, pause_s=0.7, max_segment_s=4.0)
    search = StreamSearch(texts, SEARCHES[0], rules, FRAME_S)

    def segments(*spoken):
        state = heard(search, frames_of(texts, spoken))
        return [segment.text for segment in search.segments(state)], state

    assert segments((0, "ONE"), (30, "TWO"))[0] == ["ONE"]
    assert segments((0, "ONE"), (5, "TWO"))[0] == []
    closed, state = segments((50, "ONE"))
    assert closed == []
    assert state.first_frame == 24  # half of what was silent at the end of a chunk
    closed, _ = segments(*[(4, "SEVEN")] * 12)
    assert closed
    assert all(text.split() == ["SEVEN"] * len(text.split()) for text in closed)


@pytest.mark.parametrize("rules", [Endpoints(), Endpoints(max_segment_s=1.0)])
@settings(max_examples=25, deadline=None)
@given(spoken=st.lists(st.tuples(st.integers(2, 70), WORDS), min_size=1, max_size=6))
def test_endpoints_cut_no_letter_that_two_frames_share(texts, rules, spoken):
    frames_TV = frames_of(texts, spoken, noise=0.0, spread=2)
    whole, cut = (StreamSearch(texts, SEARCHES[1], r, FRAME_S) for r in (None, rules))
    wanted = whole.transcript(heard(whole, frames_TV), 1e3)
    assert wanted.text == " ".join(word for _, word in spoken)
    assert cut.transcript(heard(cut, frames_TV), 1e3).text == wanted.text


def test_options_that_cannot_be_say_so(texts):
    with pytest.raises(UserError, match="pause_s is 0"):
        Endpoints(pause_s=0)
    with pytest.raises(UserError, match="alternatives"):
        StreamSearch(texts, SearchOptions(alternatives=1), None, FRAME_S)


def test_what_is_said_is_spelled_once(texts, monkeypatch):
    search = StreamSearch(texts, SEARCHES[0], Endpoints(), FRAME_S)
    spelled = []
    found = texts.found

    def counted(tokens):
        spelled.append(len(tokens))
        return found(tokens)

    monkeypatch.setattr(texts, "found", counted)
    counts = []
    for num_words in (2, 20):
        state = heard(search, frames_of(texts, [(60, "SEVEN")] * num_words))
        assert len(state.closed) == num_words - 1
        spelled.clear()
        assert search.words(state)[0] == ["SEVEN"] * (num_words - 1)
        assert [s.text for s in search.segments(state)] == ["SEVEN"] * (num_words - 1)
        whole = search.transcript(state, state.num_frames * FRAME_S)
        assert whole.segments[:-1] == search.segments(state)
        assert len(whole.words) == num_words
        counts.append(sum(spelled))
    assert counts[0] == counts[1]
