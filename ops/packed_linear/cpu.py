"""The product in C++, with weights that are read in the order in which they lie."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from ops import build
from ops.native import address, are_float32_on_cpu

_kernel = build.Kernel(Path(__file__).with_name("cpu.cpp"))
prepare = _kernel.prepare
# With more rows a BLAS has earned its preparations back.
MAX_ROWS = 128
# Multiplications, and elements to be packed, that are worth another thread: it takes a while to
# wake up.
_THREAD_PRODUCTS = 1 << 20
_THREAD_ELEMENTS = 1 << 15


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "inputs", "outputs")),
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "y")),
        ("threads", ctypes.c_int64),
        ("parallel_for", ctypes.c_void_p),
    ]


def fits(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> bool:
    """Whether `packed_linear` can take the place of torch's: compiled, in float32, few dense rows.

    Without gradients, outside autocast, and not where torch has to see it.
    """
    return not (
        torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or not x_MK.dim() == weight_NK.dim() == 2
        or not 0 < x_MK.shape[0] <= MAX_ROWS
        or not x_MK.shape[1] == weight_NK.shape[1] > 0
        or (bias_N is not None and bias_N.shape != weight_NK.shape[:1])
        or not are_float32_on_cpu(x_MK, weight_NK, bias_N)
        or not all(t is None or t.is_contiguous() for t in (x_MK, weight_NK, bias_N))
        or prepare() is not None
    )


def pack(weight_NK: Tensor) -> Tensor:
    """The weights in the order of `packed_linear`: blocks of outputs, in each input by input."""
    library = _kernel.load()
    outputs, inputs = weight_NK.shape
    packed = weight_NK.new_empty(library.packed_outputs(ctypes.c_int64(outputs)) * inputs)
    call = _Call(
        inputs=inputs,
        outputs=outputs,
        weight=weight_NK.data_ptr(),
        y=packed.data_ptr(),
        threads=min(torch.get_num_threads(), 1 + packed.numel() // _THREAD_ELEMENTS),
        parallel_for=build.parallel_for_address(),
    )
    library.pack_weights(ctypes.byref(call))
    return packed


def packed_linear(x_MK: Tensor, packed: Tensor, bias_N: Tensor | None, outputs: int) -> Tensor:
    """``torch.nn.functional.linear`` with the ``outputs`` rows of weights that `pack` arranged."""
    rows, inputs = x_MK.shape
    y_MN = x_MK.new_empty(rows, outputs)
    call = _Call(
        rows,
        inputs,
        outputs,
        x_MK.data_ptr(),
        packed.data_ptr(),
        address(bias_N),
        y_MN.data_ptr(),
        min(torch.get_num_threads(), 1 + rows * inputs * outputs // _THREAD_PRODUCTS),
        build.parallel_for_address(),
    )
    _kernel.load().packed_linear(ctypes.byref(call))
    return y_MN
