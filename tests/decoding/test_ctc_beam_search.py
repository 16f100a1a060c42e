"""The CTC search is SpeechBrain's, whatever computes it and however its frames arrive."""

import itertools
import logging
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hyperpyyaml import load_hyperpyyaml
from hypothesis import given, settings
from hypothesis import strategies as st
from speechbrain.decoders.ctc import CTCBeamSearcher

from decoding.ctc_beam_search import CTCBeamSearch, CTCToken, ctc_greedy, native, read_ngram, search
from ops import build
from tests.decoding.ctc_searches import (
    BACKENDS,
    CHARACTERS,
    LEXICON,
    SPACED,
    VOCABULARIES,
    found,
    outputs,
    padded,
    write_ngram,
)

REPOSITORY = Path(__file__).resolve().parents[2]
PRUNINGS = [
    {"beam_size": 16, "beam_prune_logp": -12.0, "token_prune_min_logp": -1.2},
    {"beam_size": 40, "beam_prune_logp": -10.0, "token_prune_min_logp": -5.0},
    {"beam_size": 5, "beam_prune_logp": -20.0, "token_prune_min_logp": -8.0},
]
ABC = ["-", "▁", "A", "B", "▁A", "BA"]


@pytest.fixture(scope="module")
def arpa(tmp_path_factory):
    return write_ngram(tmp_path_factory.mktemp("ngram") / "words.arpa")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("prune_history", [False, True])
@pytest.mark.parametrize("pruning", PRUNINGS)
@pytest.mark.parametrize("with_ngram", [False, True])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_texts_and_scores_are_those_of_speechbrain(
    vocabulary, with_ngram, pruning, prune_history, backend, arpa
):
    if with_ngram:
        pytest.importorskip("kenlm")
    pieces = VOCABULARIES[vocabulary]
    _, log_probs = outputs(pieces, 4)
    options = {**pruning, "prune_history": prune_history, "topk": 10, "alpha": 0.7, "beta": 1.0}
    theirs = CTCBeamSearcher(
        0, pieces, kenlm_model_path=str(arpa) if with_ngram else None, **options
    )
    ours = CTCBeamSearch(pieces, ngram=arpa if with_ngram else None, backend=backend, **options)
    for row, hypotheses in zip(log_probs, ours(*padded(log_probs)), strict=True):
        # As float32 their sums would carry rounding that is theirs alone.
        expected = theirs(torch.from_numpy(row[None]).double())[0]
        assert [h.text for h in hypotheses] == [h.text for h in expected]
        for name in ("score", "lm_score"):
            np.testing.assert_allclose(
                [getattr(h, name) for h in hypotheses],
                [getattr(h, name) for h in expected],
                rtol=0,
                atol=1e-5 if with_ngram else 1e-9,
            )


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_unpruned_search_adds_up_all_alignments(backend):
    log_probs_TV = np.log(np.random.default_rng(3).dirichlet(np.ones(len(ABC)), 5))
    log_probs_TV = log_probs_TV.astype(np.float32)
    probs: dict[str, float] = {}
    best: dict[str, tuple[float, tuple[int, ...]]] = {}
    for path in itertools.product(range(len(ABC)), repeat=5):
        tokens = [token for token, _ in itertools.groupby(path) if token]
        text = " ".join("".join(ABC[token] for token in tokens).replace("▁", " ").split())
        log_prob = float(sum(log_probs_TV[range(5), path].tolist()))
        probs[text] = probs.get(text, 0.0) + math.exp(log_prob)
        best[text] = max(best.get(text, (-math.inf, ())), (log_prob, path))
    searcher = CTCBeamSearch(
        ABC,
        beam_size=10**6,
        beam_prune_logp=-1000,
        token_prune_min_logp=-1000,
        prune_history=False,
        topk=10**6,
        backend=backend,
    )
    (hypotheses,) = searcher(log_probs_TV[None])
    assert {h.text for h in hypotheses} == probs.keys()
    assert [h.score for h in hypotheses] == sorted((h.score for h in hypotheses), reverse=True)
    for hypothesis in hypotheses:
        assert hypothesis.score == pytest.approx(math.log(probs[hypothesis.text]), abs=1e-9)
        assert hypothesis.lm_score == hypothesis.score
        assert list(hypothesis.tokens) == tokens_of(best[hypothesis.text][1], log_probs_TV)


def tokens_of(path, log_probs_TV):
    """The tokens of an alignment."""
    tokens, frame = [], 0
    for token, frames in itertools.groupby(path):
        end = frame + len(list(frames))
        if token:
            tokens.append(CTCToken(token, frame, end, float(log_probs_TV[frame:end, token].max())))
        frame = end
    return tokens


