"""The closed-form CTC prefix score is SpeechBrain's, and its items do not know of each other."""

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from speechbrain.decoders import ctc as speechbrain_ctc

from decoding.ctc_prefix_scorer import MINUS_INF, CTCPrefixScore, CTCScorer

VOCABULARY, BLANK, BOS, EOS = 11, 0, 1, 2


@contextlib.contextmanager
def float64_by_default():
    """SpeechBrain allocates its scores in the default type; its rounding is not the question."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def log_posteriors(batch, frames, seed, peak=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = peak * torch.randn(batch, frames, VOCABULARY, generator=generator)
    return logits.log_softmax(-1)


def search(score, log_probs, lengths, beam, steps, num_candidates, seed):
    """All scores of a search whose choices are random tokens, repeats among them."""
    generator = torch.Generator().manual_seed(seed)
    batch = len(lengths)
    tokens, states, scores = torch.full((batch * beam,), BOS), None, []
    for _ in range(steps):
        candidates = None
        if num_candidates is not None:
            order = torch.rand(batch * beam, VOCABULARY, generator=generator, dtype=torch.float32)
            order[:, [BLANK, EOS]] = -1.0
            order.scatter_(1, tokens.unsqueeze(1), 2.0)
            candidates = order.topk(num_candidates).indices
        step, memory = score.forward_step(tokens, states, candidates)
        scores.append(step.clone())
        beams = torch.randint(beam, (batch, beam), generator=generator)
        if candidates is None:
            chosen = torch.randint(EOS + 1, VOCABULARY, (batch, beam), generator=generator)
        else:
            rows = beams + beam * torch.arange(batch).unsqueeze(1)
            columns = torch.randint(num_candidates, (batch, beam), generator=generator)
            chosen = candidates[rows, columns]
        states = score.permute_mem(memory, beams * VOCABULARY + chosen)
        tokens = chosen.view(-1)
    return torch.stack(scores)


@settings(max_examples=12, deadline=None)
@given(
    frames=st.integers(3, 23),
    beam=st.integers(1, 4),
    num_candidates=st.one_of(st.none(), st.integers(1, VOCABULARY - 2)),
    seed=st.integers(0, 1000),
)
def test_scores_are_those_of_speechbrain(frames, beam, num_candidates, seed):
    log_probs = log_posteriors(3, frames, seed).double()
    lengths = torch.tensor([frames, max(1, frames // 2), max(1, frames - 2)])
    setting = {
        "beam": beam,
        "steps": min(frames, 9),
        "num_candidates": num_candidates,
        "seed": seed,
    }
    with float64_by_default():
        theirs = speechbrain_ctc.CTCPrefixScore(log_probs.clone(), lengths, BLANK, EOS)
        expected = search(theirs, log_probs, lengths, **setting)
    ours = CTCPrefixScore(log_probs, lengths, BLANK, EOS)
    actual = search(ours, log_probs, lengths, **setting)

    # Once a prefix is impossible SpeechBrain's sums of -1e20 mean nothing: only the living count.
    possible = expected.abs() < 1e10
    assert torch.equal(possible[0], actual[0] > MINUS_INF / 2)
    torch.testing.assert_close(actual[possible].double(), expected[possible], rtol=1e-5, atol=1e-5)


def test_a_token_that_no_frame_supports_is_scored_without_underflow():
    log_probs = log_posteriors(1, 40, seed=1, peak=60.0)
    lengths = torch.tensor([40])
    log_probs[0, :, 7] = -500.0
    ours = CTCPrefixScore(log_probs, lengths, BLANK, EOS)
    with float64_by_default():
        theirs = speechbrain_ctc.CTCPrefixScore(log_probs.double(), lengths, BLANK, EOS)
        expected = theirs.forward_step(torch.tensor([BOS]), None)[0]
    actual = ours.forward_step(torch.tensor([BOS]), None)[0]
    assert actual[0, 7] < -450.0
    torch.testing.assert_close(actual[0, 3:].double(), expected[0, 3:], rtol=1e-5, atol=1e-4)


def test_frames_beyond_the_length_change_nothing():
    log_probs = log_posteriors(2, 30, seed=2)
    lengths = torch.tensor([30, 17])
    setting = {"beam": 3, "steps": 8, "num_candidates": 5, "seed": 3}
    other = log_probs.clone()
    other[1, 17:] = float("nan")
    first = search(CTCPrefixScore(log_probs, lengths, BLANK, EOS), log_probs, lengths, **setting)
    second = search(CTCPrefixScore(other, lengths, BLANK, EOS), other, lengths, **setting)
    assert torch.equal(first, second)


def test_long_padding_does_not_overflow():
    log_probs = torch.cat([log_posteriors(1, 10, seed=4), torch.zeros(1, 4000, VOCABULARY)], 1)
    score = CTCPrefixScore(log_probs, torch.tensor([10]), BLANK, EOS)
    alone = CTCPrefixScore(log_probs[:, :10], torch.tensor([10]), BLANK, EOS)
    setting = {"beam": 2, "steps": 6, "num_candidates": None, "seed": 5}
    lengths = torch.tensor([10])
    torch.testing.assert_close(
        search(score, log_probs, lengths, **setting),
        search(alone, log_probs[:, :10], lengths, **setting),
    )


def test_items_taken_out_of_the_batch_score_as_before():
    torch.manual_seed(6)
    layer = torch.nn.Linear(8, VOCABULARY)
    states, lengths, beam = torch.randn(3, 20, 8), torch.tensor([20, 11, 15]), 2
    tokens = torch.tensor([3, 4, 5, 6, 7, 8])
    whole, part = CTCScorer(layer, BLANK, EOS), CTCScorer(layer, BLANK, EOS)
    choice = torch.tensor([[3, VOCABULARY + 4], [5, VOCABULARY + 6], [7, VOCABULARY + 8]])

    memories = []
    for scorer in (whole, part):
        scorer.reset_mem(states, lengths)
        _, memory = scorer.score(torch.full((6,), BOS), None, None, None)
        memories.append(scorer.permute_mem(memory, choice))
    expected, _ = whole.score(tokens, memories[0], None, None)
    rows = torch.tensor([0, 1, 4, 5])
    memory = part.select_items(memories[1], torch.tensor([0, 2]), rows)
    actual, _ = part.score(tokens[rows], memory, None, None)
    torch.testing.assert_close(actual, expected[rows])
    assert len(expected) == 3 * beam


@pytest.mark.parametrize("candidates", [None, 4])
def test_an_impossible_prefix_stays_impossible(candidates):
    log_probs = log_posteriors(1, 2, seed=7)
    score = CTCPrefixScore(log_probs, torch.tensor([2]), BLANK, EOS)
    tokens, states = torch.tensor([BOS]), None
    total = torch.zeros(())
    for token in (3, 4, 5, 6):
        chosen = None if candidates is None else torch.tensor([[3, 4, 5, 6]])
        step, memory = score.forward_step(tokens, states, chosen)
        total = total + step[0, token]
        states = score.permute_mem(memory, torch.tensor([[token]]))
        tokens = torch.tensor([token])
        assert step.isfinite().all()
    assert total <= MINUS_INF / 2
