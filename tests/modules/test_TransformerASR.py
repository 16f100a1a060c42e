"""Construction of the network: published names and sizes, initialisation, SpeechBrain's numbers."""

import json
import re
from pathlib import Path

import pytest
import torch
from speechbrain.lobes.models.transformer.TransformerASR import (
    TransformerASR as SpeechBrainTransformerASR,
)
from speechbrain.nnet.activations import Swish
from speechbrain.nnet.linear import Linear
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig
from torch import nn

from modules.frontend import ConvolutionFrontEnd
from modules.initialisation import INITS
from modules.mamba import Mamba
from modules.TransformerASR import TransformerASR
from tests.modules.networks import INPUT_SIZE, VOCABULARY, small_network

PUBLISHED_PARAMETERS = json.loads((Path(__file__).parent / "published_parameters.json").read_text())
"""Names and shapes of parameters and buffers in published checkpoints, a layer's index as *."""

MAMBA_CONFIG = {"d_state": 16, "expand": 2, "d_conv": 4, "bidirectional": True}
CTC_LARGE = {"d_model": 256, "nhead": 4, "num_encoder_layers": 18, "d_ffn": 1024, "tgt_vocab": 31}
S2S_SMALL = {"d_model": 144, "nhead": 4, "d_ffn": 1024, "num_decoder_layers": 4}
S2S_LARGE = {"d_model": 512, "nhead": 8, "d_ffn": 2048, "num_decoder_layers": 6}
CONFORMER = {"encoder_module": "conformer"}
CONMAMBA = {"encoder_module": "conmamba", "mamba_config": MAMBA_CONFIG}
CONMAMBAMAMBA = {**CONMAMBA, "decoder_module": "mamba"}

PUBLISHED_SIZES = {
    "CTC/conformer_large": ({**CTC_LARGE, **CONFORMER}, 28_786_111),
    "CTC/conmamba_large": ({**CTC_LARGE, **CONMAMBA}, 31_555_519),
    "S2S/conformer_small": ({**S2S_SMALL, **CONFORMER}, 13_327_296),
    "S2S/conformer_large": ({**S2S_LARGE, **CONFORMER}, 109_136_048),
    "S2S/conmamba_small": ({**S2S_SMALL, **CONMAMBA}, 14_075_520),
    "S2S/conmamba_large": ({**S2S_LARGE, **CONMAMBA}, 115_187_888),
    "S2S/conmambamamba_small": ({**S2S_SMALL, **CONMAMBAMAMBA}, 14_570_880),
    "S2S/conmambamamba_large": ({**S2S_LARGE, **CONMAMBAMAMBA}, 122_917_040),
}


def published_model(options: dict) -> nn.ModuleList:
    """``model`` of the recipes: front end, network, (target and) CTC output layer."""
    options = {"tgt_vocab": 5000, "num_encoder_layers": 12, "num_decoder_layers": 0, **options}
    d_model, vocabulary = options["d_model"], options["tgt_vocab"]
    with torch.device("meta"):
        network = TransformerASR(
            input_size=640,
            activation=nn.GELU,
            normalize_before=True,
            attention_type="RelPosMHAXL",
            causal=False,
            **options,
        )
        outputs = [Linear(input_size=d_model, n_neurons=vocabulary)]
        if options["num_decoder_layers"]:
            outputs.insert(0, Linear(input_size=d_model, n_neurons=vocabulary))
        return nn.ModuleList([ConvolutionFrontEnd((8, 10, 80)), network, *outputs])


@pytest.mark.parametrize("name", PUBLISHED_SIZES)
def test_sizes_are_the_published_ones(name):
    options, num_parameters = PUBLISHED_SIZES[name]
    assert sum(p.numel() for p in published_model(options).parameters()) == num_parameters


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_names_and_shapes_are_the_published_ones(name):
    model = published_model(PUBLISHED_SIZES[name][0])
    shapes = {
        re.sub(r"layers\.\d+\.", "layers.*.", key): list(tensor.shape)
        for key, tensor in model.state_dict().items()
    }
    assert shapes == PUBLISHED_PARAMETERS[name]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("attention_type", ["RelPosMHAXL", "regularMHA", "RoPEMHA"])