@st.composite
def searches(draw):
    """Options, and log probabilities as no model gives them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    pieces = draw(st.sampled_from([ABC, ["A", " ", "B", "-"], ["-", "AB", "A", "B", "▁AB"]]))
    frames = draw(st.integers(0, 12))
    logits = rng.normal(0, draw(st.sampled_from([0.0, 0.5, 3.0])), (2, frames, len(pieces)))
    if draw(st.booleans()):
        # The same numbers again and again: ties.
        logits = logits.round()
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    options = {
        "blank": pieces.index("-"),
        "beam_size": draw(st.sampled_from([1, 2, 7, 100])),
        "beam_prune_logp": draw(st.sampled_from([0.0, -2.0, -30.0])),
        "token_prune_min_logp": draw(st.sampled_from([0.0, -1.5, -30.0])),
        "prune_history": draw(st.booleans()),
        "score_boundary": draw(st.booleans()),
        "topk": draw(st.sampled_from([1, 20])),
        "hotwords": draw(
            st.dictionaries(
                st.sampled_from(["A", "AB", "AB A", "B A B", "BA"]), st.floats(-5, 5), max_size=3
            )
        ),
    }
    return pieces, log_probs.astype(np.float32), options, draw(st.booleans())


TINY_ARPA = """
\\data\\
ngram 1=5
ngram 2=3

\\1-grams:
-1.5 <unk>
-99 <s> -0.5
-1.0 </s>
-0.7 AB -0.25
-1.1 A -0.1

\\2-grams:
-0.3 <s> AB
-0.9 AB A
-0.2 AB <unk>

