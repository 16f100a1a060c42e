"""The inner part of a mixer on a GPU, as one node of autograd with few launches.

`fused` computes the same; it asks the operations for what they give anyone, and pays with a launch
for every conversion, transposition and sum. A small layer on a GPU waits for launches. Here both
ways go together: their parameters are prepared in one launch, their products are batched, their
gradients added up in one; gradients of sequences are written where they end. What the scan reads is
kept for the backward.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ops.causal_conv1d import triton as conv
from ops.mamba_inner.arguments import Direction, InnerArguments
from ops.mamba_inner.triton_kernels import (
    collect_parameters_kernel,
    collect_projections_kernel,
    prepare_parameters_kernel,
)
from ops.native import ceil_div, next_power_of_2
from ops.selective_scan import triton as scan
from ops.selective_scan.arguments import ScanArguments, Way
from ops.selective_scan.triton_launch import launch_backward_in_parts, launch_forward
from ops.triton_launcher import Plan, launch

_PARAMETERS = len(Direction._fields)
_BLOCK = 1024
_FRAMES = 32
_CHANNELS = 32
_ROWS = 32


def fits(arguments: InnerArguments) -> bool:
    """Whether the parameters are as trained networks have them: float32, with a bias."""
    return all(
        x is not None and x.dtype == torch.float32 and x.is_contiguous()
        for direction in arguments.directions
        for x in direction
    )


def mamba_inner(arguments: InnerArguments) -> tuple[Tensor, Tensor, Tensor]:
    """`dispatch.mamba_inner_fn` by the Triton kernels; differentiable once."""
    xz_BTF, directions, lengths, conv_state, ssm_state, chunk_size = arguments
    tensors = (xz_BTF, lengths, conv_state, ssm_state, *itertools.chain(*directions))
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    return _MambaInner.apply(chunk_size, save, *tensors)


class _Sizes(NamedTuple):
    """All that decides over grids; R rank of the step sizes."""

    device: torch.device
    ways: int
    batch: int
    time: int
    inner: int
    rank: int
    num_states: int
    width: int
    cast: bool

    @property
    def columns(self) -> int:
        """Step sizes, B and C of a frame."""
        return self.rank + 2 * self.num_states

    @classmethod
    def of(cls, arguments: InnerArguments) -> _Sizes:
        xz_BTF, directions = arguments.xz_BTF, arguments.directions
        first, count = directions[0], len(directions)
        batch, time, _ = xz_BTF.shape
        inner, num_states = first.A_log.shape
        return cls(
            xz_BTF.device, count, batch, time, inner, first.dt_proj.shape[1], num_states,
            first.conv_weight.shape[1], count == 2 or xz_BTF.dtype != torch.float32,
        )  # fmt: skip


class _Plans:
    """How the kernels around the scan and the convolution are launched."""

    def __init__(self, sizes: _Sizes):
        _, count, batch, time, inner, rank, num_states, width, cast = sizes
        columns = sizes.columns
        self.prepare = Plan(
            (ceil_div(max(num_states, columns) * inner, _BLOCK), count, 3 if cast else 1),
            (inner, rank), NUM_STATE=num_states, BOTH=count == 2, CAST=cast, BLOCK=_BLOCK,
        )  # fmt: skip
        self.collect_projections = Plan(
            (ceil_div(time, _FRAMES), 2 * count, batch), NUM_STATE=num_states,
            STATES=next_power_of_2(num_states), FRAMES=_FRAMES,
        )  # fmt: skip
        self.collect_parameters = Plan(
            (ceil_div(inner, _CHANNELS), count, num_states + 3 + width), NUM_STATE=num_states,
            WIDTH=width, CHANNELS=_CHANNELS, ROWS=_ROWS,
        )  # fmt: skip


# Lengths of batches come in hundreds.
_plans = functools.lru_cache(1024)(_Plans)


def _prepare(arguments: InnerArguments, sizes: _Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """Decay rates and both projections of all ways as the kernels and products want them.

    Returns:
        A (ways, state, inner), x_proj (ways, columns, inner), dt_proj (ways, inner, rank).
    """
    xz_BTF, directions = arguments.xz_BTF, arguments.directions
    first, second = directions[0], directions[-1]
    A = first.A_log.new_empty(sizes.ways, sizes.num_states, sizes.inner)
    if sizes.cast:
        x_proj = xz_BTF.new_empty(sizes.ways, sizes.columns, sizes.inner)
        dt_proj = xz_BTF.new_empty(sizes.ways, sizes.inner, sizes.rank)
    else:
        x_proj, dt_proj = first.x_proj[None], first.dt_proj[None]
    launch(
        prepare_parameters_kernel, _plans(sizes).prepare, first.A_log, second.A_log, first.x_proj,
        second.x_proj, first.dt_proj, second.dt_proj, A, x_proj, dt_proj,
    )  # fmt: skip
    return A, x_proj, dt_proj


def _scan_arguments(
    arguments: InnerArguments, sizes: _Sizes, u: Tensor, delta: Tensor, A: Tensor, projected: Tensor
) -> ScanArguments:
    """What the scan is given of ``u`` (ways, batch, inner, time) and (ways, rows, ...) tensors."""
    _, ways, batch, time, inner, rank, num_states, *_ = sizes
    delta = delta.view(ways, batch, time, inner).transpose(2, 3)
    by_frame = projected.view(ways, batch, 1, time, -1).transpose(3, 4)
    _, B, C = by_frame.split([rank, num_states, num_states], 3)
    of_ways = [part.unbind() for part in (u, delta, A.transpose(1, 2), B, C)]
    starts = [(arguments.ssm_state, False, None), (None, True, arguments.chunk_size)]
    return arguments.scan(
        [
            Way(u, delta, A, B, C, direction.D, direction.dt_bias, *start)
            for u, delta, A, B, C, direction, start in zip(
                *of_ways, arguments.directions, starts, strict=False
            )
        ]
    )


class _MambaInner(torch.autograd.Function):
    @staticmethod
    def forward(ctx, chunk_size, save, *tensors):
        arguments = _arguments(tensors, chunk_size)
        sizes = _Sizes.of(arguments)
        rows = sizes.batch * sizes.time
        with torch.cuda.device_of(arguments.xz_BTF):
            A, x_proj, dt_proj = _prepare(arguments, sizes)
            u, conv_states = conv.conv_forward_of_ways(arguments.convolutions())
            u_rows = u.transpose(2, 3).view(sizes.ways, rows, sizes.inner)
            projected = torch.bmm(u_rows, x_proj.transpose(1, 2))
            delta = torch.bmm(projected[..., : sizes.rank], dt_proj.transpose(1, 2))
            scanned = _scan_arguments(arguments, sizes, u, delta, A, projected)
            y_BET, last_states, states = scan.new_outputs(scanned, save)
            packed = launch_forward(scanned, y_BET, last_states, states if save else None)
        if save:
            # Zeros would be made for states that nobody went on from.
            ctx.set_materialize_grads(False)
            ctx.chunk_size, ctx.num_tensors = chunk_size, len(tensors)
            kept = (A, x_proj, dt_proj, u, delta, projected)
            ctx.save_for_backward(*tensors, *kept, *states, *itertools.chain(*packed))
        return y_BET.transpose(1, 2), conv_states[0], last_states[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y_BTE, grad_conv_state, grad_ssm_state):
        # Once: recomputed tensors are handed out a single time.
        kept = ctx.saved_tensors
        arguments = _arguments(kept[: ctx.num_tensors], ctx.chunk_size)
        with torch.cuda.device_of(arguments.xz_BTF):
            return _backward(
                arguments,
                *kept[ctx.num_tensors :],
                grads=(grad_y_BTE, grad_conv_state, grad_ssm_state),
            )


def _arguments(tensors: Any, chunk_size: int | None) -> InnerArguments:
    xz_BTF, lengths, conv_state, ssm_state, *parameters = tensors
    directions = tuple(
        Direction(*parameters[start : start + _PARAMETERS])
        for start in range(0, len(parameters), _PARAMETERS)
    )
    return InnerArguments(xz_BTF, directions, lengths, conv_state, ssm_state, chunk_size)


def _backward(
    arguments: InnerArguments, A: Tensor, x_proj: Tensor, dt_proj: Tensor, u: Tensor,
    delta: Tensor, projected: Tensor, *states_and_packed: Tensor, grads: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    sizes = _Sizes.of(arguments)
    _, count, batch, time, inner, rank, num_states, width, _ = sizes
    columns, rows, plans = sizes.columns, batch * time, _plans(sizes)
    xz_BTF, (grad_y_BTE, grad_conv_state, grad_ssm_state) = arguments.xz_BTF, grads
    if grad_y_BTE is None:
        grad_y_BTE = xz_BTF.new_zeros(()).expand(batch, time, inner)

    grad_xz_BTF = torch.empty_like(xz_BTF, memory_format=torch.contiguous_format)
    grad_x_BET, grad_z_BET = grad_xz_BTF.transpose(1, 2).chunk(2, dim=1)
    states, packed = list(states_and_packed[:count]), states_and_packed[count:]
    (parts,) = launch_backward_in_parts(
        grad_y_BTE.transpose(1, 2), [grad_ssm_state, None], states,
        _scan_arguments(arguments, sizes, u, delta, A, projected), grad_z_BET,
        list(zip(packed[::2], packed[1::2], strict=True)),
    )  # fmt: skip
    assert parts.projections is not None
    grad_projected = projected.new_empty(count, rows, columns)
    launch(
        collect_projections_kernel, plans.collect_projections, parts.projections, grad_projected,
        time, parts.projections.shape[3], columns, rank,
    )  # fmt: skip

    # Both gradients of both ways in one piece, to be converted together.
    sizes_of_weights = [columns * inner, inner * rank]
    grad_weights = projected.new_empty(count, sum(sizes_of_weights))
    of_x_proj, of_dt_proj = grad_weights.split(sizes_of_weights, 1)
    grad_delta = parts.delta.transpose(2, 3).view(count, rows, inner)
    grad_u = parts.u.transpose(2, 3).view(count, rows, inner)
    u_rows = u.transpose(2, 3).view(count, rows, inner)
    torch.bmm(grad_delta, dt_proj, out=grad_projected[..., :rank])
    torch.bmm(
        grad_delta.transpose(1, 2), projected[..., :rank], out=of_dt_proj.view(count, inner, rank)
    )
    torch.bmm(grad_projected.transpose(1, 2), u_rows, out=of_x_proj.view(count, columns, inner))
    grad_u.baddbmm_(grad_projected, x_proj)
    conv_parts, grad_conv_initial = conv.conv_backward_of_ways(
        parts.u, grad_conv_state, arguments.convolutions(), grad_x_BET
    )

    new = A.new_empty
    grad_A_log, grad_D, grad_bias = (
        new(count, inner, num_states), new(count, inner), new(count, inner)
    )  # fmt: skip
    grad_conv_weight, grad_conv_bias = new(count, inner, width), new(count, inner)
    launch(
        collect_parameters_kernel, plans.collect_parameters, parts.parts, conv_parts, A, grad_A_log,
        grad_D, grad_bias, grad_conv_weight, grad_conv_bias, inner,
        parts.parts.shape[1] * parts.parts.shape[2], conv_parts.shape[1] * conv_parts.shape[2],
    )  # fmt: skip
    of_x_proj, of_dt_proj = grad_weights.float().split(sizes_of_weights, 1)
    of_parameters = (
        grad_conv_weight, grad_conv_bias, of_x_proj.view(count, columns, inner),
        of_dt_proj.view(count, inner, rank), grad_bias, grad_A_log, grad_D,
    )  # fmt: skip
    of_ways = zip(*(grad.unbind() for grad in of_parameters), strict=True)
    return (
        None, None, grad_xz_BTF, None, grad_conv_initial, parts.initial_state(0),
        *itertools.chain(*of_ways),
    )  # fmt: skip
