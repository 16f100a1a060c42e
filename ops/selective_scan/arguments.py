"""Checks the arguments of a scan and brings them into the one form that backends see."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ops.checks import check_float_types, check_shape, normalise_lengths, normalise_reset


class Way(NamedTuple):
    """What one direction of a scan has of its own; names as in `dispatch.selective_scan_fn`."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    delta_bias: Tensor | None = None
    initial_state: Tensor | None = None
    reverse: bool = False
    reset_every: int | None = None


class WayGradients(NamedTuple):
    """Gradients of the tensors of a `Way`, in its order, None for what was absent."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    delta_bias: Tensor | None
    initial_state: Tensor | None


class ScanArguments(NamedTuple):
    """One way, or two whose outputs are averaged, and what they share."""

    ways: tuple[Way, ...]
    z: Tensor | None
    softplus: bool
    lengths: Tensor | None


def normalise(arguments: ScanArguments) -> ScanArguments:
    """Checks shapes, types and values.

    Returns:
        the same, with B and C either constant, (dim, state), or time-varying, (batch, groups,
        state, time), ``lengths`` in int64 on the device of u, and ``reset_every`` None unless it
        cuts the input.

    Raises:
        ValueError: says which argument does not fit, what came and what was wanted.
    """
    ways, z, softplus, lengths = arguments
    u = ways[0].u
    if u.dim() != 3:
        raise ValueError(f"u has shape {tuple(u.shape)}; wanted (batch, dim, time)")
    batch, dim, time = u.shape
    for way in ways[1:]:
        check_shape("u_b", way.u, (batch, dim, time), "that of u_f")
        check_float_types(u.device, u_f=u, u_b=way.u)
    return ScanArguments(
        tuple(_normalise_way(way, z) for way in ways),
        z,
        bool(softplus),
        normalise_lengths(lengths, batch, time, u.device),
    )


def of_one_form(ways: tuple[Way, ...]) -> bool:
    """Whether ways agree in what a kernel that takes both is told once."""
    return all(x.shape == y.shape for x, y in zip(ways[0][2:5], ways[-1][2:5], strict=True))


def _normalise_way(way: Way, z: Tensor | None) -> Way:
    u, delta, A, B, C, D, delta_bias, initial_state, reverse, reset_every = way
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
    return way._replace(
        B=B, C=C, reverse=bool(reverse), reset_every=normalise_reset(reset_every, time)
    )


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
