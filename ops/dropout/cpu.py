"""Dropout in C++, with SIMD and torch's threads.

PyTorch draws one random number per element with a serial generator, writes the mask, and passes
over memory for the mask and the scale separately. Here a hash of a seed and an element's place
decides whether the element stays; the gradient computes the hash again, so that no mask is kept.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ops import build
from ops.checks import is_observed
from ops.native import ELEMENT_TYPES, unsupported_types

_kernel = build.Kernel(Path(__file__).with_name("cpu.cpp"))
# Elements that are worth another thread: it takes a while to wake up.
_THREAD_ELEMENTS = 1 << 15


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "y")),
        *((name, ctypes.c_int64) for name in ("elements", "type", "seed", "dropped")),
        ("scale", ctypes.c_double),
        ("threads", ctypes.c_int64),
        ("parallel_for", ctypes.c_void_p),
    ]


def fits(x: Tensor) -> bool:
    """Whether `dropout` can take the place of torch's here; what torch has to see gets torch's."""
    return unsupported_types(x) is None and not is_observed(x) and _kernel.prepare() is None


def dropout(x: Tensor, p: float) -> Tensor:
    """Zero with probability ``p``, at least 0 and less than 1, else ``x / (1 - p)``.

    The seed comes from torch's generator; the mask is not the one that torch would draw.
    """
    return _Dropout.apply(x, p, int(torch.empty((), dtype=torch.int64).random_()))


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, p: float, seed: int) -> Tensor:
        ctx.options = p, seed
        return _run(x, p, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y: Tensor) -> tuple[Tensor, None, None]:
        return _run(grad_y, *ctx.options), None, None


def _run(x: Tensor, p: float, seed: int) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    call = _Call(
        x=x.data_ptr(),
        y=y.data_ptr(),
        elements=x.numel(),
        type=ELEMENT_TYPES[x.dtype],
        seed=seed,
        dropped=min(round(p * 2**32), 2**32 - 1),
        scale=1.0 / (1.0 - p),
        threads=min(torch.get_num_threads(), 1 + x.numel() // _THREAD_ELEMENTS),
        parallel_for=build.parallel_for_address(),
    )
    _kernel.load().dropout(ctypes.byref(call))
    return y
