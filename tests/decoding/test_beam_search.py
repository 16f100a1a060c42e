"""The cached search is SpeechBrain's uncached one, and a batch is its items one by one."""

import pytest
import torch
from speechbrain.decoders import S2STransformerBeamSearcher
from speechbrain.decoders import scorer as speechbrain_scorers

from decoding.beam_search import CachedBeamSearcher
from decoding.ctc_prefix_scorer import CTCScorer
from decoding.lm_scorers import LMScorer
from decoding.scorers import ScorerBuilder
from modules.lm import TransformerLM
from ops import packed_linear
from ops.packed_linear import cpu as packed_cpu

from .networks import BLANK, BOS, EOS, VOCABULARY, memory, output_layer, recogniser

DECODERS = ("mamba", "transformer")
LENGTHS = [30, 11, 23]
SETTING = {
    "bos_index": BOS,
    "eos_index": EOS,
    "min_decode_ratio": 0.0,
    "max_decode_ratio": 0.6,
    "beam_size": 6,
    "temperature": 1.15,
    "using_eos_threshold": False,
}


def small_lm():
    torch.manual_seed(4)
    return TransformerLM(
        VOCABULARY, d_model=16, nhead=2, num_encoder_layers=2, d_ffn=32, dropout=0.0
    ).eval()


def joint_scorers(namespace, full_ctc=False, coverage=False):
    """CTC and LM (and coverage) scorers, SpeechBrain's or ours."""
    ours = namespace == "ours"
    ctc_class = CTCScorer if ours else speechbrain_scorers.CTCScorer
    lm_class = LMScorer if ours else speechbrain_scorers.TransformerLMScorer
    builder = ScorerBuilder if ours else speechbrain_scorers.ScorerBuilder
    ctc = ctc_class(output_layer(seed=3), BLANK, EOS)
    full = [lm_class(small_lm(), temperature=1.15)]
    weights = {"ctc": 0.4, "lm" if ours else "transformerlm": 0.6}
    if coverage:
        full.append(speechbrain_scorers.CoverageScorer(VOCABULARY, threshold=0.1))
        weights["coverage"] = 0.5
    return builder(
        weights=weights,
        full_scorers=[*full, ctc] if full_ctc else full,
        partial_scorers=[] if full_ctc else [ctc],
    )


def searchers(decoder, eos_bias=4.0, scorers=None, **overrides):
    """(ours, SpeechBrain's) over one network; ``scorers`` maps a namespace to a builder."""
    modules = [recogniser(decoder), output_layer(eos_bias=eos_bias)]
    options = SETTING | overrides
    build = scorers or (lambda namespace: None)
    return (
        CachedBeamSearcher(modules=modules, scorer=build("ours"), **options),
        S2STransformerBeamSearcher(modules=modules, scorer=build("speechbrain"), **options),
    )


def search_all(searcher, lengths=LENGTHS):
    """The whole batch at once, padded with NaN."""
    states = memory(lengths)
    with torch.no_grad():
        return searcher(states, torch.tensor(lengths) / states.shape[1])


def search_one_by_one(searcher, lengths=LENGTHS):
    states = memory(lengths)
    with torch.no_grad():
        return [
            searcher(states[row : row + 1, :length].clone(), torch.ones(1))
            for row, length in enumerate(lengths)
        ]


def assert_same(actual, expected):
    """Same scores; same tokens unless the best two hypotheses are as good as each other."""
    torch.testing.assert_close(actual[2], expected[2], rtol=0, atol=1e-4)
    best, second = expected[2][0, :2]
    if best - second > 1e-3:
        assert best_tokens(actual) == best_tokens(expected)


def best_tokens(result):
    hyps, lengths, *_ = result
    return hyps[0, 0, : round(float(lengths[0, 0]) * hyps.shape[-1])].tolist()


def item(result, row):
    """One item of the results of a batch, as a batch."""
    return tuple(part[row : row + 1] for part in result)


