"""One frame at a time gives what all frames at once give."""

import pytest
import torch

from modules.mamba import Mamba
from ops.mamba_inner import chunk_cpu

BATCH, FRAMES, WIDTH = 3, 11, 24
OPTIONS = [
    {},
    {"conv_bias": False, "d_conv": 2, "d_state": 5},
    {"d_state": 16, "expand": 1.5, "dt_rank": 7},
    {"d_state": 33, "d_conv": 1},
]


def mixer(**options):
    torch.manual_seed(0)
    return Mamba(WIDTH, backend="reference", **options).eval()


def stepped(network, x_BTD, state):
    outputs = []
    for x_BD in x_BTD.unbind(1):
        y_BD, state = network.step(x_BD, state)
        outputs.append(y_BD)
    return torch.stack(outputs, 1), state


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", OPTIONS)
def test_steps_equal_the_whole(options, dtype):
    network = mixer(**options).to(dtype)
    x_BTD = torch.randn(BATCH, FRAMES, WIDTH, dtype=dtype)
    with torch.no_grad():
        expected, last = network(x_BTD, return_state=True)
        actual, state = stepped(network, x_BTD, network.initial_state(BATCH))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(state.ssm, last.ssm, rtol=0, atol=tolerance)
    torch.testing.assert_close(state.conv, last.conv, rtol=0, atol=tolerance)
    assert state.ssm.dtype == dtype


def test_the_path_without_gradients_is_the_one_with_them():
    network = mixer()
    x_BTD = torch.randn(BATCH, FRAMES, WIDTH)
    expected, _ = stepped(network, x_BTD, network.initial_state(BATCH))
    assert expected.requires_grad
    with torch.no_grad():
        actual, _ = stepped(network, x_BTD, network.initial_state(BATCH))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_bfloat16_errs_no_more_than_twice_as_much_as_the_whole():
    exact = mixer()
    network = mixer().to(torch.bfloat16)
    x_BTD = torch.randn(BATCH, FRAMES, WIDTH)
    with torch.no_grad():
        truth = exact(x_BTD)
        whole = network(x_BTD.bfloat16()).float()
        steps, state = stepped(network, x_BTD.bfloat16(), network.initial_state(BATCH))
    assert state.ssm.dtype == torch.float32
    assert (steps.float() - truth).norm() <= 2 * (whole - truth).norm()


def test_the_state_given_is_left_as_it_was():
    network = mixer()
    with torch.no_grad():
        _, state = network.step(torch.randn(BATCH, WIDTH), network.initial_state(BATCH))
        conv, ssm = state.conv.clone(), state.ssm.clone()
        network.step(torch.randn(BATCH, WIDTH), state)
    assert torch.equal(state.conv, conv)
    assert torch.equal(state.ssm, ssm)


@pytest.mark.parametrize("options", OPTIONS)
def test_the_compiled_step_is_the_one_in_torch(options, monkeypatch):
    if chunk_cpu.prepare() is not None:
        pytest.skip(f"not compiled here: {chunk_cpu.prepare()}")
    network = mixer(**options)
    network.backend = "auto"
    # Enough rows for several threads.
    x_BTD = torch.randn(BATCH * 70, 3, WIDTH)
    with torch.no_grad():
        compiled, state = stepped(network, x_BTD, network.initial_state(len(x_BTD)))
        monkeypatch.setattr(chunk_cpu, "are_float32_on_cpu", lambda *tensors: False)
        expected, expected_state = stepped(network, x_BTD, network.initial_state(len(x_BTD)))
    torch.testing.assert_close(compiled, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(state.ssm, expected_state.ssm, rtol=0, atol=1e-5)
    torch.testing.assert_close(state.conv, expected_state.conv, rtol=0, atol=0)


@pytest.mark.parametrize("frames", [1, 2, 5, 19])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_the_compiled_chunk_is_the_reference(options, bidirectional, frames):
    if chunk_cpu.prepare() is not None:
        pytest.skip(f"not compiled here: {chunk_cpu.prepare()}")
    network = mixer(bidirectional=bidirectional, **options)
    states = [network.initial_state(BATCH)] * 2
    with torch.no_grad():
        for _ in range(3):
            x_BTD, outputs = torch.randn(BATCH, frames, WIDTH), []
            for i, backend in enumerate(("reference", "auto")):
                network.backend = backend
                y, states[i] = network(x_BTD, state=states[i], chunk_size=frames, return_state=True)
                outputs.append(y)
            torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-5)
            torch.testing.assert_close(states[1].ssm, states[0].ssm, rtol=0, atol=1e-5)
            torch.testing.assert_close(states[1].conv, states[0].conv, rtol=0, atol=1e-5)
