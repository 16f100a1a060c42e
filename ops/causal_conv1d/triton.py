"""The backend called ``triton``: the convolution on a GPU without a CUDA toolchain.

Triton is imported at the first call. With TRITON_INTERPRET=1 in the environment before that, the
kernels run on the CPU, slowly: this is how they are tested without a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ops.causal_conv1d.arguments import ConvArguments
from ops.causal_conv1d.operator import new_gradient, register
from ops.native import empty_like, float32
from ops.selective_scan.triton import MAX_GRID, interpreted, unavailable

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
    from ops.triton_sequences import Sequence

    x, weight, bias, activation, lengths, reverse, initial_state, reset_every = arguments
    y = empty_like(x)
    state = x.new_empty(x.shape[0], x.shape[1], weight.shape[1] - 1)
    with torch.cuda.device_of(x):
        causal_conv1d_forward_kernel[_grid(x)](
            Sequence(x, *x.stride()), float32(weight), float32(bias), float32(initial_state),
            Sequence(y, *y.stride()), state, lengths, x.shape[2], x.shape[1],
            reset_every or x.shape[2], **_constants(weight, activation, reverse),
        )  # fmt: skip
    return y, state


def conv_backward(
    grad_y: Tensor,
    grad_state: Tensor | None,
    arguments: ConvArguments,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, weight, bias and initial_state; None where absent."""
    _, weight, bias, *_ = arguments
    grad_x = empty_like(arguments.x)
    parts = new_gradient_parts(arguments, 1)[0]
    grad_initial = conv_backward_in_parts(grad_y, grad_state, arguments, grad_x, False, parts)
    width = weight.shape[1]
    # Added up apart: outputs of an operator must not share memory.
    return (
        grad_x,
        parts[:, :, :width].sum((0, 1)).t().to(weight.dtype, memory_format=torch.contiguous_format),
        None if bias is None else parts[:, :, width].sum((0, 1)).to(bias.dtype),
        grad_initial,
    )


def new_gradient_parts(arguments: ConvArguments, count: int) -> Tensor:
    """Memory (count, batch, blocks of frames, width + 1, dim) for the gradients of parameters."""
    x, width = arguments.x, arguments.weight.shape[1]
    _, blocks, batch = _grid(x)
    return x.new_empty(count, batch, blocks, width + 1, x.shape[1], dtype=torch.float32)


def conv_backward_in_parts(
    grad_y: Tensor,
    grad_state: Tensor | None,
    arguments: ConvArguments,
    grad_x: Tensor,
    add: bool,
    parts: Tensor,
) -> Tensor | None:
    """`conv_backward` into given memory.

    Args:
        grad_x: where the gradient of x goes; on top of what is there, if ``add``.
        parts: of `new_gradient_parts`; the sums over the first two axes are left to do.

    Returns:
        the gradient of the initial state, None if there is none.
    """
    from ops.causal_conv1d.triton_kernels import causal_conv1d_backward_kernel
    from ops.triton_sequences import Sequence

    x, weight, bias, activation, lengths, reverse, initial_state, reset_every = arguments
    grad_initial = None
    if initial_state is not None:
        grad_initial = x.new_empty(initial_state.shape, dtype=torch.float32)
    with torch.cuda.device_of(x):
        causal_conv1d_backward_kernel[_grid(x)](
            Sequence(grad_y, *grad_y.stride()), float32(grad_state), Sequence(x, *x.stride()),
            float32(weight), float32(bias), float32(initial_state),
            Sequence(grad_x, *grad_x.stride()), parts, grad_initial, lengths, x.shape[2],
            x.shape[1], reset_every or x.shape[2], **_constants(weight, activation, reverse),
            ADD=add,
        )  # fmt: skip
    if initial_state is not None and grad_initial is not None:
        grad_initial = new_gradient(initial_state).copy_(grad_initial)
    return grad_initial


def _grid(x: Tensor) -> tuple[int, int, int]:
    from ops.causal_conv1d.triton_kernels import CHANNELS, FRAMES

    batch, dim, time = x.shape
    return -(-dim // CHANNELS.value), -(-time // FRAMES.value), batch


def _constants(weight: Tensor, activation: str | None, reverse: bool) -> dict:
    width = weight.shape[1]
    # A power of two that holds the width - 1 entries of a state.
    entries = 1 << max(0, width - 2).bit_length()
    return {
        "WIDTH": width, "ENTRIES": entries, "REVERSE": reverse, "SILU": activation is not None
    }  # fmt: skip


conv = register("mamba_asr::causal_conv1d_triton", conv_forward, conv_backward)
