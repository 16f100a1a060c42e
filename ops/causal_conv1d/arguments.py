"""Checks the arguments of a convolution and brings them into the one form that backends see."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ops.checks import check_float_types, check_shape, normalise_lengths, normalise_reset


class ConvArguments(NamedTuple):
    """What every backend's ``conv`` takes; names as in `dispatch.causal_conv1d_fn`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    activation: str | None
    lengths: Tensor | None
    reverse: bool
    initial_state: Tensor | None
    reset_every: int | None


def normalise(arguments: ConvArguments) -> ConvArguments:
    """Checks shapes, types and values.

    Returns:
        the same, with ``lengths`` in int64 on the device of x, and ``reset_every`` None unless it
        cuts the input.

    Raises:
        ValueError: says which argument does not fit, what came and what was wanted.
    """
    x, weight, bias, activation, lengths, reverse, initial_state, reset_every = arguments
    if x.dim() != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}; wanted (batch, dim, time)")
    batch, dim, time = x.shape
    if weight.dim() != 2 or weight.shape[0] != dim or weight.shape[1] < 1:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; wanted (dim, width) with dim = {dim} "
            "(a Conv1d's weight: drop its middle axis)"
        )
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"activation is {activation!r}; wanted None or 'silu'")
    check_float_types(x.device, x=x, weight=weight, bias=bias, initial_state=initial_state)
    check_shape("bias", bias, (dim,), "(dim,)")
    check_shape(
        "initial_state", initial_state, (batch, dim, weight.shape[1] - 1), "(batch, dim, width-1)"
    )
    return ConvArguments(
        x,
        weight,
        bias,
        None if activation is None else "silu",
        normalise_lengths(lengths, batch, time, x.device),
        bool(reverse),
        initial_state,
        normalise_reset(reset_every, time),
    )