@pytest.mark.parametrize("encoder", ["transformer", "conformer", "branchformer"])
@torch.no_grad()
def test_unpadded_numbers_are_speechbrains(encoder, attention_type, causal):
    if encoder == "branchformer" and (causal or attention_type == "RoPEMHA"):
        pytest.skip("SpeechBrain has no such Branchformer")
    options = {"encoder_module": encoder, "attention_type": attention_type, "causal": causal}
    if encoder == "branchformer":
        options |= {"csgu_linear_units": 12, "use_linear_after_conv": True}
    ours = small_network(encoder, num_decoder_layers=2, **options)
    theirs = SpeechBrainTransformerASR(
        tgt_vocab=VOCABULARY,
        input_size=INPUT_SIZE,
        d_model=16,
        nhead=2,
        num_encoder_layers=2,
        num_decoder_layers=2,
        d_ffn=24,
        dropout=0.0,
        activation=nn.GELU,
        normalize_before=True,
        kernel_size=7,
        **options,
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    src, tgt = torch.randn(2, 15, INPUT_SIZE), torch.tensor([[1, 3, 4, 5], [1, 6, 7, 0]])
    # As for the fully padded batch: a pad token is no key for the tokens behind it.
    for actual, wanted in zip(ours(src, tgt), theirs(src, tgt), strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        ours.decode(tgt, ours.encode(src), torch.tensor([15, 15])),
        theirs.decode(tgt, theirs.encode(src), torch.tensor([15, 15])),
        atol=1e-5,
        rtol=1e-5,
    )


def mixers(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if hasattr(module, "A_log")]


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("encoder", ["conmamba", "mamba"])
def test_construction_leaves_the_dynamics_of_every_mixer_intact(encoder, bidirectional, init):
    network = small_network(
        encoder,
        init=init,
        d_model=64,
        num_decoder_layers=1,
        decoder_module="mamba",
        mamba_config={"bidirectional": bidirectional},
    )
    found = mixers(network)
    assert len(found) == 4
    for mixer in found:
        suffixes = ["", "_b"] if mixer.bidirectional else [""]
        for suffix in suffixes:
            A = -getattr(mixer, f"A{suffix}_log").exp()
            torch.testing.assert_close(A, -torch.arange(1.0, 17.0).expand(128, 16))
            assert (getattr(mixer, f"D{suffix}") == 1).all()
            dt_proj = getattr(mixer, f"dt_proj{suffix}")
            step_sizes = torch.nn.functional.softplus(dt_proj.bias)
            assert step_sizes.min() >= 0.99e-3
            assert step_sizes.max() <= 1.01e-1
            # Uniform within R^-1/2 and W^-1/2; Xavier's normal numbers would go beyond.
            assert dt_proj.weight.abs().max() <= mixer.dt_rank**-0.5
            assert dt_proj.weight.abs().max() > 0.9 * mixer.dt_rank**-0.5
            taps = getattr(mixer, f"conv1d{suffix}").weight
            assert taps.abs().max() <= 0.5
            assert taps.std().item() == pytest.approx(0.5 / 3**0.5, rel=0.1)
    assert [mixer.bidirectional for mixer in found] == [bidirectional] * 2 + [False] * 2


def test_matrices_elsewhere_are_xavier():
    network = small_network(d_model=64, d_ffn=256)
    weight = network.encoder.layers[0].ffn_module1[1].ffn[0].weight
    assert weight.std().item() == pytest.approx((2 / (64 + 256)) ** 0.5, rel=0.05)


def test_weights_are_xavier_unless_another_way_is_named():
    named = small_network("conformer", num_decoder_layers=1, init="xavier").state_dict()
    for name, weights in small_network("conformer", num_decoder_layers=1).state_dict().items():
        assert torch.equal(weights, named[name]), name


@pytest.mark.parametrize("encoder", ["conformer", "conmamba", "transformer", "conformer-rope"])
def test_near_identity_draws_no_bias_but_those_of_the_mixers(encoder):
    network = small_network(encoder, num_decoder_layers=1, init="near_identity")
    of_mixers = {id(p) for m in network.modules() if isinstance(m, Mamba) for p in m.parameters()}
    biases = [
        module.bias
        for module in network.modules()
        if isinstance(module, nn.Linear | nn.Conv1d) and module.bias is not None
    ]
    assert all(not bias.any() for bias in biases if id(bias) not in of_mixers)
    assert all(bias.any() for bias in biases if id(bias) in of_mixers)


def variation(network: nn.Module) -> float:
    """The part of the encoder's output that is not the same in every frame."""
    with torch.no_grad():
        encoder_out = network.encode(torch.randn(1, 60, INPUT_SIZE))
    varying = encoder_out - encoder_out.mean(1, keepdim=True)
    return (varying.square().sum() / encoder_out.square().sum()).item()


@pytest.mark.parametrize("attention_type", ["RelPosMHAXL", "regularMHA", "RoPEMHA"])
def test_near_identity_keeps_frames_apart_that_attention_and_biases_would_level(attention_type):
    sizes = {"d_model": 64, "d_ffn": 256, "num_encoder_layers": 8, "positional_encoding": None}
    options = {**sizes, "attention_type": attention_type}
    assert variation(small_network("conformer", init="xavier", **options)) < 0.15
    assert variation(small_network("conformer", init="near_identity", **options)) > 0.5


def test_no_config_is_modified():
    config = {"d_state": 4, "expand": 2, "d_conv": 4, "bidirectional": True}
    before = dict(config)
    for encoder in ("conmamba", "mamba"):
        network = small_network(
            encoder, num_decoder_layers=1, decoder_module="mamba", mamba_config=config
        )
        assert config == before
        assert mixers(network)[0].d_state == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"encoder_module": "zipformer"},
            "zipformer.*branchformer, conformer, conmamba",
        ),
        ({"decoder_module": "lstm"}, "lstm.*mamba, transformer"),
        ({"attention_type": "flash"}, "flash.*regularMHA"),
        ({"positional_encoding": "learnt"}, "learnt.*fixed_abs_sine"),
        ({"init": "he"}, "init is 'he'; known are near_identity, xavier"),
        ({"num_encoder_layers": 0}, "num_encoder_layers is 0"),
        ({"encoder_module": "conformer", "normalize_before": False}, "normalize_before: True"),
        ({"mamba_config": {"d_stat": 16}}, "d_stat; known are d_state, d_conv"),
        ({"mamba_config": {"d_model": 16}}, "d_model; known are"),
        ({"causal": True, "mamba_config": {"bidirectional": True}}, "bidirectional: True"),
        (
            {"encoder": "mamba", "causal": True, "mamba_config": {"bidirectional": True}},
            "bidirectional: True",
        ),
        ({"encoder_module": "branchformer", "causal": True}, "causal: False"),
        ({"encoder_module": "branchformer", "attention_type": "RoPEMHA"}, "no RoPEMHA"),
        (
            {"encoder_module": "conformer", "causal": True, "attention_type": "hypermixing"},
            "hypermixing",
        ),
    ],
)
def test_contradictions_are_errors_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        small_network(**options)


