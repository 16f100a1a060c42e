"""The public causal convolution: arguments checked, a backend chosen, the call handed over."""

from __future__ import annotations

from torch import Tensor

from ops.backends import Backends
from ops.causal_conv1d import cpu, reference, shifted, triton
from ops.causal_conv1d.arguments import ConvArguments, normalise

BACKENDS = Backends(
    "causal_conv1d",
    modules={
        "reference": reference,
        "torch": shifted,
        "cpu": cpu,
        "triton": triton,
    },
    # The last is for what torch.func transforms.
    preference={
        "cpu": ("cpu", "torch", "reference"),
        "cuda": ("triton", "torch", "reference"),
        None: ("torch", "reference"),
    },
)


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    lengths: Tensor | None = None,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    reset_every: int | None = None,
    return_last_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise convolution over the current and the ``width - 1`` frames scanned before it.

    Memory order is free: (batch, time, dim) passed as a transposed view is read without a copy.

    Args:
        x: input (batch, dim, time), float16, bfloat16 or float32; float64 if everything is.
        weight: taps (dim, width), the last one for the current frame.
        bias: (dim,).
        activation: None or ``"silu"``, applied to the sum.
        lengths: valid frames of each item (batch,), integers. Frames at and after an item's length
            influence nothing, whatever they hold; their outputs are zero.
        reverse: scan every item from its last valid frame to its first.
        initial_state: (batch, dim, width-1), the inputs before the first frame in scan order, the
            newest last; zeros if None.
        reset_every: cut time into blocks [0, k), [k, 2k), ... across whose boundaries no tap
            reaches; an initial state enters the block that is scanned first.
        return_last_state: return (y, last state).
        backend: ``auto``, ``reference``, ``torch``, ``cpu`` or ``triton``. ``auto`` follows the
            environment variable MAMBA_ASR_SCAN, else takes the fastest that fits,
            and what torch.func transforms goes to ``reference``.

    Returns:
        y (batch, dim, time) in the dtype of ``x``; with ``return_last_state`` also the last
        width-1 valid inputs in scan order (batch, dim, width-1) in the dtype of ``x``, the newest
        last, with zeros for what lies before the start (of the last block scanned).

    Raises:
        ValueError: an argument does not fit, or the backend asked for cannot take the call.
    """
    arguments = ConvArguments(
        x, weight, bias, activation, lengths, reverse, initial_state, reset_every
    )
    y, last_state = convolve(arguments, backend)
    return (y, last_state) if return_last_state else y


def convolve(arguments: ConvArguments, backend: str) -> tuple[Tensor, Tensor]:
    """`causal_conv1d_fn` with its arguments in one, always with the last state."""
    arguments = normalise(arguments)
    x = arguments.x
    # Without a frame or an item there is nothing to be fast at, and kernels need not care.
    name = "reference" if x.numel() == 0 and backend == "auto" else backend
    return BACKENDS.choose(name, x.device, arguments).conv(arguments)
