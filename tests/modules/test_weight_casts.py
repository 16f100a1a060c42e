"""Weights cast together give what autocast gives with each by itself."""

import contextlib

import pytest
import torch

from modules import layer_stack
from modules.weight_casts import cast_together
from tests.modules.networks import INPUT_SIZE, small_network


def outcome(network, x_BTD):
    """Output, and the gradients of all parameters."""
    network.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        out_BTD = network.encode(x_BTD, torch.tensor([1.0, 0.5]))
    out_BTD.float().sin().sum().backward()
    return out_BTD.detach(), {name: x.grad for name, x in network.named_parameters()}


@pytest.mark.parametrize("encoder", ["conmamba", "conformer"])
def test_results_are_the_same_bits(encoder, monkeypatch):
    network = small_network(encoder)
    frozen = next(name for name, x in network.named_parameters() if name.endswith("ffn.0.weight"))
    network.get_parameter(frozen).requires_grad_(False)
    x_BTD = torch.randn(2, 9, INPUT_SIZE)
    out_BTD, found = outcome(network, x_BTD)
    monkeypatch.setattr(layer_stack, "cast_together", lambda *_: contextlib.nullcontext())
    wanted_BTD, wanted = outcome(network, x_BTD)
    assert torch.equal(out_BTD, wanted_BTD)
    assert found[frozen] is None
    for name, grad in wanted.items():
        assert (grad is None) == (found[name] is None), name
        assert grad is None or torch.equal(found[name], grad), name


def test_weights_are_in_their_places_afterwards():
    layer = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    weight = layer[0].weight

    def fail():
        with torch.autocast("cpu", torch.bfloat16), cast_together(layer, torch.device("cpu")):
            assert layer[0].weight.dtype == torch.bfloat16
            assert layer[1].weight.dtype == torch.float32
            raise RuntimeError("in between")

    with pytest.raises(RuntimeError, match="in between"):
        fail()
    assert layer[0].weight is weight
    assert list(layer.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_nothing_is_cast_without_autocast():
    layer = torch.nn.Linear(3, 3)
    with cast_together(layer, torch.device("cpu")):
        assert layer.weight.dtype == torch.float32
