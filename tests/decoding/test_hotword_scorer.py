"""Hotwords of a joint search: gained once complete, taken back where a phrase breaks off."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding.ctc_beam_search.hotwords import HotwordTree
from decoding.ctc_beam_search.hypothesis import Vocabulary
from decoding.hotword_scorer import HotwordScorer

PIECES = ["<unk>", "<s>", "</s>", "▁", "A", "B", "▁A", "AB", "▁BA", "C"]
EOS, OUTPUTS = 2, 12
PHRASES = {"AB": 2.0, "A BA": 3.0, "ABC": 1.5}


@pytest.fixture(scope="module")
def scorer():
    return HotwordScorer(HotwordTree(PHRASES), Vocabulary(PIECES), OUTPUTS, EOS)


def total(scorer, tokens):
    """What a search adds up for one hypothesis."""
    memory, last, sum_ = None, 1, 0.0
    for token in tokens:
        gains_1V, memory = scorer.score(torch.tensor([last]), memory, None, None)
        assert gains_1V.shape == (1, OUTPUTS)
        sum_ += float(gains_1V[0, token])
        last = token
    return sum_


def expected(tokens):
    """Boosts of the phrases that stand in the text as whole words."""
    text = "".join(PIECES[t] for t in tokens if t > EOS).replace("▁", " ")
    padded = " " + " ".join(text.split()).replace(" ", "  ") + " "
    return sum(
        boost * padded.count(" " + phrase.replace(" ", "  ") + " ")
        for phrase, boost in PHRASES.items()
    )


@settings(max_examples=300, deadline=None)
@given(tokens=st.lists(st.integers(3, len(PIECES) - 1), max_size=12))
def test_a_finished_hypothesis_has_gained_its_phrases_and_nothing_else(scorer, tokens):
    assert total(scorer, [*tokens, EOS]) == pytest.approx(expected(tokens), abs=1e-5)


def test_states_follow_the_beams(scorer):
    _, memory = scorer.score(torch.tensor([1, 1]), None, None, None)
    _, memory = scorer.score(torch.tensor([6, 9]), memory, None, None)
    swapped = scorer.permute_mem(memory, torch.tensor([1, 0, 0]))
    gains_NV, _ = scorer.score(torch.tensor([5, 5, 5]), swapped, None, None)
    assert torch.equal(gains_NV[1], gains_NV[2])
    assert not torch.equal(gains_NV[0], gains_NV[1])


@settings(max_examples=200, deadline=None)
@given(tokens=st.lists(st.integers(3, len(PIECES) - 1), max_size=8))
def test_every_token_adds_what_its_symbols_add_one_by_one(scorer, tokens):
    memory, last = None, 1
    for token in tokens:
        gains_1V, memory = scorer.score(torch.tensor([last]), memory, None, None)
        last = token
        (state,) = memory
        for each, gain in enumerate(gains_1V[0].tolist()):
            end, gained = scorer._after(state, scorer._symbols[each])
            advanced = 0.0 if each == EOS else scorer.tree.advances[end.node]
            lost = scorer.tree.advances[state.node]
            assert gain == pytest.approx(gained + advanced - lost, abs=1e-6)
