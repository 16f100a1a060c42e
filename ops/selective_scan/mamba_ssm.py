"""mamba_ssm's CUDA kernel, where it is installed, for the calls that it can take."""

from __future__ import annotations

import functools
import importlib

import torch
from torch import Tensor

from ops.selective_scan.arguments import ScanArguments

_MAX_STATE = 256


@functools.cache
def unavailable() -> str | None:
    """Why this backend cannot be used on this machine; None if it can."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    try:
        _interface()
    except Exception as error:
        # A build for another torch or CUDA fails in its own ways, ImportError being only one.
        return f"mamba_ssm's CUDA kernel cannot be imported ({type(error).__name__}: {error})"
    return None


def unsupported(arguments: ScanArguments) -> str | None:
    """Why a call does not fit mamba_ssm's function of 2.x; None if it does."""
    way = arguments.ways[-1]
    for owner, name in ((arguments, "lengths"), (way, "initial_state"), (way, "reset_every")):
        if getattr(owner, name) is not None:
            return f"mamba_ssm has no {name}"
    if way.reverse:
        return "mamba_ssm scans forward only"
    if way.u.device.type != "cuda":
        return f"mamba_ssm computes on CUDA only, the input is on {way.u.device}"
    if way.u.dtype == torch.float64:
        return "mamba_ssm has no float64"
    if way.A.shape[1] > _MAX_STATE:
        return f"mamba_ssm takes up to {_MAX_STATE} states, not {way.A.shape[1]}"
    sequences = {"delta": way.delta, "z": arguments.z}
    sequences |= {name: x for name, x in (("B", way.B), ("C", way.C)) if x.dim() == 4}
    for name, x in sequences.items():
        if x is not None and x.dtype != way.u.dtype:
            return f"mamba_ssm wants u and {name} in one dtype, not {way.u.dtype} and {x.dtype}"
    parameters = {"A": way.A, "D": way.D, "delta_bias": way.delta_bias}
    parameters |= {name: x for name, x in (("B", way.B), ("C", way.C)) if x.dim() == 2}
    for name, x in parameters.items():
        if x is not None and x.dtype != torch.float32:
            return f"mamba_ssm wants {name} in float32, not {x.dtype}"
    return None


def scan(arguments: ScanArguments) -> tuple[Tensor, Tensor]:
    """`reference.scan` by ``mamba_ssm.ops.selective_scan_interface.selective_scan_fn``."""
    (way,), z, softplus, _ = arguments
    y, last_state = _interface().selective_scan_fn(
        *way[:6], z, way.delta_bias, softplus, return_last_state=True
    )
    return y, _WithoutGradient.apply(last_state)


class _WithoutGradient(torch.autograd.Function):
    """Refuses a gradient that mamba_ssm would leave out without a word."""

    @staticmethod
    def forward(ctx, last_state: Tensor) -> Tensor:
        # What mamba_ssm returns shares its memory with what the gradient needs.
        return last_state.clone()

    @staticmethod
    def backward(ctx, grad_last_state: Tensor):
        raise RuntimeError(
            "mamba_ssm gives no gradient of the last state; choose another backend, such as triton"
        )


def _interface():
    # The extension is imported first: newer versions import the interface without it.
    importlib.import_module("selective_scan_cuda")
    return importlib.import_module("mamba_ssm.ops.selective_scan_interface")
