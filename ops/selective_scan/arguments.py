"""Checks the arguments of a scan and brings them into the one form that backends see."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ops.checks import check_float_types, check_shape, normalise_lengths, normalise_reset


class ScanArguments(NamedTuple):
    """What every backend's ``scan`` takes, in this order.

    B and C are either constant, (dim, state), or time-varying, (batch, groups, state, time).
    ``lengths`` is int64 on the device of ``u``; ``reset_every`` is None unless it cuts the input.
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    delta_softplus: bool
    lengths: Tensor | None
    reverse: bool
    initial_state: Tensor | None
    reset_every: int | None


class Way(NamedTuple):
    """What one direction of a scan has of its own; names as in `ScanArguments`.

    Two ways that share z, softplus and lengths make a bidirectional scan.
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    delta_bias: Tensor | None
    reverse: bool
    initial_state: Tensor | None
    reset_every: int | None


class WayGradients(NamedTuple):
    """Gradients of the tensors of a `Way`, None for what was absent."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    delta_bias: Tensor | None
    initial_state: Tensor | None


def normalise(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    lengths: Tensor | None,
    reverse: bool,
    initial_state: Tensor | None,
    reset_every: int | None,
) -> ScanArguments:
    """Checks shapes, types and values.

    Raises:
        ValueError: says which argument does not fit, what came and what was wanted.
    """
    if u.dim() != 3:
        raise ValueError(f"u has shape {tuple(u.shape)}; wanted (batch, dim, time)")
    if A.dim() != 2:
        raise ValueError(f"A has shape {tuple(A.shape)}; wanted (dim, state)")
    batch, dim, time = u.shape
    state = A.shape[1]
    check_float_types(
        u.device,
        u=u,
        delta=delta,
        A=A,
        B=B,
        C=C,
        D=D,
        z=z,
        delta_bias=delta_bias,
        initial_state=initial_state,
    )
    check_shape("delta", delta, (batch, dim, time), "(batch, dim, time)")
    check_shape("A", A, (dim, state), "(dim, state)")
    check_shape("D", D, (dim,), "(dim,)")
    check_shape("z", z, (batch, dim, time), "(batch, dim, time)")
    check_shape("delta_bias", delta_bias, (dim,), "(dim,)")
    check_shape("initial_state", initial_state, (batch, dim, state), "(batch, dim, state)")
    B = _normalise_projection("B", B, batch, dim, state, time)
    C = _normalise_projection("C", C, batch, dim, state, time)
    B, C = _equal_groups(B, C)
    return ScanArguments(
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        delta_bias,
        bool(delta_softplus),
        normalise_lengths(lengths, batch, time, u.device),
        bool(reverse),
        initial_state,
        normalise_reset(reset_every, time),
    )


def of_one_form(first: ScanArguments, second: ScanArguments) -> bool:
    """Whether two ways agree in what a kernel that takes both is told once."""
    return all(x.shape == y.shape for x, y in zip(first[2:5], second[2:5], strict=True))


def _normalise_projection(
    name: str, tensor: Tensor, batch: int, dim: int, state: int, time: int
) -> Tensor:
    if tensor.dim() == 2:
        check_shape(name, tensor, (dim, state), "(dim, state)")
        return tensor
    if tensor.dim() == 3:
        check_shape(name, tensor, (batch, state, time), "(batch, state, time)")
        return tensor.unsqueeze(1)
    if tensor.dim() == 4:
        groups = tensor.shape[1]
        check_shape(name, tensor, (batch, groups, state, time), "(batch, groups, state, time)")
        if groups == 0 or dim % groups:
            raise ValueError(f"{name} has {groups} groups, which do not divide dim {dim}")
        return tensor
    raise ValueError(
        f"{name} has shape {tuple(tensor.shape)}; wanted (dim, state) or "
        "(batch, [groups,] state, time)"
    )


def _equal_groups(B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """B and C with the same number of groups; a single group serves any number."""
    if B.dim() == 2 or C.dim() == 2 or B.shape[1] == C.shape[1]:
        return B, C
    groups = max(B.shape[1], C.shape[1])
    if min(B.shape[1], C.shape[1]) != 1:
        raise ValueError(
            f"B has {B.shape[1]} groups and C {C.shape[1]}; wanted the same number, or one of them "
            "with a single group"
        )
    return B.expand(-1, groups, -1, -1), C.expand(-1, groups, -1, -1)
