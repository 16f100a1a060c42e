"""Argument checks shared by the operations; every message says what came and what was wanted."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

_FLOAT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PLAIN = (Tensor, torch.nn.Parameter)
# Found once: decoding asks for every token.
_interpreter = torch._C._functorch.peek_interpreter_stack
_num_modes, _is_tracing = torch._C._len_torch_dispatch_stack, torch._C._is_tracing


def is_on_cpu(x: Tensor) -> bool:
    """Whether a CPU will compute with ``x``, and the host may look at it."""
    return x.device.type == "cpu"


def is_transformed() -> bool:
    """Whether torch.func or forward-mode AD transforms this call; they know torch's operations."""
    return not torch.compiler.is_compiling() and _is_transformed()


def _is_transformed() -> bool:
    return forward_ad._current_level >= 0 or _interpreter() is not None


def is_observed(x: Tensor) -> bool:
    """Whether torch has to see what is done with ``x``, so that nothing may look into its memory.

    A compiler, a trace, a mode and a transformation ask for that, and a tensor of a special kind.
    """
    return (
        torch.compiler.is_compiling()
        or type(x) not in _PLAIN
        or _num_modes() > 0
        or _is_tracing()
        or _is_transformed()
    )


def check_float_types(device: torch.device, **tensors: Tensor | None) -> None:
    """All tensors real floating point on ``device``; float64 for all of them or for none."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for name, tensor in given.items():
        if tensor.dtype not in _FLOAT_TYPES:
            raise ValueError(
                f"{name} has dtype {tensor.dtype}; wanted float16, bfloat16, float32 or float64 "
                "(complex A is not supported)"
            )
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the input is on {device}; move one")
    wide = [name for name, tensor in given.items() if tensor.dtype == torch.float64]
    if wide and len(wide) < len(given):
        narrow = [name for name in given if name not in wide]
        raise ValueError(
            f"{', '.join(wide)} in float64 but {', '.join(narrow)} not; float64 is computed in "
            "float64 only when every tensor is: convert the others"
        )


def check_shape(name: str, tensor: Tensor | None, wanted: tuple[int, ...], axes: str) -> None:
    """``tensor`` (None passes) has exactly the shape ``wanted``, whose axes are called ``axes``."""
    if tensor is not None and tuple(tensor.shape) != wanted:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; wanted {axes} = {wanted}")


def normalise_lengths(
    lengths: Tensor | None, batch: int, time: int, device, clamp: bool = True
) -> Tensor | None:
    """``lengths`` as contiguous int64 (batch,) on ``device``.

    Values are checked on the CPU. They are clamped to 0 .. time instead on an accelerator, where a
    look at them would stall the queue, and where torch has to see what is done with them.

    Args:
        clamp: False leaves that to kernels that do it.

    Raises:
        ValueError: wrong shape, not integers, or a value outside 0 .. time.
    """
    if lengths is None:
        return None
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise ValueError(
            f"lengths has dtype {lengths.dtype}; wanted integers, the number of valid frames of "
            "each item (relative lengths: multiply by the number of frames and round)"
        )
    check_shape("lengths", lengths, (batch,), "(batch,)")
    if is_on_cpu(lengths) and not is_observed(lengths):
        if batch and not (int(lengths.min()) >= 0 and int(lengths.max()) <= time):
            raise ValueError(
                f"lengths run from {int(lengths.min())} to {int(lengths.max())}; "
                f"wanted values between 0 and the {time} frames of the input"
            )
    elif clamp:
        lengths = lengths.clamp(0, time)
    return lengths.to(device=device, dtype=torch.int64).contiguous()


def normalise_reset(reset_every: int | None, time: int) -> int | None:
    """``reset_every``, or None where a single block covers the input.

    Raises:
        ValueError: not a positive integer.
    """
    if reset_every is None:
        return None
    if isinstance(reset_every, bool) or not isinstance(reset_every, int) or reset_every < 1:
        raise ValueError(f"reset_every is {reset_every!r}; wanted a positive number of frames")
    # While a graph is made the length may be free: to compare it would tie the graph to one side.
    return reset_every if torch.compiler.is_compiling() or reset_every < time else None
