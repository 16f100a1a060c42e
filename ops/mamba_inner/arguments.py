"""What the inner part of a mixer is given, in the form that both ways of computing it see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.causal_conv1d.arguments import ConvArguments
from ops.checks import check_shape
from ops.selective_scan.arguments import ScanArguments, Way


class Direction(NamedTuple):
    """Parameters of one direction; E inner width, W taps, R rank of the step sizes, N state.

    Attributes:
        conv_weight: (E, W).
        conv_bias: (E,) or None.
        x_proj: (R + 2N, E), from the convolved input to step sizes, B and C.
        dt_proj: (E, R).
        dt_bias: (E,), added to the step sizes before softplus.
        A_log: (E, N); the decay rates are A = -exp(A_log).
        D: (E,).
    """

    conv_weight: Tensor
    conv_bias: Tensor | None
    x_proj: Tensor
    dt_proj: Tensor
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor

    @property
    def A(self) -> Tensor:
        """Decay rates, at least in float32: in half precision neighbouring ones would coincide."""
        exact = torch.promote_types(self.A_log.dtype, torch.float32)
        return -torch.exp(self.A_log.to(exact))

    def split(self, projected: Tensor) -> tuple[Tensor, ...]:
        """Step sizes, B and C in the last axis of what ``x_proj`` gives."""
        state = self.A_log.shape[1]
        return projected.split([self.dt_proj.shape[1], state, state], dim=-1)


_AXES = "(E, W)", "(E,)", "(R + 2N, E)", "(E, R)", "(E,)", "(E, N)", "(E,)"


def check_directions(directions: Sequence[Direction]) -> tuple[int, int, int]:
    """E, N and W of the directions, which agree in them and in R.

    Raises:
        ValueError: a parameter does not have the shape that A_log, conv_weight and dt_proj of the
            first direction ask for.
    """
    first = directions[0]
    A_log, conv_weight, dt_proj = matrices = first.A_log, first.conv_weight, first.dt_proj
    if not A_log.dim() == conv_weight.dim() == dt_proj.dim() == 2 or conv_weight.shape[1] < 1:
        shapes = ", ".join(str(tuple(x.shape)) for x in matrices)
        raise ValueError(
            f"A_log, conv_weight and dt_proj have shapes {shapes}; wanted (E, N), (E, W) and "
            "(E, R), W at least 1"
        )
    (inner, state), taps, rank = A_log.shape, conv_weight.shape[1], dt_proj.shape[1]
    wanted = (
        (inner, taps), (inner,), (rank + 2 * state, inner), (inner, rank), (inner,),
        (inner, state), (inner,),
    )  # fmt: skip
    for whose, direction in zip(("", " of the backward direction"), directions, strict=False):
        for name, x, shape, axes in zip(Direction._fields, direction, wanted, _AXES, strict=True):
            # Compared here first: decoding comes by for every token.
            if x is not None and x.shape != shape:
                check_shape(name + whose, x, shape, axes)
    return inner, state, taps


class InnerArguments(NamedTuple):
    """What `dispatch.mamba_inner_fn` computes from; names as there."""

    xz_BTF: Tensor
    directions: tuple[Direction, ...]
    lengths: Tensor | None
    conv_state: Tensor | None
    ssm_state: Tensor | None
    chunk_size: int | None

    def input_and_gate(self) -> tuple[Tensor, ...]:
        """x and z, (batch, E, time) each."""
        return self.xz_BTF.transpose(1, 2).chunk(2, dim=1)

    def convolutions(self) -> list[ConvArguments]:
        """What each direction convolves."""
        x_BET, _ = self.input_and_gate()
        starts = [(False, self.conv_state, None), (True, None, self.chunk_size)]
        return [
            ConvArguments(x_BET, way.conv_weight, way.conv_bias, "silu", self.lengths, *start)
            for way, start in zip(self.directions, starts, strict=False)
        ]

    def scan(self, ways: Sequence[Way]) -> ScanArguments:
        """The scan over what `prepare_ways` gave."""
        return ScanArguments(tuple(ways), self.input_and_gate()[1], True, self.lengths)


def prepare_ways(
    arguments: InnerArguments, convolve: Callable[[ConvArguments], tuple[Tensor, Tensor]]
) -> tuple[list[Way], list[Tensor], list[Tensor]]:
    """All that comes before the scan.

    Returns:
        for each direction what it scans; step sizes, B and C of every frame, side by side; and the
        last state of its convolution.
    """
    ways, projections, conv_states = [], [], []
    for direction, convolution in zip(arguments.directions, arguments.convolutions(), strict=True):
        u_BET, conv_state = convolve(convolution)
        projected = F.linear(u_BET.transpose(1, 2), direction.x_proj.to(u_BET.dtype))
        dt, B, C = direction.split(projected)
        ways.append(
            Way(
                u_BET,
                F.linear(dt, direction.dt_proj.to(dt.dtype)).transpose(1, 2),
                direction.A,
                B.transpose(1, 2).unsqueeze(1),
                C.transpose(1, 2).unsqueeze(1),
                direction.D,
                direction.dt_bias,
                None if convolution.reverse else arguments.ssm_state,
                convolution.reverse,
                convolution.reset_every,
            )
        )
        projections.append(projected)
        conv_states.append(conv_state)
    return ways, projections, conv_states