PARTICULAR = {
    "bias": (True, {"conformer", "conmamba"}),
    "conformer_activation": (nn.ReLU, {"conformer"}),
    "conmamba_activation": (nn.ReLU, {"conmamba"}),
    "branchformer_activation": (nn.ReLU, {"branchformer"}),
    "csgu_linear_units": (8, {"branchformer"}),
    "gate_activation": (nn.Sigmoid, {"branchformer"}),
    "use_linear_after_conv": (False, {"branchformer"}),
}
"""Options of some encoders: a value, and the encoders that take it."""


@pytest.mark.parametrize("option", PARTICULAR)
@pytest.mark.parametrize(
    "encoder", ["branchformer", "conformer", "conmamba", "mamba", "transformer"]
)
def test_an_option_that_the_encoder_does_not_take_is_an_error(encoder, option):
    value, takers = PARTICULAR[option]
    if encoder in takers:
        small_network(encoder, **{option: value})
        return
    with pytest.raises(ValueError, match=f"{option}.*'{encoder}'.*: {', '.join(sorted(takers))}"):
        small_network(encoder, **{option: value})


@pytest.mark.parametrize(
    ("encoder", "option", "kind"),
    [
        ("conformer", "conformer_activation", Swish),
        ("conmamba", "conmamba_activation", nn.GELU),
        ("branchformer", "branchformer_activation", nn.GELU),
        ("mamba", "activation", nn.Tanh),
        ("transformer", "activation", nn.Tanh),
    ],
)
def test_each_encoder_has_its_own_activation(encoder, option, kind):
    def count(network, kind):
        return sum(isinstance(module, kind) for module in network.encoder.modules())

    default = small_network(encoder, activation=nn.Tanh)
    assert count(default, kind) > 0
    changed = small_network(encoder, **{option: nn.ELU})
    assert count(changed, nn.ELU) == count(default, kind)
    assert count(changed, kind) == 0


def test_sequences_beyond_the_positions_are_an_error():
    network = small_network("transformer", max_length=10, num_decoder_layers=1)
    with pytest.raises(ValueError, match="max_length=10"):
        network.encode(torch.randn(1, 11, INPUT_SIZE))
    state = network.init_decoder_state(network.encode(torch.randn(1, 10, INPUT_SIZE)))
    for _ in range(10):
        _, state = network.decode_step(torch.tensor([1]), state)
    with pytest.raises(ValueError, match="max_length=10"):
        network.decode_step(torch.tensor([1]), state)


@pytest.mark.parametrize(
    ("encoder", "causal", "message"),
    [
        ("branchformer", False, "cannot be cut into chunks"),
        ("transformer-hypermixing", False, "cannot be cut into chunks"),
        ("conmamba", True, "takes no chunks"),
    ],
)
def test_chunks_that_cannot_be_cut_are_an_error(encoder, causal, message):
    network = small_network(encoder, causal=causal)
    with pytest.raises(ValueError, match=message):
        network.encode(torch.randn(1, 9, INPUT_SIZE), dynchunktrain_config=DynChunkTrainConfig(4))


def test_absolute_lengths_in_the_place_of_relative_ones_are_an_error():
    with pytest.raises(ValueError, match="between 0 and 1"):
        small_network().encode(torch.randn(2, 9, INPUT_SIZE), torch.tensor([9.0, 4.0]))


def test_a_layer_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match="layers 1 to 2"):
        small_network().encode(torch.randn(1, 9, INPUT_SIZE), intermediate_layers=[0])


def test_front_end_frames_are_taken_as_they_come():
    network = small_network()
    src = torch.randn(1, 9, 4, 3)
    torch.testing.assert_close(network.encode(src), network.encode(src.flatten(2)))
