"""Products with few rows are torch's, wherever they are computed."""

import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from speechbrain.nnet.linear import Linear
from torch import nn

from modules.step_linear import step_linear
from ops.packed_linear import cpu, packed_linear, packed_weights

needs_compiler = pytest.mark.skipif(cpu.prepare() is not None, reason="no C++ compiler")
TOLERANCE = 2e-6


def inputs(rows, width, outputs, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x_MK = torch.randn(rows, width, generator=generator)
    weight_NK = torch.randn(outputs, width, generator=generator)
    bias_N = torch.randn(outputs, generator=generator) if bias else None
    return x_MK, weight_NK, bias_N


def relative_error(y, x_MK, weight_NK, bias_N):
    exact = F.linear(*(None if t is None else t.double() for t in (x_MK, weight_NK, bias_N)))
    return float((y - exact).norm() / exact.norm())


@pytest.fixture
def compiled_calls(monkeypatch):
    """Counts products of the compiled kernel."""
    calls = []
    linear = cpu.linear
    monkeypatch.setattr(cpu, "linear", lambda *call: calls.append(1) or linear(*call))
    return calls


@needs_compiler
@settings(max_examples=150, deadline=None)
@given(st.integers(1, 128), st.integers(1, 70), st.integers(1, 100), st.booleans())
def test_any_size_agrees_with_float64(rows, width, outputs, bias):
    call = inputs(rows, width, outputs, bias)
    with torch.no_grad(), packed_weights():
        y = packed_linear(*call)
    assert y.shape == (rows, outputs)
    assert relative_error(y, *call) < TOLERANCE


@needs_compiler
@pytest.mark.parametrize(("width", "outputs"), [(144, 5000), (1024, 144), (16, 32), (33, 31)])
def test_threads_do_not_change_a_bit(width, outputs):
    call, results = inputs(67, width, outputs), []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with torch.no_grad(), packed_weights():
                results.append(packed_linear(*call))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@needs_compiler
def test_rows_do_not_meet():
    x_MK, weight_NK, bias_N = inputs(13, 40, 50)
    with torch.no_grad(), packed_weights():
        whole = packed_linear(x_MK, weight_NK, bias_N)
        x_MK[3] = torch.nan
        with_nan = packed_linear(x_MK, weight_NK, bias_N)
        alone = packed_linear(x_MK[7:8], weight_NK, bias_N)
    assert with_nan[3].isnan().all()
    kept = [row for row in range(13) if row != 3]
    assert torch.equal(with_nan[kept], whole[kept])
    assert torch.equal(alone[0], whole[7])


@needs_compiler
def test_weights_are_arranged_once_and_anew_in_the_next_scope(compiled_calls, monkeypatch):
    packs = []
    pack = cpu.pack
    monkeypatch.setattr(cpu, "pack", lambda weight: packs.append(1) or pack(weight))
    x_MK, weight_NK, bias_N = inputs(4, 20, 30)
    with torch.no_grad():
        with packed_weights():
            first = packed_linear(x_MK, weight_NK, bias_N)
            with packed_weights():
                packed_linear(x_MK, weight_NK, bias_N)
            assert torch.equal(packed_linear(x_MK, weight_NK, bias_N), first)
        assert len(packs) == 2
        weight_NK.data.mul_(2)
        with packed_weights():
            doubled = packed_linear(x_MK, weight_NK, None)
    torch.testing.assert_close(doubled, 2 * (first - bias_N), rtol=1e-5, atol=1e-5)
    assert len(compiled_calls) == 4


def test_outside_it_is_torch_and_has_gradients(compiled_calls):
    x_MK, weight_NK, bias_N = inputs(4, 20, 30)
    weight_NK.requires_grad_()
    with packed_weights():
        packed_linear(x_MK, weight_NK, bias_N).sum().backward()
    assert weight_NK.grad is not None
    with torch.no_grad():
        assert torch.equal(packed_linear(x_MK, weight_NK), F.linear(x_MK, weight_NK))
    assert not compiled_calls


@pytest.mark.parametrize(
    "change",
    [
        lambda x, w, b: (x.double(), w.double(), b.double()),
        lambda x, w, b: (x.bfloat16(), w.bfloat16(), b.bfloat16()),
        lambda x, w, b: (x.T.contiguous().T, w, b),
        lambda x, w, b: (x[None], w, b),
        lambda x, w, b: (x, w, b[:1]),
        lambda x, w, b: (x, w[0], None),
        lambda x, w, b: (x[:0], w, b),
        lambda x, w, b: (x.repeat(50, 1), w, b),
    ],
    ids=[
        *("float64", "bfloat16", "strided", "batched", "one bias", "one output", "no rows"),
        "many rows",
    ],
)
def test_what_the_kernel_does_not_take_goes_to_torch(change, compiled_calls):
    call = change(*inputs(4, 20, 30))
    with torch.no_grad(), packed_weights():
        assert torch.equal(packed_linear(*call), F.linear(*call))
    assert not compiled_calls


@needs_compiler
def test_another_thread_has_its_own_scope(compiled_calls):
    call = inputs(4, 20, 30)
    with torch.no_grad(), packed_weights():

        def work():
            with torch.no_grad():
                packed_linear(*call)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert not compiled_calls
        packed_linear(*call)
    assert len(compiled_calls) == 1


@needs_compiler
@pytest.mark.parametrize(
    "layer", [nn.Linear(20, 30), nn.Linear(20, 30, bias=False), Linear(30, input_size=20)]
)
def test_linear_layers_are_taken_apart(layer, compiled_calls):
    x_BD = torch.randn(5, 20)
    with torch.no_grad(), packed_weights():
        torch.testing.assert_close(step_linear(layer, x_BD), layer(x_BD))
    assert len(compiled_calls) == 1


def test_other_layers_are_called(compiled_calls):
    hooked = nn.Linear(20, 30)
    hooked.register_forward_hook(lambda layer, inputs, output: output.relu())
    with torch.no_grad(), packed_weights():
        for layer in (nn.Sequential(nn.Linear(20, 30), nn.ReLU()), hooked):
            assert step_linear(layer, torch.randn(5, 20)).min() == 0
    assert not compiled_calls


def test_autocast_keeps_its_type(compiled_calls):
    call = inputs(4, 20, 30)
    with torch.no_grad(), packed_weights(), torch.autocast("cpu", torch.bfloat16):
        assert packed_linear(*call).dtype == torch.bfloat16
    assert not compiled_calls