\\end\\
"""


@pytest.fixture(scope="module")
def tiny_arpa(tmp_path_factory):
    path = tmp_path_factory.mktemp("ngram") / "tiny.arpa"
    path.write_text(TINY_ARPA)
    return path


@pytest.mark.skipif(native.unavailable() is not None, reason="the native search is not built")
@settings(max_examples=300, deadline=None)
@given(searches())
def test_the_native_search_is_the_reference(tiny_arpa, case):
    pieces, log_probs_BTV, options, with_ngram = case
    results = [
        found(
            CTCBeamSearch(
                pieces, ngram=tiny_arpa if with_ngram else None, backend=backend, **options
            )(log_probs_BTV)
        )
        for backend in ("native", "reference")
    ]
    assert results[0] == results[1]


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=100, deadline=None)
@given(case=searches(), data=st.data())
def test_in_any_cutting_the_search_is_the_same(tiny_arpa, backend, case, data):
    pieces, log_probs_BTV, options, with_ngram = case
    searcher = CTCBeamSearch(
        pieces, ngram=tiny_arpa if with_ngram else None, backend=backend, **options
    )
    frames = log_probs_BTV.shape[1]
    cuts = sorted(data.draw(st.lists(st.integers(0, frames), max_size=5)))
    state = searcher.start(2)
    for first, last in itertools.pairwise([0, *cuts, frames]):
        state = searcher.advance(state, log_probs_BTV[:, first:last])
    assert found(searcher.finish(state)) == found(searcher(log_probs_BTV))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_share_no_clock(backend, arpa):
    searcher = CTCBeamSearch(CHARACTERS, ngram=arpa, backend=backend, beam_size=10)
    _, (first, second) = outputs(CHARACTERS, 2)
    cut = min(len(first), len(second)) // 2
    state = searcher.start(2)
    state = searcher.advance(state, np.stack([first[:cut], second[:cut]]), [cut, 0])
    before = state
    state = searcher.advance(state, np.stack([first[cut : 2 * cut], second[:cut]]))
    assert found(searcher.finish(state)) == found(
        searcher(first[None, : 2 * cut]) + searcher(second[None, :cut])
    )
    swapped = searcher.advance(
        before.select([1, 0, 0]), np.stack([second[:cut], second[:cut], first[cut : 2 * cut]])
    )
    assert found(searcher.finish(swapped.select([2, 0]))) == found(searcher.finish(state))
    anew = searcher.advance(state.reset([True, False]), np.stack([second[:cut]] * 2), [cut, 0])
    assert found(searcher.finish(anew)) == found(
        searcher(second[None, :cut]) + searcher.finish(state)[1:]
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_partial_texts_grow_into_the_final_one(backend, arpa):
    searcher = CTCBeamSearch(CHARACTERS, ngram=arpa, backend=backend)
    (said,), (log_probs_TV,) = outputs(CHARACTERS, 1, doubt=0)
    state, texts = searcher.start(1), []
    for frame in log_probs_TV:
        state = searcher.advance(state, frame[None, None])
        texts.append(searcher.partial(state)[0][0].text)
    assert texts[-1] == searcher.finish(state)[0][0].text == said
    assert all(later.startswith(text) for text, later in itertools.pairwise(texts))
    assert len(set(texts)) > len(said.replace(" ", ""))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_an_utterance_gives_alone_it_gives_in_any_batch(backend, arpa):
    searcher = CTCBeamSearch(CHARACTERS, ngram=arpa, backend=backend, topk=5, threads=3)
    _, log_probs = outputs(CHARACTERS, 7)
    log_probs[3] = log_probs[3][:0]
    together = found(searcher(*padded(log_probs)))
    assert together == [found(searcher(x[None]))[0] for x in log_probs]
    assert together[3] == [("", (), 0.0, 0.0)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_beyond_the_vocabulary_are_left_out(backend):
    searcher = CTCBeamSearch(CHARACTERS, backend=backend)
    _, (log_probs_TV,) = outputs(CHARACTERS, 1)
    wider = np.pad(log_probs_TV, [(0, 0), (0, 3)], constant_values=[(0, 0), (0, np.nan)])
    assert found(searcher(wider[None])) == found(searcher(log_probs_TV[None]))


@pytest.mark.parametrize(
    ("pieces", "path"),
    [
        (["-", "▁", "N", "▁GO"], [0, 3, 3, 0, 1, 2, 0]),
        (["-", " ", "N", "GO"], [0, 3, 3, 0, 1, 2, 1]),
    ],
)
def test_words_have_their_tokens_and_frames(pieces, path):
    log_probs_TV = np.full((len(path), 4), -6, np.float32)
    log_probs_TV[range(len(path)), path] = np.linspace(-0.1, -0.05, len(path))
    ((hypothesis,),) = CTCBeamSearch(pieces)(log_probs_TV[None])
    assert hypothesis.text == "GO N"
    assert list(hypothesis.tokens) == tokens_of(path, log_probs_TV)
    go, n = hypothesis.words
    assert (go.text, go.tokens, go.start_frame, go.end_frame) == ("GO", hypothesis.tokens[:1], 1, 3)
    assert (n.text, n.tokens, n.start_frame, n.end_frame) == ("N", hypothesis.tokens[2:3], 5, 6)


@pytest.mark.skipif(native.unavailable() is not None, reason="the native search is not built")
def test_a_state_grows_with_its_text_alone():
    # Flat outputs: thousands of texts are tried and given up.
    rng = np.random.default_rng(0)
    log_probs_TV = np.log(rng.dirichlet(np.full(len(CHARACTERS), 0.5), 2000)).astype(np.float32)
    log_probs_TV = log_probs_TV.clip(-30)
    options = {"beam_size": 20, "token_prune_min_logp": -6.0, "prune_history": True}
    searcher = CTCBeamSearch(CHARACTERS, **options)
    state, sizes = searcher.start(1), []
    for first in range(0, 2000, 250):
        state = searcher.advance(state, log_probs_TV[None, first : first + 250])
        sizes.append(len(state.rows[0]) / len(searcher.partial(state)[0][0].text))
    assert found(searcher.finish(state)) == found(searcher(log_probs_TV[None]))
    assert max(sizes[1:]) < 400


def test_the_search_needs_no_torch(arpa):
    code = f"""
import sys
import numpy as np
from decoding.ctc_beam_search import CTCBeamSearch, ctc_greedy
for backend in ("auto", "reference"):
    search = CTCBeamSearch(["-", "A"], ngram={str(arpa)!r}, hotwords={{"a": 1.0}}, backend=backend)
    log_probs_TV = np.log(np.array([[0.1, 0.9], [0.8, 0.2]], np.float32))
    assert search(log_probs_TV[None])[0][0].text == "A"
    assert [token.id for token in ctc_greedy(log_probs_TV)] == [1]
assert not {{"torch", "speechbrain", "kenlm"}} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


