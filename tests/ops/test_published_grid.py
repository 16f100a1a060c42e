"""The parameter grid of mamba_ssm's own test of its scan, on ours, with its tolerances."""

import functools
import itertools

import pytest
import torch

from ops.selective_scan import selective_scan_fn
from ops.selective_scan.dispatch import BACKENDS
from tests.ops.scans import device_of, present_backends

PRESENT = present_backends(BACKENDS)

BATCH, DIM, STATE = 2, 4, 8
TOLERANCES = {
    torch.float32: (6e-4, 2e-3),
    torch.float16: (3e-3, 5e-3),
    torch.bfloat16: (3e-2, 5e-2),
}
FLAGS = ("variable_B", "variable_C", "has_D", "has_z", "has_delta_bias", "delta_softplus")


def grid_inputs(time, dtype, groups, flags):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    def projection(variable):
        if not variable:
            return normal(DIM, STATE)
        shape = (BATCH, STATE, time) if groups == 1 else (BATCH, groups, STATE, time)
        return normal(*shape).to(dtype)

    return {
        "u": normal(BATCH, DIM, time).to(dtype),
        "delta": (0.5 * torch.rand(BATCH, DIM, time, generator=generator)).to(dtype),
        "A": -0.5 * torch.rand(DIM, STATE, generator=generator),
        "B": projection(flags["variable_B"]),
        "C": projection(flags["variable_C"]),
        "D": normal(DIM) if flags["has_D"] else None,
        "z": normal(BATCH, DIM, time).to(dtype) if flags["has_z"] else None,
        "delta_bias": (
            0.5 * torch.rand(DIM, generator=generator) if flags["has_delta_bias"] else None
        ),
    }


def results(backend, time, dtype, groups, flags):
    """Output, last state and gradients, called by position as mamba_ssm's users do."""
    leaves = {
        name: None if x is None else x.to(device_of(backend)).requires_grad_()
        for name, x in grid_inputs(time, dtype, groups, flags).items()
    }
    y, last_state = selective_scan_fn(
        *leaves.values(), flags["delta_softplus"], True, backend=backend
    )
    generator = torch.Generator().manual_seed(1)
    y.backward(torch.randn(y.shape, generator=generator).to(y))
    grads = {name: x.grad for name, x in leaves.items() if x is not None}
    return y.detach(), last_state.detach(), grads


@functools.lru_cache(maxsize=256)
def reference_results(time, dtype, groups, flags):
    return results("reference", time, dtype, groups, dict(zip(FLAGS, flags, strict=True)))


def check(backend, time, dtype, groups, flags):
    y, last_state, grads = results(
        backend, time, dtype, groups, dict(zip(FLAGS, flags, strict=True))
    )
    wanted_y, wanted_state, wanted_grads = reference_results(time, dtype, groups, flags)
    rtol, atol = TOLERANCES[dtype]
    weight_rtol, weight_atol = (max(1e-3, rtol), max(1e-3, atol))
    torch.testing.assert_close(y.cpu(), wanted_y, rtol=rtol, atol=atol)
    torch.testing.assert_close(last_state.cpu(), wanted_state, rtol=rtol, atol=atol)
    tolerances = {
        "u": (2 * rtol, 2 * atol),
        "delta": (5 * rtol, 10 * atol),
        "A": (weight_rtol, 5 * weight_atol),
        "B": (weight_rtol, weight_atol),
        "C": (weight_rtol, weight_atol),
        "D": (weight_rtol, weight_atol),
        "z": (weight_rtol, weight_atol),
        "delta_bias": (weight_rtol, weight_atol),
    }
    assert grads.keys() == wanted_grads.keys()
    for name, wanted in wanted_grads.items():
        grad_rtol, grad_atol = tolerances[name]
        torch.testing.assert_close(grads[name].cpu(), wanted, rtol=grad_rtol, atol=grad_atol)


@pytest.mark.parametrize("backend", PRESENT)
@pytest.mark.parametrize("groups", [1, 2])
def test_every_combination_of_parts(backend, groups):
    for flags in itertools.product([False, True], repeat=len(FLAGS)):
        if groups == 1 or flags[0] or flags[1]:
            check(backend, 32, torch.float32, groups, flags)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "time",
    [128, 256, 512, 1024, *(pytest.param(t, marks=pytest.mark.slow) for t in (2048, 4096))],
)
def test_every_length_and_type(time, dtype, groups):
    for backend in PRESENT:
        check(backend, time, dtype, groups, (True,) * len(FLAGS))
