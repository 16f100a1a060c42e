"""The backend called ``triton``: the convolution on a GPU without a CUDA toolchain.

Triton is imported at the first call. With TRITON_INTERPRET=1 in the environment before that, the
kernels run on the CPU, slowly: this is how they are tested without a GPU.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ops.causal_conv1d.arguments import ConvArguments
from ops.causal_conv1d.operator import new_gradient, register
from ops.native import ceil_div, empty_like, float32
from ops.selective_scan.triton import MAX_GRID, interpreted, unavailable

if TYPE_CHECKING:
    from ops.triton_launcher import Plan

# One tile of 64 frames for each program along an axis of the grid.
_MAX_FRAMES = 64 * MAX_GRID

__all__ = ["conv", "conv_backward", "conv_forward", "unavailable", "unsupported"]


def unsupported(arguments: ConvArguments) -> str | None:
    """Why this call does not fit, None if it does."""
    x = arguments.x
    batch, _, time = x.shape
    if x.dtype == torch.float64:
        return "it computes in float32, the inputs are float64"
    if x.device.type != "cuda" and not interpreted():
        return f"the inputs are on {x.device}, it needs a CUDA device"
    if x.numel() == 0:
        return "there is nothing to convolve"
    if batch > MAX_GRID:
        return f"the batch of {batch} exceeds {MAX_GRID} items"
    if time > _MAX_FRAMES:
        return f"{time} frames exceed {_MAX_FRAMES}; convolve in pieces"
    return None


def conv_forward(arguments: ConvArguments) -> tuple[Tensor, Tensor]:
    """`conv` without autograd."""
    from ops.causal_conv1d.triton_kernels import causal_conv1d_forward_kernel
    from ops.triton_launcher import launch
    from ops.triton_sequences import Sequence

    x, weight, bias, _, lengths, _, initial_state, _ = arguments
    weight, bias = float32(weight), float32(bias)
    y = empty_like(x)
    state = x.new_empty(x.shape[0], x.shape[1], weight.shape[1] - 1)
    with torch.cuda.device_of(x):
        launch(
            causal_conv1d_forward_kernel, _plan_of(arguments), Sequence(x, *x.stride()), weight,
            bias, float32(initial_state), Sequence(y, *y.stride()), state, weight, bias, y, state,
            lengths,
        )  # fmt: skip
    return y, state


def conv_backward(
    grad_y: Tensor,
    grad_state: Tensor | None,
    arguments: ConvArguments,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, weight, bias and initial_state; None where absent."""
    from ops.causal_conv1d.triton_kernels import causal_conv1d_backward_kernel
    from ops.triton_launcher import launch
    from ops.triton_sequences import Sequence

    x, weight, bias, _, lengths, _, initial_state, _ = arguments
    width, plan_of_call = weight.shape[1], _plan_of(arguments)
    grad_x = empty_like(x)
    _, blocks, batch = plan_of_call.grid
    parts = x.new_empty(batch, blocks, width + 1, x.shape[1], dtype=torch.float32)
    grad_initial = None
    if initial_state is not None:
        grad_initial = x.new_empty(initial_state.shape, dtype=torch.float32)
    taps = float32(weight), float32(bias)
    with torch.cuda.device_of(x):
        launch(
            causal_conv1d_backward_kernel, plan_of_call, Sequence(grad_y, *grad_y.stride()),
            float32(grad_state), Sequence(x, *x.stride()), *taps, float32(initial_state),
            Sequence(grad_x, *grad_x.stride()), parts, grad_initial, grad_y, *taps, parts, lengths,
        )  # fmt: skip
    if initial_state is not None and grad_initial is not None:
        grad_initial = new_gradient(initial_state).copy_(grad_initial)
    sums = parts.sum((0, 1))
    return (
        grad_x,
        sums[:width].t().to(weight.dtype),
        None if bias is None else sums[width].to(bias.dtype),
        grad_initial,
    )


def _plan_of(arguments: ConvArguments) -> Plan:
    x, weight, _, activation, _, reverse, _, reset_every = arguments
    return plan(x.device, x.shape, weight.shape[1], activation is not None, reset_every, reverse)


# Lengths of batches come in hundreds.
@functools.lru_cache(1024)
def plan(
    _device: torch.device, shape: tuple[int, int, int], width: int, silu: bool,
    reset_every: int | None, reverse: bool, both: bool = False,
) -> Plan:  # fmt: skip
    """How both kernels are launched.

    Args:
        shape: (batch, dim, time).
        both: the same from the first frame to the last before it.
    """
    from ops.causal_conv1d.triton_kernels import CHANNELS, FRAMES
    from ops.triton_launcher import Plan

    batch, dim, time = shape
    return Plan(
        (ceil_div(dim, CHANNELS.value), ceil_div(time, FRAMES.value), batch),
        (
            time, dim, time if both else reset_every or time, reset_every or time,
            int(reverse and not both), int(reverse),
        ),
        # ENTRIES: a power of two that holds the width - 1 entries of a state.
        WIDTH=width, ENTRIES=1 << max(0, width - 2).bit_length(), SILU=silu, BOTH=both,
    )  # fmt: skip


conv = register("mamba_asr::causal_conv1d_triton", conv_forward, conv_backward)
