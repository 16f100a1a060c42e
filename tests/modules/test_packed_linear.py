"""The twin of a network computes what the network does, from the weights it was made with."""

import pytest
import torch
from speechbrain.nnet.linear import Linear
from torch import nn

from modules import packed_linear as module
from modules.packed_linear import TiedEmbedding, with_packed_linears
from ops.packed_linear import cpu

needs_compiler = pytest.mark.skipif(cpu.prepare() is not None, reason="no C++ compiler")


@pytest.fixture
def calls(monkeypatch):
    """Names of what the compiled kernel did."""
    done = []
    for name in ("pack", "packed_linear"):
        function = getattr(cpu, name)
        monkeypatch.setattr(
            module.packed_linear,
            name,
            lambda *call, name=name, function=function: done.append(name) or function(*call),
        )
    return done


@needs_compiler
@pytest.mark.parametrize(
    "network",
    [
        nn.Linear(20, 30),
        nn.Linear(20, 30, bias=False),
        Linear(30, input_size=20),
        nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(20, 30))),
    ],
)
@torch.no_grad()
def test_linear_layers_at_every_depth_are_arranged_once(network, calls):
    x_BD = torch.randn(5, 20)
    twin = with_packed_linears(network)
    for _ in range(2):
        torch.testing.assert_close(twin(x_BD), network(x_BD))
    assert calls == ["pack", "packed_linear", "packed_linear"]


@needs_compiler
@torch.no_grad()
def test_an_embedding_that_is_the_output_layer_too(calls):
    embedding, x_BD = TiedEmbedding(30, 20), torch.randn(5, 20)
    twin = with_packed_linears(embedding)
    torch.testing.assert_close(twin.logits(x_BD), embedding.logits(x_BD))
    assert torch.equal(twin(torch.tensor([7])), embedding(torch.tensor([7])))
    assert calls == ["pack", "packed_linear"]


@torch.no_grad()
def test_a_new_twin_has_the_weights_of_now():
    layer, x_BD = nn.Linear(20, 30), torch.randn(5, 20)
    first = with_packed_linears(layer)(x_BD)
    layer.weight.data.mul_(2)
    layer.bias.data.mul_(2)
    torch.testing.assert_close(with_packed_linears(layer)(x_BD), 2 * first)


def test_the_network_itself_stays_as_it_was(calls):
    network = nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30))
    twin = with_packed_linears(network)
    assert type(network[0]) is nn.Linear
    assert [id(p) for p in twin.parameters()] == [id(p) for p in network.parameters()]
    assert twin.state_dict().keys() == network.state_dict().keys()
    with torch.no_grad():
        network(torch.randn(5, 20))
    assert not calls


def test_a_twin_has_gradients(calls):
    layer = nn.Linear(20, 30)
    with_packed_linears(layer)(torch.randn(5, 20)).sum().backward()
    assert layer.weight.grad is not None
    assert not calls


def test_hooks_are_called():
    layer = nn.Linear(20, 30)
    layer.register_forward_hook(lambda layer, inputs, output: output.relu())
    with torch.no_grad():
        assert with_packed_linears(layer)(torch.randn(5, 20)).min() == 0