def test_without_a_compiler_the_search_runs_in_python_and_one_message_says_why(
    monkeypatch, tmp_path, caplog
):
    monkeypatch.setattr(build, "_libraries", {})
    monkeypatch.setattr(build, "_failures", {})
    monkeypatch.setenv("CXX", "no-such-compiler")
    native._library.cache_clear()
    search._tell.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                searcher = CTCBeamSearch(ABC)
        (message,) = [record.getMessage() for record in caplog.records]
        assert "no-such-compiler" in message
        assert searcher(np.log(np.full((1, 1, 6), 1 / 6)))[0][0].text == ""
        with pytest.raises(ValueError, match="no-such-compiler"):
            CTCBeamSearch(ABC, backend="native")
    finally:
        native._library.cache_clear()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocabulary": []}, "must contain the blank"),
        ({"vocabulary": ["A", "B"], "blank": 2}, "must contain the blank"),
        ({"vocabulary": ["-", "A", "A"]}, "'A' twice"),
        ({"vocabulary": ["-", "A B"]}, "'A B'"),
        ({"vocabulary": ABC, "beam_size": 0}, "beam_size is 0"),
        ({"vocabulary": ABC, "topk": 0}, "topk is 0"),
        ({"vocabulary": ABC, "threads": 0}, "threads is 0"),
        ({"vocabulary": ABC, "beam_prune_logp": 1.0}, "beam_prune_logp is 1.0"),
        ({"vocabulary": ABC, "beam_prune_logp": math.nan}, "beam_prune_logp is nan"),
        ({"vocabulary": ABC, "backend": "gpu"}, "backend is 'gpu'"),
    ],
)
def test_bad_options_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        CTCBeamSearch(**arguments)


@pytest.mark.parametrize(
    ("log_probs", "num_frames", "message"),
    [
        (np.zeros((2, 3)), None, r"shape \(2, 3\)"),
        (np.zeros((2, 3, 5)), None, "another model"),
        (np.zeros((2, 3, 6)), [3], "2 integers"),
        (np.zeros((2, 3, 6)), [1.0, 0.5], "relative lengths"),
        (np.zeros((2, 3, 6)), [3, 4], "3 frames"),
        (np.zeros((2, 3, 6)), [3, -1], "3 frames"),
    ],
)
def test_shapes_that_do_not_fit_are_named(log_probs, num_frames, message):
    with pytest.raises(ValueError, match=message):
        CTCBeamSearch(ABC)(log_probs, num_frames)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named_with_its_row(value):
    log_probs = np.full((3, 4, 6), -1.8, np.float32)
    log_probs[1, 2, 5] = value
    with pytest.raises(ValueError, match=rf"Utterance 1 .* {value} in frame 2 for token 5"):
        CTCBeamSearch(ABC)(log_probs)
    assert len(CTCBeamSearch(ABC)(log_probs, [4, 2, 4])) == 3


def test_a_state_of_another_search_is_refused(arpa):
    searchers = [
        CTCBeamSearch(CHARACTERS),
        CTCBeamSearch(CHARACTERS, ngram=arpa),
        CTCBeamSearch(CHARACTERS[::-1]),
        CTCBeamSearch(CHARACTERS, backend="reference"),
    ]
    for ours, theirs in itertools.permutations(
        searchers if native.unavailable() is None else searchers[:3], 2
    ):
        with pytest.raises(ValueError, match="another vocabulary or n-gram"):
            ours.finish(theirs.start(1))


def test_a_search_takes_the_ngram_of_its_backend(arpa):
    ngram = read_ngram(arpa, "reference")
    assert CTCBeamSearch(SPACED, ngram=ngram, backend="reference").ngram is ngram
    assert all(word in ngram for word in LEXICON[:3])
    if native.unavailable() is None:
        with pytest.raises(ValueError, match="another backend"):
            CTCBeamSearch(SPACED, ngram=ngram)


def test_a_yaml_gives_the_options_and_the_script_the_vocabulary():
    yaml = """
test_beam_size: 7
kenlm_model_path: null
test_search: !name:decoding.ctc_beam_search.CTCBeamSearch
  beam_size: !ref <test_beam_size>
  ngram: !ref <kenlm_model_path>
"""
    make = load_hyperpyyaml(yaml)["test_search"]
    assert make(CHARACTERS).settings.beam_size == 7
    assert load_hyperpyyaml(yaml, {"test_beam_size": 3})["test_search"](ABC).settings.beam_size == 3


def test_greedy_tokens_are_those_of_the_most_probable_alignment():
    path = [0, 2, 2, 0, 2, 3, 3, 0]
    log_probs_TV = np.full((len(path), 4), -5.0)
    log_probs_TV[range(len(path)), path] = np.linspace(-0.2, -0.1, len(path))
    assert ctc_greedy(log_probs_TV) == tokens_of(path, log_probs_TV)
    assert ctc_greedy(log_probs_TV, blank=3)[0] == CTCToken(0, 0, 1, -0.2)
    assert ctc_greedy(log_probs_TV[:0]) == []
