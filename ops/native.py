"""Hands tensors to the C kernels: the structures of ops/simd.h and the layouts outputs get."""

from __future__ import annotations

import ctypes
from typing import overload

import torch
from torch import Tensor

from ops.checks import is_observed

ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class NativeTensor(ctypes.Structure):
    """``Tensor`` of ops/simd.h: an address and strides in elements."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        *((axis, ctypes.c_int64) for axis in ("part", "batch", "group", "channel", "frame")),
        ("type", ctypes.c_int64),
    ]


def native(x: Tensor | None, axes: str = "batch channel frame") -> NativeTensor:
    """``x`` as the kernels see it, its dimensions named by ``axes``; None becomes null."""
    result = NativeTensor()
    if x is not None:
        result.data = x.data_ptr()
        result.type = ELEMENT_TYPES[x.dtype]
        for axis, stride in zip(axes.split(), x.stride(), strict=True):
            setattr(result, axis, stride)
    return result


def address(x: Tensor | None) -> int | None:
    """Address of a tensor's first element, None for None."""
    return None if x is None else x.data_ptr()


@overload
def float32(x: Tensor) -> Tensor: ...
@overload
def float32(x: None) -> None: ...
def float32(x: Tensor | None) -> Tensor | None:
    """A parameter or state as the kernels want it: float32, contiguous."""
    if x is None or (x.dtype == torch.float32 and x.is_contiguous()):
        return x
    return x.detach().to(torch.float32).contiguous()


def empty_like(x: Tensor) -> Tensor:
    """Uninitialised memory for a tensor like ``x`` (..., channel, frame), dense.

    Channels lie next to each other where they do in ``x``, which may be a slice of something wider.
    """
    *outer, channels, frames = x.shape
    if x.stride(-2) == 1 and channels > 1:
        return x.new_empty(*outer, frames, channels).transpose(-1, -2)
    return x.new_empty(x.shape)


def without_views(*outputs: Tensor) -> tuple[Tensor, ...]:
    """The same memory: what an autograd Function returns as a view cannot be changed in place."""
    return tuple(x.detach() for x in outputs)


def ceil_div(number: int, divisor: int) -> int:
    """The quotient, rounded up; Triton's of that name takes a hundred times as long."""
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    """The smallest power of 2 that is not below ``number``."""
    return 1 << (number - 1).bit_length()


def are_float32_on_cpu(first: Tensor, *others: Tensor | None) -> bool:
    """Whether all of them that are there are float32 on the CPU, in memory that one may read."""
    return not is_observed(first) and all(
        x is None or (x.dtype == torch.float32 and x.is_cpu) for x in (first, *others)
    )


def unsupported_types(*tensors: Tensor | None) -> str | None:
    """Why the kernels cannot take these tensors, if so."""
    for tensor in tensors:
        if tensor is not None:
            if tensor.device.type != "cpu":
                return f"a tensor is on {tensor.device}"
            if tensor.dtype not in ELEMENT_TYPES:
                return f"{tensor.dtype} is computed by other backends"
    return None
