"""The backend called ``cpu``: C++ with SIMD and torch's threads, forward and backward.

Compiled at first use (`ops.build`). Registered as torch operators, so that torch.compile and
torch.export see one node.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from ops import build
from ops.causal_conv1d.arguments import ConvArguments
from ops.causal_conv1d.operator import new_gradient, register
from ops.native import NativeTensor, address, empty_like, float32, native, unsupported_types

_kernel = build.Kernel(Path(__file__).with_name("cpu.cpp"))
unavailable, prepare = _kernel.unavailable, _kernel.prepare
# Elements of (batch, dim, time) that are worth another thread: it takes a while to wake up.
_THREAD_ELEMENTS = 1 << 16
# Channels of a unit of work: with float32 and the kernel's tile they stay in a small L2 cache.
_UNIT_CHANNELS = 128


class _Convolution(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "dim", "frames", "width")),
        *((name, ctypes.c_int64) for name in ("silu", "reverse", "reset_every")),
        *((name, ctypes.c_void_p) for name in ("lengths", "weight", "bias")),
        *((name, NativeTensor) for name in ("x", "y")),
        *((name, ctypes.c_void_p) for name in ("initial_state", "state")),
        *((name, NativeTensor) for name in ("dy", "dx")),
        *((name, ctypes.c_void_p) for name in ("dstate", "dinitial_state", "dweight", "dbias")),
        *((name, ctypes.c_int64) for name in ("channels_per_unit", "threads")),
        ("parallel_for", ctypes.c_void_p),
    ]


def unsupported(arguments: ConvArguments) -> str | None:
    """Why a call does not fit, if so."""
    x, weight, bias, _, _, _, initial_state, _ = arguments
    return unsupported_types(x, weight, bias, initial_state)


def conv_forward(arguments: ConvArguments) -> tuple[Tensor, Tensor]:
    """`conv` without autograd."""
    functions, call, kept = _describe(arguments)
    x = arguments.x
    y = empty_like(x)
    state = x.new_empty(call.batch, call.dim, call.width - 1, dtype=torch.float32)
    call.y, call.state = native(y), address(state)
    functions.causal_conv1d_forward(ctypes.byref(call))
    del kept
    return y, state.to(x.dtype)


def conv_backward(
    grad_y: Tensor,
    grad_state: Tensor | None,
    arguments: ConvArguments,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, weight, bias and initial_state; None where absent."""
    functions, call, kept = _describe(arguments)
    x, weight, bias, _, _, _, initial_state, _ = arguments
    dx = empty_like(x)
    grad_state = float32(grad_state)
    channels = functions.causal_conv1d_channels()
    padded_dim = -(-call.dim // channels) * channels
    dweight = x.new_empty(call.batch, call.width, padded_dim, dtype=torch.float32)
    dbias = None if bias is None else dweight.new_empty(call.batch, padded_dim)
    dinitial = None if initial_state is None else dweight.new_empty(initial_state.shape)
    call.dy, call.dx, call.dstate = native(grad_y), native(dx), address(grad_state)
    call.dweight, call.dbias, call.dinitial_state = map(address, (dweight, dbias, dinitial))
    functions.causal_conv1d_backward(ctypes.byref(call))
    del kept
    grad_bias = grad_initial = None
    # Added up over the batch in one order, whichever thread wrote which part.
    if bias is not None and dbias is not None:
        grad_bias = dbias.sum(0)[: call.dim].to(bias.dtype).contiguous()
    if initial_state is not None and dinitial is not None:
        grad_initial = new_gradient(initial_state).copy_(dinitial)
    return (
        dx,
        dweight.sum(0)[:, : call.dim].T.to(weight.dtype).contiguous(),
        grad_bias,
        grad_initial,
    )


def _describe(
    arguments: ConvArguments,
) -> tuple[ctypes.CDLL, _Convolution, list[Tensor | None]]:
    """The kernel, the call without what it writes, and the tensors that must outlive it."""
    functions = _kernel.load()
    x, weight, bias, activation, lengths, reverse, initial_state, reset_every = arguments
    call = _Convolution()
    call.batch, call.dim, call.frames = x.shape
    call.width = weight.shape[1]
    call.silu, call.reverse = activation is not None, reverse
    call.reset_every = reset_every or 0
    call.x = native(x)
    kept = [lengths, float32(weight), float32(bias), float32(initial_state)]
    call.lengths, call.weight, call.bias, call.initial_state = map(address, kept)
    threads = torch.get_num_threads()
    # Small units, and several of them for each thread.
    parts = max(-(-call.dim // _UNIT_CHANNELS), -(-4 * threads // max(1, call.batch)))
    channels = functions.causal_conv1d_channels()
    call.channels_per_unit = -(-max(1, call.dim) // parts // channels) * channels
    call.threads = min(threads, 1 + x.numel() // _THREAD_ELEMENTS)
    call.parallel_for = build.parallel_for_address()
    return functions, call, kept


conv = register("mamba_asr::causal_conv1d_cpu", conv_forward, conv_backward)
