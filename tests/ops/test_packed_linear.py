"""Products with few rows are torch's, wherever they are computed."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.packed_linear import cpu, fits, pack, packed_linear

needs_compiler = pytest.mark.skipif(cpu.prepare() is not None, reason="no C++ compiler")
TOLERANCE = 5e-7
"""Of an error as a part of the sum of all magnitudes: terms may cancel."""


def inputs(rows, width, outputs, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x_MK = torch.randn(rows, width, generator=generator)
    weight_NK = torch.randn(outputs, width, generator=generator)
    bias_N = torch.randn(outputs, generator=generator) if bias else None
    return x_MK, weight_NK, bias_N


def relative_error(y, x_MK, weight_NK, bias_N):
    exact = F.linear(*(None if t is None else t.double() for t in (x_MK, weight_NK, bias_N)))
    magnitudes = F.linear(*(None if t is None else t.abs() for t in (x_MK, weight_NK, bias_N)))
    return float(((y - exact).abs() / magnitudes).max())


def product(x_MK, weight_NK, bias_N):
    with torch.no_grad():
        assert fits(x_MK, weight_NK, bias_N)
        return packed_linear(x_MK, pack(weight_NK), bias_N, len(weight_NK))


@needs_compiler
@settings(max_examples=150, deadline=None)
@given(st.integers(1, 128), st.integers(1, 70), st.integers(1, 100), st.booleans())
def test_any_size_agrees_with_float64(rows, width, outputs, bias):
    call = inputs(rows, width, outputs, bias)
    y = product(*call)
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
            results.append(product(*call))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@needs_compiler
def test_rows_do_not_meet():
    x_MK, weight_NK, bias_N = inputs(13, 40, 50)
    whole = product(x_MK, weight_NK, bias_N)
    x_MK[3] = torch.nan
    with_nan = product(x_MK, weight_NK, bias_N)
    alone = product(x_MK[7:8], weight_NK, bias_N)
    assert with_nan[3].isnan().all()
    kept = [row for row in range(13) if row != 3]
    assert torch.equal(with_nan[kept], whole[kept])
    assert torch.equal(alone[0], whole[7])


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
def test_what_the_kernel_does_not_take_does_not_fit(change):
    with torch.no_grad():
        assert not fits(*change(*inputs(4, 20, 30)))


def test_nor_do_gradients_and_autocast():
    call = inputs(4, 20, 30)
    assert not fits(*call)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert not fits(*call)
