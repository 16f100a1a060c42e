"""Cached language model scores are those of the whole prefix, whatever the beams do."""

import math

import numpy as np
import pytest
import torch
from speechbrain.decoders.scorer import KenLMScorer as SpeechBrainKenLMScorer
from speechbrain.decoders.scorer import TransformerLMScorer as SpeechBrainTransformerLMScorer
from speechbrain.lobes.models.transformer.TransformerLM import (
    TransformerLM as SpeechBrainTransformerLM,
)

from decoding.lm_scorers import KenLMScorer, LMScorer
from modules.lm import MambaLM, TransformerLM
from tools.make_ngram import estimate, write_arpa

VOCABULARY, BOS = 23, 1
SIZES = {"d_model": 16, "nhead": 2, "num_encoder_layers": 2, "d_ffn": 32, "dropout": 0.1}


def mamba_lm():
    torch.manual_seed(0)
    return MambaLM(
        VOCABULARY, d_model=16, num_layers=2, mamba_config={"d_state": 4, "backend": "torch"}
    )


def scores_of_a_search(scorer, hypotheses=6, steps=20, seed=1):
    """Scores of every step of a search that picks beams and tokens, 0 among them, at random."""
    generator = torch.Generator().manual_seed(seed)
    tokens, memory, scores = torch.full((hypotheses,), BOS), None, []
    for _ in range(steps):
        step, memory = scorer.score(tokens, memory, None, None)
        scores.append(step)
        rows = torch.randint(hypotheses, (hypotheses,), generator=generator)
        memory = scorer.permute_mem(memory, rows)
        tokens = torch.randint(VOCABULARY, (hypotheses,), generator=generator)
    return torch.stack(scores)


@pytest.mark.parametrize("normalize_before", [False, True])
@pytest.mark.parametrize("d_embedding", [None, 8])
def test_transformer_scores_are_those_of_speechbrain(normalize_before, d_embedding):
    torch.manual_seed(0)
    network = SpeechBrainTransformerLM(
        VOCABULARY, normalize_before=normalize_before, d_embedding=d_embedding, **SIZES
    )
    expected = scores_of_a_search(SpeechBrainTransformerLMScorer(network, temperature=1.15))
    actual = scores_of_a_search(LMScorer(network, temperature=1.15))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_our_transformer_has_the_weights_of_speechbrains():
    torch.manual_seed(0)
    theirs, ours = SpeechBrainTransformerLM(VOCABULARY, **SIZES), TransformerLM(VOCABULARY, **SIZES)
    ours.load_state_dict(theirs.state_dict())
    expected = scores_of_a_search(SpeechBrainTransformerLMScorer(theirs))
    torch.testing.assert_close(scores_of_a_search(LMScorer(ours)), expected, rtol=0, atol=1e-5)


def test_mamba_scores_are_those_of_the_whole_prefix():
    network = mamba_lm()
    expected = scores_of_a_search(SpeechBrainTransformerLMScorer(LongTokens(network), 1.15))
    actual = scores_of_a_search(LMScorer(network, 1.15))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