VARIANTS = {
    "attention alone": {},
    "eos threshold": {"using_eos_threshold": True, "eos_threshold": 1.2},
    "no length normalisation": {"length_normalization": False},
    "minimum length": {"min_decode_ratio": 0.4},
    "joint, ctc on candidates": {"scorers": joint_scorers},
    "joint, ctc on all tokens": {"scorers": lambda name: joint_scorers(name, full_ctc=True)},
}


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_utterance_is_searched_as_by_speechbrain(decoder, variant):
    options = {"return_topk": True, "topk": 4} | VARIANTS[variant]
    ours, theirs = searchers(decoder, **options)
    for actual, expected in zip(search_one_by_one(ours), search_one_by_one(theirs), strict=True):
        assert_same(actual, expected)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_item_of_a_batch_gives_what_it_gives_alone(decoder, variant):
    ours, _ = searchers(decoder, **({"return_topk": True, "topk": 4} | VARIANTS[variant]))
    together = search_all(ours)
    for row, alone in enumerate(search_one_by_one(ours)):
        assert_same(item(together, row), alone)


def test_the_searches_end_both_by_themselves_and_at_their_limits():
    """What the tests above compare is of both kinds."""
    ours, _ = searchers("mamba")
    hyps, *_ = search_all(ours)
    limits = [int(0.6 * length) - 1 for length in LENGTHS]
    ended = [len(hyp) < limit for hyp, limit in zip(hyps, limits, strict=True)]
    ours, _ = searchers("mamba", eos_bias=-20.0)
    unended, *_ = search_all(ours)
    assert any(ended)
    assert [len(hyp) for hyp in unended] == limits


@pytest.mark.parametrize("eos_bias", [-20.0, 4.0])
def test_the_best_hypothesis_is_the_first_of_the_topk(eos_bias):
    best, _ = searchers("mamba", eos_bias)
    several, _ = searchers("mamba", eos_bias, return_topk=True, topk=3)
    hyps, _, scores, _ = search_all(best)
    topk_hyps, _, topk_scores, _ = search_all(several)
    torch.testing.assert_close(scores, topk_scores[:, 0])
    for hyp, candidates in zip(hyps, topk_hyps, strict=True):
        assert candidates[0, : len(hyp)].tolist() == hyp


def test_coverage_of_a_cached_transformer_decoder_is_that_of_the_uncached():
    build = lambda name: joint_scorers(name, coverage=True)  # noqa: E731
    ours, theirs = searchers("transformer", scorers=build, return_topk=True, topk=4)
    for actual, expected in zip(search_one_by_one(ours), search_one_by_one(theirs), strict=True):
        assert_same(actual, expected)
    together = search_all(ours)
    for row, alone in enumerate(search_one_by_one(ours)):
        assert_same(item(together, row), alone)


@pytest.mark.parametrize("setting", [{"coverage": True}, {"using_max_attn_shift": True}])
def test_a_mamba_decoder_has_no_attention_to_constrain(setting):
    coverage = setting.pop("coverage", False)
    build = (lambda name: joint_scorers(name, coverage=True)) if coverage else None
    with pytest.raises(ValueError, match="decoder_module: transformer"):
        searchers("mamba", scorers=build, **setting)


def test_a_loop_ends_at_max_decode_ratio():
    """A decoder that would repeat one token for ever stops at its own limit in every item."""
    network, layer = recogniser("mamba"), output_layer(scale=0.0)
    with torch.no_grad():
        layer.w.bias[7] = 50.0
    searcher = CachedBeamSearcher(modules=[network, layer], **SETTING)
    hyps, _, scores, _ = search_all(searcher)
    assert [len(hyp) for hyp in hyps] == [int(0.6 * length) - 1 for length in LENGTHS]
    assert all(set(hyp) == {7} for hyp in hyps)
    assert scores.isfinite().all()


def test_eos_threshold_delays_an_end_that_is_not_the_best_token():
    """arXiv:1904.02619, 3.1.2: an end counts only if its score reaches that of the best token."""
    network, layer = recogniser("mamba"), output_layer(scale=0.0)
    with torch.no_grad():
        layer.w.bias[7], layer.w.bias[EOS] = 3.0, 2.0
    modules = [network, layer]
    greedy_end = CachedBeamSearcher(modules=modules, **SETTING | {"length_normalization": False})
    patient = CachedBeamSearcher(
        modules=modules,
        **SETTING
        | {"length_normalization": False, "using_eos_threshold": True, "eos_threshold": 1.5},
    )
    early, *_ = search_all(greedy_end)
    late, *_ = search_all(patient)
    assert all(len(hyp) == 0 for hyp in early)
    assert [len(hyp) for hyp in late] == [int(0.6 * length) - 1 for length in LENGTHS]


