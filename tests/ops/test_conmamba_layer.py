"""A layer in one call gives what the calls of its parts give."""

import pytest
import torch
from speechbrain.nnet.activations import Swish
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig
from torch import nn

from modules.Conmamba import ConmambaEncoderLayer, for_streams
from modules.layer_stack import Surroundings

CHUNKS = DynChunkTrainConfig(64)
OPTIONS = [
    {},
    {"activation": Swish, "kernel_size": 7},
    {"causal": True, "kernel_size": 5},
    {"bias": False, "mamba_config": {"d_state": 5, "d_conv": 2, "expand": 3}},
]


def layer(width=24, **options) -> ConmambaEncoderLayer:
    torch.manual_seed(0)
    made = ConmambaEncoderLayer(width, 40, **options).eval()
    for norm in made.modules():
        if isinstance(norm, nn.LayerNorm):
            nn.init.normal_(norm.weight, 1, 0.3)
            nn.init.normal_(norm.bias, 0, 0.3)
    return made


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("width", [24, 48])
@pytest.mark.parametrize("ahead", [0, 1, 4])
@torch.no_grad()
def test_the_fused_layer_is_the_layer(options, width, ahead):
    plain = layer(width, **options)
    fused = for_streams(plain)
    if fused.fused is None:
        pytest.skip("not compiled here")
    chunks = None if options.get("causal") else CHUNKS
    surroundings = Surroundings(chunks=chunks, ahead=ahead)
    for batch, frames in ((1, 1 + ahead), (1, 16), (3, 5), (20, 64)):
        states = [plain.initial_state(batch, CHUNKS)] * 2
        for _ in range(3):
            x_BTD, outputs = torch.randn(batch, frames, width), []
            for i, network in enumerate((plain, fused)):
                y_BTD, states[i] = network.forward_streaming(x_BTD, surroundings, states[i])
                outputs.append(y_BTD)
            torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-5)
            for ours, theirs in zip(states[1].tensors(), states[0].tensors(), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
            assert states[1].mamba.ssm.dtype == torch.float32


@torch.no_grad()
def test_threads_change_nothing():
    fused = for_streams(layer(48))
    if fused.fused is None:
        pytest.skip("not compiled here")
    x_BTD, state = torch.randn(9, 40, 48), fused.initial_state(9, CHUNKS)
    found, threads = [], torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(fused.forward_streaming(x_BTD, Surroundings(chunks=CHUNKS), state)[0])
    torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_what_is_not_as_torch_makes_it_or_wants_another_backend_is_called():
    hooked = layer()
    hooked.ffn_module1[1].ffn[0].register_forward_hook(lambda *_: None)
    wrapped = layer()
    wrapped.mamba.in_proj = nn.Sequential(wrapped.mamba.in_proj)
    tanh = layer(activation=nn.Tanh)
    slow = layer(mamba_config={"backend": "reference"})
    for network in (hooked, wrapped, tanh, slow, layer().double()):
        assert for_streams(network).fused is None


@torch.no_grad()
def test_the_state_given_stays_as_it_was():
    fused = for_streams(layer())
    state = fused.initial_state(2, CHUNKS)
    x_BTD = torch.randn(2, 4, 24)
    before = x_BTD.clone()
    fused.forward_streaming(x_BTD, Surroundings(chunks=CHUNKS), state)
    assert not any(x.any() for x in state.tensors())
    assert torch.equal(x_BTD, before)


@torch.no_grad()
def test_frames_and_states_that_do_not_fit_are_not_taken():
    fused = for_streams(layer())
    if fused.fused is None:
        pytest.skip("not compiled here")
    x_BTD, state = torch.randn(2, 4, 24), fused.initial_state(2, CHUNKS)
    states = state.mamba.conv, state.mamba.ssm, state.conv_BPD
    assert fused.fused.takes(x_BTD, *states)
    for place, x in enumerate(states):
        for other in (x[:1], x[..., 1:], x.bfloat16()):
            assert not fused.fused.takes(x_BTD, *states[:place], other, *states[place + 1 :])
    for wrong in (x_BTD[:1], x_BTD[..., 1:]):
        with pytest.raises((ValueError, RuntimeError), match="shape"):
            fused.forward_streaming(wrong, Surroundings(chunks=CHUNKS), state)


@torch.no_grad()
def test_the_override_rules_out_the_fused_layer(monkeypatch):
    monkeypatch.delenv("MAMBA_ASR_SCAN", raising=False)
    fused = for_streams(layer())
    if fused.fused is None:
        pytest.skip("not compiled here")
    state = fused.initial_state(1, CHUNKS)
    call = torch.randn(1, 4, 24), state.mamba.conv, state.mamba.ssm, state.conv_BPD
    assert fused.fused.takes(*call)
    monkeypatch.setenv("MAMBA_ASR_SCAN", "torch")
    assert not fused.fused.takes(*call)
