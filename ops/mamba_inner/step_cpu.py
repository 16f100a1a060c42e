"""One frame of a mixer in one call of compiled code: what decoding on a CPU runs on."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from ops import build
from ops.mamba_inner.arguments import Direction

_kernel = build.Kernel(Path(__file__).with_name("step.cpp"))
prepare = _kernel.prepare
# Elements of (batch, E, N) that are worth another thread: it takes a while to wake up.
_THREAD_ELEMENTS = 1 << 16


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "dim", "state", "rank", "taps")),
        ("xz", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in ("conv_weight", "conv_bias", "x_proj", "dt_proj")),
        *((name, ctypes.c_void_p) for name in ("dt_bias", "A_log", "D")),
        *((name, ctypes.c_void_p) for name in ("conv_state", "ssm_state", "y")),
        *((name, ctypes.c_void_p) for name in ("next_conv_state", "next_ssm_state")),
        ("threads", ctypes.c_int64),
        ("parallel_for", ctypes.c_void_p),
    ]


def step(
    xz_BF: Tensor, parameters: Direction, conv_state: Tensor, ssm_state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`mamba_inner_step` on float32 tensors of the CPU."""
    xz_BF, conv_state, ssm_state = (x.contiguous() for x in (xz_BF, conv_state, ssm_state))
    weights = [None if x is None else x.contiguous() for x in parameters]
    batch, dim, state = ssm_state.shape
    y_BE = xz_BF.new_empty(batch, dim)
    next_conv, next_ssm = torch.empty_like(conv_state), torch.empty_like(ssm_state)
    call = _Step(
        batch,
        dim,
        state,
        parameters.dt_proj.shape[1],
        conv_state.shape[2] + 1,
        xz_BF.data_ptr(),
        *(None if x is None else x.data_ptr() for x in weights),
        conv_state.data_ptr(),
        ssm_state.data_ptr(),
        y_BE.data_ptr(),
        next_conv.data_ptr(),
        next_ssm.data_ptr(),
        min(torch.get_num_threads(), 1 + ssm_state.numel() // _THREAD_ELEMENTS),
        build.parallel_for_address(),
    )
    _kernel.load().mamba_inner_step(ctypes.byref(call))
    return y_BE, next_conv, next_ssm
