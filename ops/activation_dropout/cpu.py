"""The backend called ``cpu``: C++ with SIMD and torch's threads, forward and backward.

PyTorch draws one random number per element with a serial generator, writes the mask, and passes
over memory for the activation, the mask and the scale separately. Here a hash of a seed and an
element's place decides whether the element stays, in the same pass; the backward computes the hash
again, so that no mask is kept.

Compiled at first use (`ops.build`).
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ops import build
from ops.native import ELEMENT_TYPES, unsupported_types

_kernel = build.Kernel(Path(__file__).with_name("cpu.cpp"))
unavailable, prepare = build.unavailable, _kernel.prepare
_ACTIVATIONS = {None: 0, "gelu": 1, "silu": 2}
# Elements that are worth another thread: it takes a while to wake up.
_THREAD_ELEMENTS = 1 << 15


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "dy", "out")),
        *((name, ctypes.c_int64) for name in ("elements", "type", "activation", "seed")),
        ("dropped", ctypes.c_int64),
        ("scale", ctypes.c_double),
        ("threads", ctypes.c_int64),
        ("parallel_for", ctypes.c_void_p),
    ]


def unsupported(arguments: tuple[Tensor, str | None, float]) -> str | None:
    """Why a call does not fit, if so."""
    return unsupported_types(arguments[0])


def apply(arguments: tuple[Tensor, str | None, float]) -> Tensor:
    """``dropout(activation(x), p)``."""
    x, activation, p = arguments
    seed = int(torch.empty((), dtype=torch.int64).random_()) if p else 0
    return _ActivationDropout.apply(x, activation, p, seed)


class _ActivationDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, activation: str | None, p: float, seed: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.options = (activation, p, seed)
        return _run(x.contiguous(), None, *ctx.options)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        return _run(x.contiguous(), grad_y.contiguous(), *ctx.options), None, None, None


def _run(x: Tensor, grad_y: Tensor | None, activation: str | None, p: float, seed: int) -> Tensor:
    """The output, or with ``grad_y`` the gradient of ``x``."""
    out = torch.empty_like(x)
    call = _Call(
        x=x.data_ptr(),
        dy=None if grad_y is None else grad_y.data_ptr(),
        out=out.data_ptr(),
        elements=x.numel(),
        type=ELEMENT_TYPES[x.dtype],
        activation=_ACTIVATIONS[activation],
        seed=seed,
        dropped=round(p * 2**32),
        scale=1.0 / (1.0 - p),
        threads=min(torch.get_num_threads(), 1 + x.numel() // _THREAD_ELEMENTS),
        parallel_for=build.parallel_for_address(),
    )
    _kernel.load().activation_dropout(ctypes.byref(call))
    return out