def test_an_item_too_short_for_its_ratio_still_gets_one_step():
    ours, _ = searchers("mamba", max_decode_ratio=0.1)
    hyps, *_ = search_all(ours, lengths=[30, 4])
    assert len(hyps) == 2


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_hypothesis_ends_where_the_positions_of_the_decoder_do(decoder):
    network = recogniser(decoder, max_length=9)
    searcher = CachedBeamSearcher(modules=[network, output_layer(eos_bias=-20.0)], **SETTING)
    hyps, *_ = search_all(searcher)
    assert [len(hyp) for hyp in hyps] == [8, 5, 8]


def test_pure_ctc_decoding_scores_prefixes_without_the_decoder():
    """With weight 1 the score of a hypothesis that has ended is its CTC log-likelihood."""
    layer = output_layer(seed=3)
    with torch.no_grad():
        layer.w.bias[BLANK] += 6.0
    scorer = ScorerBuilder(weights={"ctc": 1.0}, full_scorers=[CTCScorer(layer, BLANK, EOS)])
    setting = SETTING | {"max_decode_ratio": 1.0, "length_normalization": False}
    searcher = CachedBeamSearcher(
        modules=[recogniser("mamba"), output_layer()], scorer=scorer, **setting
    )
    (hyp,), _, (score,), _ = search_all(searcher, lengths=[12])
    log_probs = layer(memory([12])).log_softmax(-1).transpose(0, 1)
    lengths = torch.tensor([12]), torch.tensor([len(hyp)])
    loss = torch.nn.functional.ctc_loss(log_probs, torch.tensor([hyp]), *lengths, BLANK, "sum")
    assert 0 < len(hyp) < 11
    torch.testing.assert_close(score, -loss, rtol=0, atol=1e-4)


def test_a_searcher_serves_one_batch_after_another():
    ours, _ = searchers("mamba", scorers=joint_scorers)
    first = search_all(ours)
    search_all(ours, lengths=[9])
    again = search_all(ours)
    assert first[0] == again[0]
    assert torch.equal(first[2], again[2])


class TestScorerBuilder:
    def test_speechbrains_scorers_and_builder_are_accepted(self):
        ours, theirs = searchers(
            "transformer",
            scorers=lambda name: joint_scorers("speechbrain"),
            return_topk=True,
            topk=4,
        )
        for actual, expected in zip(
            search_one_by_one(ours), search_one_by_one(theirs), strict=True
        ):
            assert_same(actual, expected)
        # Its CTC scorer cannot go on with part of a batch: finished items stay in, unchanged.
        hyps, *_ = search_all(ours, lengths=[30, 30])
        assert len(hyps) == 2

    @pytest.mark.parametrize("weights", [{}, {"ctc": 0.4, "coverage": 1.0}])
    def test_scorers_and_weights_must_match(self, weights):
        with pytest.raises(ValueError, match="needs one weight"):
            ScorerBuilder(weights, partial_scorers=[CTCScorer(output_layer(), BLANK, EOS)])


@pytest.mark.skipif(packed_cpu.prepare() is not None, reason="no C++ compiler")
def test_a_search_packs_the_weights_of_its_steps_once(monkeypatch):
    packed, products = [], []
    pack, linear = packed_linear.pack, packed_linear.packed_linear
    monkeypatch.setattr(packed_linear, "pack", lambda w: packed.append(id(w)) or pack(w))
    monkeypatch.setattr(
        packed_linear, "packed_linear", lambda *call: products.append(1) or linear(*call)
    )
    searcher, _ = searchers("mamba", eos_bias=-20.0)
    search_all(searcher)
    # Two mixers with two projections each and the feed-forward's two, in every layer; the output.
    num_weights = 6 * len(searcher.model.decoder.layers) + 1
    assert len(packed) == len(set(packed)) == num_weights
    steps = int(SETTING["max_decode_ratio"] * max(LENGTHS))
    assert len(products) == steps * num_weights


@pytest.mark.parametrize("decoder", DECODERS)
def test_hypotheses_that_did_not_end_are_counted(decoder):
    enc_states, wav_len = memory(LENGTHS), torch.tensor(LENGTHS) / max(LENGTHS)
    for eos_bias, cut in ((-30.0, 3), (30.0, 0)):
        ours, _ = searchers(decoder, eos_bias=eos_bias)
        ours(enc_states, wav_len)
        assert ours.num_cut == cut
        ours(enc_states[:1], torch.ones(1))
        assert ours.num_cut == cut + bool(cut)
