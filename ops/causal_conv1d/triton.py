"""The backend called ``triton``: the convolution on a GPU without a CUDA toolchain.

Triton is imported at the first call. With TRITON_INTERPRET=1 in the environment before that, the
kernels run on the CPU, slowly: this is how they are tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    return conv_forward_of_ways([arguments])[0]


def conv_forward_of_ways(ways: Sequence[ConvArguments]) -> list[tuple[Tensor, Tensor]]:
    """Output and last state of one or two ways over the same input, in one launch.

    Only the first may have an initial state; taps, activation and lengths are alike.
    """
    from ops.causal_conv1d.triton_kernels import causal_conv1d_forward_kernel
    from ops.triton_launcher import launcher
    from ops.triton_sequences import Sequence as Strided

    first, second = ways[0], ways[-1]
    x, weight, bias = first.x, first.weight, first.bias
    outputs = [
        (empty_like(x), x.new_empty(x.shape[0], x.shape[1], weight.shape[1] - 1)) for _ in ways
    ]
    (y, state), (second_y, second_state) = outputs[0], outputs[-1]
    with torch.cuda.device_of(x):
        launcher(causal_conv1d_forward_kernel, _grid(x))(
            Strided(x, *x.stride()), float32(weight), float32(bias), float32(first.initial_state),
            Strided(y, *y.stride()), state, float32(second.weight), float32(second.bias), second_y,
            second_state, first.lengths, *_sizes(first, second), **_constants(ways),
        )  # fmt: skip
    return outputs


def conv_backward(
    grad_y: Tensor,
    grad_state: Tensor | None,
    arguments: ConvArguments,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, weight, bias and initial_state; None where absent."""
    weight, bias = arguments.weight, arguments.bias
    grad_x = empty_like(arguments.x)
    parts, grad_initial = conv_backward_of_ways([grad_y], grad_state, [arguments], grad_x)
    width = weight.shape[1]
    sums = parts[0].sum((0, 1))
    return (
        grad_x,
        sums[:width].t().to(weight.dtype),
        None if bias is None else sums[width].to(bias.dtype),
        grad_initial,
    )


def conv_backward_of_ways(
    grads_y: Sequence[Tensor],
    grad_state: Tensor | None,
    ways: Sequence[ConvArguments],
    grad_x: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `conv_forward_of_ways`, that of x into given memory.

    Args:
        grads_y: of each way's output, with the same strides.
        grad_state: of the first way's last state.

    Returns:
        parts of the gradients of taps and bias, (ways, batch, blocks of frames, width + 1, dim),
        and the gradient of the initial state, None if there is none.
    """
    from ops.causal_conv1d.triton_kernels import causal_conv1d_backward_kernel
    from ops.triton_launcher import launcher
    from ops.triton_sequences import Sequence as Strided

    first, second = ways[0], ways[-1]
    x, initial_state = first.x, first.initial_state
    _, blocks, batch = _grid(x)
    width = first.weight.shape[1]
    parts = x.new_empty(len(ways), batch, blocks, width + 1, x.shape[1], dtype=torch.float32)
    grad_initial = None
    if initial_state is not None:
        grad_initial = x.new_empty(initial_state.shape, dtype=torch.float32)
    with torch.cuda.device_of(x):
        launcher(causal_conv1d_backward_kernel, _grid(x))(
            Strided(grads_y[0], *grads_y[0].stride()), float32(grad_state),
            Strided(x, *x.stride()), float32(first.weight), float32(first.bias),
            float32(initial_state), Strided(grad_x, *grad_x.stride()), parts[0], grad_initial,
            grads_y[-1], float32(second.weight), float32(second.bias), parts[-1], first.lengths,
            *_sizes(first, second), **_constants(ways),
        )  # fmt: skip
    if initial_state is not None and grad_initial is not None:
        grad_initial = new_gradient(initial_state).copy_(grad_initial)
    return parts, grad_initial


def _sizes(first: ConvArguments, second: ConvArguments) -> tuple[int, ...]:
    """The arguments of a kernel from ``time`` to ``second_reverse``."""
    _, dim, time = first.x.shape
    return (
        time,
        dim,
        first.reset_every or time,
        second.reset_every or time,
        int(first.reverse),
        int(second.reverse),
    )


def _grid(x: Tensor) -> tuple[int, int, int]:
    from ops.causal_conv1d.triton_kernels import CHANNELS, FRAMES

    batch, dim, time = x.shape
    return -(-dim // CHANNELS.value), -(-time // FRAMES.value), batch


def _constants(ways: Sequence[ConvArguments]) -> dict:
    width = ways[0].weight.shape[1]
    # A power of two that holds the width - 1 entries of a state.
    entries = 1 << max(0, width - 2).bit_length()
    silu = ways[0].activation is not None
    return {"WIDTH": width, "ENTRIES": entries, "SILU": silu, "BOTH": len(ways) == 2}


conv = register("mamba_asr::causal_conv1d_triton", conv_forward, conv_backward)