class LongTokens(torch.nn.Module):
    """SpeechBrain's scorer keeps the prefix as floats, which its own embeddings put up with."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, tokens):
        return self.network(tokens.long())


@pytest.mark.parametrize("kind", ["transformer", "mamba"])
def test_a_state_can_be_used_again_after_it_was_stepped(kind):
    torch.manual_seed(0)
    network = TransformerLM(VOCABULARY, **SIZES).eval() if kind == "transformer" else mamba_lm()
    network.eval()
    tokens = torch.tensor([3, 4])
    with torch.no_grad():
        _, state = network.step(tokens, network.initial_state(2))
        first, _ = network.step(tokens, state)
        network.step(torch.tensor([5, 6]), state)
        network.step(torch.tensor([7, 8]), state.select(torch.tensor([1, 0])))
        again, _ = network.step(tokens, state)
    assert torch.equal(first, again)


def test_state_of_the_mamba_does_not_grow():
    network = mamba_lm().eval()
    state = network.initial_state(3)
    sizes = []
    with torch.no_grad():
        for token in range(3, 8):
            _, state = network.step(torch.full((3,), token), state)
            sizes.append([(layer.conv.shape, layer.ssm.shape) for layer in state.layers])
    assert all(size == sizes[0] for size in sizes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_decoder_layers": 1}, "num_decoder_layers: 0"),
        ({"attention_type": "RelPosMHAXL"}, "regularMHA"),
    ],
)
def test_models_without_a_cached_step_are_refused(options, message):
    network = SpeechBrainTransformerLM(VOCABULARY, **SIZES, **options)
    with pytest.raises(ValueError, match=message):
        LMScorer(network)


def test_a_hypothesis_beyond_the_positions_is_refused():
    network = TransformerLM(VOCABULARY, max_length=2, **SIZES)
    with pytest.raises(ValueError, match="max_length 2"):
        scores_of_a_search(LMScorer(network), steps=3)


def test_a_bidirectional_language_model_is_refused():
    with pytest.raises(ValueError, match="bidirectional"):
        MambaLM(VOCABULARY, d_model=16, num_layers=1, mamba_config={"bidirectional": True})


@pytest.fixture
def token_ngram(tmp_path):
    pytest.importorskip("kenlm", reason="kenlm is not installed: pip install -e '.[ngram]'")
    path = tmp_path / "tokens.arpa"
    sentences = ["t3 t4 t5", "t3 t4 t6", "t7 t3 t4 t5 t8", "t9 t10"]
    with open(path, "w", encoding="utf-8") as stream:
        write_arpa(estimate((line.split() for line in sentences), order=3), stream)
    return {
        "lm_path": str(path),
        "vocab_size": VOCABULARY,
        "token_list": ["<unk>", "<s>", "</s>", *(f"t{i}" for i in range(3, VOCABULARY))],
    }


def test_a_hypothesis_begins_where_the_ngrams_sentences_begin(token_ngram):
    scorer = KenLMScorer(**token_ngram)
    scorer.reset_mem(torch.zeros(1, 1), None)
    step, memory = scorer.score(torch.tensor([BOS]), None, torch.tensor([[3, 4]]), None)
    memory = scorer.permute_mem(memory, torch.tensor([[3]]))
    next_step, _ = scorer.score(torch.tensor([3]), memory, torch.tensor([[4]]), None)
    first, second = (log10 for log10, *_ in scorer.lm.full_scores("t3 t4", bos=True, eos=False))
    assert step[0, 3].item() == pytest.approx(first * math.log(10), rel=1e-5)
    assert next_step[0, 4].item() == pytest.approx(second * math.log(10), rel=1e-5)
    assert step[0, 3] > step[0, 4]


def test_kenlm_scores_are_those_of_speechbrain_and_follow_items(token_ngram):
    beam, batch = 2, 3
    candidates = torch.tensor([[3, 4, 7], [3, 9, 10]] * batch)
    chosen = torch.tensor([[3, VOCABULARY + 9], [7, VOCABULARY + 3], [4, VOCABULARY + 10]])
    scores = []
    for scorer in (SpeechBrainKenLMScorer(**token_ngram), KenLMScorer(**token_ngram)):
        scorer.reset_mem(torch.zeros(batch, 1), None)
        tokens = torch.full((batch * beam,), BOS)
        start = scorer.kenlm.State()
        scorer.lm.BeginSentenceWrite(start)
        given = np.array([start] * len(tokens)), np.ones(len(tokens))
        if isinstance(scorer, KenLMScorer):
            given = None
        _, memory = scorer.score(tokens, given, candidates, None)
        memory = scorer.permute_mem(memory, chosen)
        step, _ = scorer.score(tokens, memory, candidates, None)
        scores.append(step)
    theirs, ours = scores
    assert torch.equal(ours, theirs)

    rows = torch.tensor([0, 1, 4, 5])
    memory = scorer.select_items(memory, torch.tensor([0, 2]), rows)
    part, part_memory = scorer.score(tokens[rows], memory, candidates[rows], None)
    assert torch.equal(part, ours[rows])
    scorer.permute_mem(part_memory, chosen[:2])
