"""Weights that are cast once a step train as autocast would train them, to the bit."""

import contextlib

import torch

from tests.modules.networks import gradients, padded_batch, small_network
from training.brains.cast_weights import CastWeights


def trained(network, x_BTD, lengths_B, cast):
    """Output and gradients of a step in bfloat16."""
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16), cast:
        out_BTD = network.encode(x_BTD, lengths_B)
    out_BTD.float().square().mean().backward()
    found = {name: gradient.clone() for name, gradient in gradients(network).items()}
    network.zero_grad()
    return out_BTD.detach(), found


def test_outputs_and_gradients_are_those_of_autocast_and_weights_stay(one_thread):
    for name in ("conmamba", "conformer"):
        x_BTD, lengths_B = padded_batch([37, 20, 9])
        network = small_network(name).train()
        parameters = dict(network.named_parameters())
        wanted = trained(network, x_BTD, lengths_B, contextlib.nullcontext())
        cast = CastWeights([network], torch.bfloat16)
        found = trained(network, x_BTD, lengths_B, cast.in_place())
        assert torch.equal(found[0], wanted[0])
        for key in wanted[1]:
            torch.testing.assert_close(found[1][key], wanted[1][key], rtol=0, atol=0)
        after = dict(network.named_parameters())
        assert all(after[key] is parameters[key] for key in parameters)


def test_inside_plain_layers_are_half_and_what_a_mixer_prepares_is_not():
    network = small_network("conmamba")
    layer = network.encoder.layers[0]
    mixer, (_, feed_forward, _) = layer.mamba, layer.ffn_module1
    with CastWeights([network], torch.bfloat16).in_place():
        half = [mixer.in_proj.weight, mixer.out_proj.weight]
        half += [feed_forward.ffn[0].weight, feed_forward.ffn[0].bias]
        exact = [mixer.x_proj.weight, mixer.dt_proj.bias, mixer.conv1d.weight, mixer.A_log]
        exact += [layer.norm1.norm.weight]
        assert {weight.dtype for weight in half} == {torch.bfloat16}
        assert {weight.dtype for weight in exact} == {torch.float32}


def test_a_weight_that_two_layers_share_is_one_weight():
    first, second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    second.weight = first.weight
    with CastWeights([torch.nn.ModuleList([first, second])], torch.bfloat16).in_place():
        assert first.weight is second.weight
        second(first(torch.ones(2, 3, dtype=torch.bfloat16))).sum().backward()
    assert first.weight.grad.dtype == torch.float32
    assert first.weight.grad.abs().sum() > 0


def test_frozen_weights_are_left_to_autocast():
    layer = torch.nn.Linear(3, 3)
    layer.weight.requires_grad_(False)
    with CastWeights([layer], torch.bfloat16).in_place():
        assert layer.weight.dtype == torch.float32
        assert layer.bias.dtype == torch.bfloat16
