"""The backend called ``triton``: the convolution on a GPU without a CUDA toolchain.

Triton is imported at the first call. With TRITON_INTERPRET=1 in the environment before that, the
kernels run on the CPU, slowly: this is how they are tested without a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
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
    with torch.cuda.device_of(arguments.x):
        y, state = conv_forward_of_ways([arguments])
    return y[0], state[0]


def conv_forward_of_ways(ways: Sequence[ConvArguments]) -> tuple[Tensor, Tensor]:
    """Outputs and last states of one or two ways over the same input, in one launch.

    Only the first may have an initial state; taps, activation and lengths are alike.

    Returns:
        (ways, batch, dim, time) and (ways, batch, dim, width - 1).
    """
    from ops.causal_conv1d.triton_kernels import causal_conv1d_forward_kernel
    from ops.triton_launcher import launch
    from ops.triton_sequences import Sequence as Strided

    first, second = ways[0], ways[-1]
    x = first.x
    y = empty_like(x.expand(len(ways), *x.shape))
    state = x.new_empty(len(ways), x.shape[0], x.shape[1], first.weight.shape[1] - 1)
    launch(
        causal_conv1d_forward_kernel, _plan_of(ways), Strided(x, *x.stride()),
        float32(first.weight), float32(first.bias), float32(first.initial_state),
        Strided(y[0], *y.stride()[1:]), state[0], float32(second.weight), float32(second.bias),
        y[-1], state[-1], first.lengths,
    )  # fmt: skip
    return y, state


def conv_backward(
    grad_y: Tensor,
    grad_state: Tensor | None,
    arguments: ConvArguments,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, weight, bias and initial_state; None where absent."""
    weight, bias = arguments.weight, arguments.bias
    grad_x = empty_like(arguments.x)
    with torch.cuda.device_of(grad_x):
        parts, grad_initial = conv_backward_of_ways(grad_y[None], grad_state, [arguments], grad_x)
    width = weight.shape[1]
    sums = parts[0].sum((0, 1))
    return (
        grad_x,
        sums[:width].t().to(weight.dtype),
        None if bias is None else sums[width].to(bias.dtype),
        grad_initial,
    )


def conv_backward_of_ways(
    grad_y: Tensor,
    grad_state: Tensor | None,
    ways: Sequence[ConvArguments],
    grad_x: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `conv_forward_of_ways`, that of x into given memory.

    Args:
        grad_y: of the outputs, (ways, batch, dim, time).
        grad_state: of the first way's last state.

    Returns:
        parts of the gradients of taps and bias, (ways, batch, blocks of frames, width + 1, dim),
        and the gradient of the initial state, None if there is none.
    """
    from ops.causal_conv1d.triton_kernels import causal_conv1d_backward_kernel
    from ops.triton_launcher import launch
    from ops.triton_sequences import Sequence as Strided

    first, second = ways[0], ways[-1]
    x, initial_state, plan = first.x, first.initial_state, _plan_of(ways)
    _, blocks, batch = plan.grid
    width = first.weight.shape[1]
    parts = x.new_empty(len(ways), batch, blocks, width + 1, x.shape[1], dtype=torch.float32)
    grad_initial = None
    if initial_state is not None:
        grad_initial = x.new_empty(initial_state.shape, dtype=torch.float32)
    launch(
        causal_conv1d_backward_kernel, plan, Strided(grad_y[0], *grad_y.stride()[1:]),
        float32(grad_state), Strided(x, *x.stride()), float32(first.weight), float32(first.bias),
        float32(initial_state), Strided(grad_x, *grad_x.stride()), parts[0], grad_initial,
        grad_y[-1], float32(second.weight), float32(second.bias), parts[-1], first.lengths,
    )  # fmt: skip
    if initial_state is not None and grad_initial is not None:
        grad_initial = new_gradient(initial_state).copy_(grad_initial)
    return parts, grad_initial


def _plan_of(ways: Sequence[ConvArguments]) -> Plan:
    first, second = ways[0], ways[-1]
    return _plan(
        first.x.device, first.x.shape, first.weight.shape[1], first.activation is not None,
        len(ways), first.reset_every, second.reset_every, first.reverse, second.reverse,
    )  # fmt: skip


# Lengths of batches come in hundreds.
@functools.lru_cache(1024)
def _plan(
    _device: torch.device, shape: tuple[int, int, int], width: int, silu: bool, count: int,
    reset_every: int | None, second_reset_every: int | None, reverse: bool, second_reverse: bool,
) -> Plan:  # fmt: skip
    """How both kernels are launched."""
    from ops.causal_conv1d.triton_kernels import CHANNELS, FRAMES
    from ops.triton_launcher import Plan

    batch, dim, time = shape
    return Plan(
        (ceil_div(dim, CHANNELS.value), ceil_div(time, FRAMES.value), batch),
        (
            time, dim, reset_every or time, second_reset_every or time, int(reverse),
            int(second_reverse),
        ),
        # ENTRIES: a power of two that holds the width - 1 entries of a state.
        WIDTH=width, ENTRIES=1 << max(0, width - 2).bit_length(), SILU=silu, BOTH=count == 2,
    )  # fmt: skip


conv = register("mamba_asr::causal_conv1d_triton", conv_forward, conv_backward)
