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
from ops.causal_conv1d.triton_kernels import (
    causal_conv1d_backward_kernel,
    causal_conv1d_forward_kernel,
)
from ops.mamba_inner.arguments import Direction, InnerArguments
from ops.mamba_inner.triton_kernels import (
    collect_parameters_kernel,
    collect_projections_kernel,
    prepare_parameters_kernel,
)
from ops.native import ceil_div, float32, next_power_of_2, without_views
from ops.selective_scan import triton_launch
from ops.selective_scan.triton import TILE_FRAMES
from ops.selective_scan.triton_backward import WayGradientPointers
from ops.selective_scan.triton_launch import by_state, pair
from ops.selective_scan.triton_rows import WayPointers, pack_projections_kernel
from ops.triton_launcher import Plan, launch
from ops.triton_sequences import Sequence

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
    # All memory here is dense.
    tensors = (xz_BTF.contiguous(), lengths, conv_state, ssm_state, *itertools.chain(*directions))
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    return _MambaInner.apply(chunk_size, save, *tensors)


class _Sizes(NamedTuple):
    """All that decides over launches; R rank of the step sizes."""

    device: torch.device
    dtype: torch.dtype
    ways: int
    batch: int
    time: int
    inner: int
    rank: int
    num_states: int
    width: int
    chunk_size: int | None

    @classmethod
    def of(cls, arguments: InnerArguments) -> _Sizes:
        xz_BTF, directions = arguments.xz_BTF, arguments.directions
        first = directions[0]
        batch, time, _ = xz_BTF.shape
        inner, rank = first.dt_proj.shape
        return cls(
            xz_BTF.device, xz_BTF.dtype, len(directions), batch, time, inner, rank,
            first.A_log.shape[1], first.conv_weight.shape[1], arguments.chunk_size,
        )  # fmt: skip


class _Plans:
    """How kernels are launched for a shape, and strides (batch, channel, frame) of their memory."""

    def __init__(self, sizes: _Sizes, tuning: triton_launch.Tuning):
        device, dtype, ways, batch, time, inner, rank, states, width, chunk_size = sizes
        self.columns = columns = rank + 2 * states
        self.cast = cast = ways == 2 or dtype != torch.float32
        self.strides = time * inner, 1, inner
        self.strides_of_half = 2 * time * inner, 1, 2 * inner
        both = ways == 2
        reset_every, reverse = (None, chunk_size)[:ways], (False, True)[:ways]
        self.prepare = Plan(
            (ceil_div(max(states, columns) * inner, _BLOCK), ways, 3 if cast else 1),
            (inner, rank), NUM_STATE=states, BOTH=both, CAST=cast, BLOCK=_BLOCK,
        )  # fmt: skip
        self.conv = conv.plan(
            device, (batch, inner, time), width, True, reset_every[-1], reverse[-1], both
        )
        self.pack = triton_launch.pack_plan(
            device, batch, time, 1, states, tuple(way for way in reverse for _ in "BC"),
            (time * columns, 0, 1, columns),
        )  # fmt: skip
        self.scan = triton_launch.plans_of(
            triton_launch.Shape(
                device, batch, inner, time, states, 1, True, True, reverse, reset_every, True,
                2 * inner * time >= 2**31, False, 1 / ways,
                triton_launch.num_multiprocessors(device), tuning,
            )
        )  # fmt: skip
        self.collect_projections = Plan(
            (ceil_div(time, _FRAMES), 2 * ways, batch),
            (time, self.scan.channel_blocks, columns, rank), NUM_STATE=states,
            STATES=next_power_of_2(states), FRAMES=_FRAMES,
        )  # fmt: skip
        conv_parts = self.conv.grid[1] * batch
        self.collect_parameters = Plan(
            (ceil_div(inner, _CHANNELS), ways, states + 3 + width),
            (inner, batch * self.scan.num_pieces, conv_parts), NUM_STATE=states, WIDTH=width,
            CHANNELS=_CHANNELS, ROWS=_ROWS,
        )  # fmt: skip


# Lengths of batches come in hundreds.
_plans = functools.lru_cache(1024)(_Plans)


def _prepare(arguments: InnerArguments, plans: _Plans) -> tuple[Tensor, Tensor, Tensor]:
    """Decay rates and both projections of all ways as the kernels and products want them.

    Returns:
        A (ways, state, inner), x_proj (ways, columns, inner), dt_proj (ways, inner, rank).
    """
    xz_BTF, directions = arguments.xz_BTF, arguments.directions
    first, second = directions[0], directions[-1]
    inner, states = first.A_log.shape
    A = first.A_log.new_empty(len(directions), states, inner)
    if plans.cast:
        x_proj = xz_BTF.new_empty(len(directions), *first.x_proj.shape)
        dt_proj = xz_BTF.new_empty(len(directions), *first.dt_proj.shape)
    else:
        x_proj, dt_proj = first.x_proj[None], first.dt_proj[None]
    launch(
        prepare_parameters_kernel, plans.prepare, first.A_log, second.A_log, first.x_proj,
        second.x_proj, first.dt_proj, second.dt_proj, A, x_proj, dt_proj,
    )  # fmt: skip
    return A, x_proj, dt_proj


def _way_pointers(
    arguments: InnerArguments, plans: _Plans, A: Tensor, u: Tensor, delta: Tensor, packed: Tensor,
    ends: Tensor, states: Tensor | None, last_states: Tensor | None = None,
) -> tuple[WayPointers, WayPointers]:  # fmt: skip
    """What the scan is told of both ways; all tensors have ways in front."""
    directions = arguments.directions
    nothing = [None] * len(directions)
    projections = packed.unbind()
    return pair(
        WayPointers(
            Sequence(u, *plans.strides), Sequence(delta, *plans.strides), A, B, C, way.D,
            way.dt_bias, kept, initial_state, last_state, end,
        )
        for way, u, delta, A, B, C, kept, initial_state, last_state, end in zip(
            directions, u.unbind(), delta.unbind(), A.unbind(), projections[::2], projections[1::2],
            nothing if states is None else states.unbind(), (by_state(arguments.ssm_state), None),
            nothing if last_states is None else last_states.unbind(), ends.unbind(),
            strict=False,
        )
    )  # fmt: skip


class _MambaInner(torch.autograd.Function):
    @staticmethod
    def forward(ctx, chunk_size, save, *tensors):
        arguments = _arguments(tensors, chunk_size)
        with torch.cuda.device_of(arguments.xz_BTF):
            outputs, kept = _forward(arguments, save)
        if save:
            # Zeros would be made for states that nobody went on from.
            ctx.set_materialize_grads(False)
            ctx.chunk_size, ctx.num_tensors = chunk_size, len(tensors)
            ctx.save_for_backward(*tensors, *kept)
        return without_views(*outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        # Once: recomputed tensors are handed out a single time.
        kept = ctx.saved_tensors
        arguments = _arguments(kept[: ctx.num_tensors], ctx.chunk_size)
        with torch.cuda.device_of(arguments.xz_BTF):
            return _backward(arguments, grads, *kept[ctx.num_tensors :])


def _arguments(tensors: Any, chunk_size: int | None) -> InnerArguments:
    xz_BTF, lengths, conv_state, ssm_state, *parameters = tensors
    directions = tuple(
        Direction(*parameters[start : start + _PARAMETERS])
        for start in range(0, len(parameters), _PARAMETERS)
    )
    return InnerArguments(xz_BTF, directions, lengths, conv_state, ssm_state, chunk_size)


def _forward(
    arguments: InnerArguments, save: bool
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
    """The outputs, and what `_backward` wants to be kept."""
    xz_BTF, directions, lengths, conv_state, _, _ = arguments
    sizes = _Sizes.of(arguments)
    _, _, ways, batch, time, inner, rank, num_states, width, _ = sizes
    plans = _plans(sizes, triton_launch.TUNING)
    first, second = directions[0], directions[-1]
    A, x_proj, dt_proj = _prepare(arguments, plans)

    u, last_inputs = (
        xz_BTF.new_empty(ways, batch, time, inner), xz_BTF.new_empty(ways, batch, inner, width - 1)
    )  # fmt: skip
    of_ways, states_of_ways = u.unbind(), last_inputs.unbind()
    launch(
        causal_conv1d_forward_kernel, plans.conv, Sequence(xz_BTF, *plans.strides_of_half),
        first.conv_weight, first.conv_bias, float32(conv_state),
        Sequence(of_ways[0], *plans.strides), states_of_ways[0], second.conv_weight,
        second.conv_bias, of_ways[-1], states_of_ways[-1], lengths,
    )  # fmt: skip
    projected = torch.bmm(u.view(ways, batch * time, inner), x_proj.transpose(1, 2))
    delta = torch.bmm(projected[..., :rank], dt_proj.transpose(1, 2))
    packed = A.new_empty(2 * ways, batch, plans.scan.packed_frames, num_states)
    B, C = (projected[..., start:].unbind() for start in (rank, rank + num_states))
    launch(pack_projections_kernel, plans.pack, B[0], C[0], B[-1], C[-1], packed, lengths)

    y_BTE = xz_BTF.new_empty(batch, time, inner)
    last_states = A.new_empty(ways, batch, num_states, inner)
    states = None
    if save:
        # Of the tile that is scanned first the state is the caller's.
        kept_tiles = plans.scan.packed_frames // TILE_FRAMES - 1
        states = A.new_empty(ways, batch, kept_tiles, num_states, inner)
    triton_launch.launch_scan(
        plans.scan,
        _way_pointers(
            arguments, plans, A, u, delta, packed, A.new_empty(plans.scan.ends_shape), states,
            last_states,
        ),
        _gate(xz_BTF, plans), Sequence(y_BTE, *plans.strides), lengths,
    )  # fmt: skip
    kept = () if states is None else (A, x_proj, dt_proj, u, delta, projected, packed, states)
    return (y_BTE, states_of_ways[0], last_states[0].transpose(1, 2)), kept


def _gate(xz_BTF: Tensor, plans: _Plans) -> Sequence:
    """The second half of ``xz_BTF``, or of its gradient."""
    return Sequence(xz_BTF[..., plans.strides[2] :], *plans.strides_of_half)


def _backward(
    arguments: InnerArguments, grads: tuple[Tensor | None, ...], A: Tensor, x_proj: Tensor,
    dt_proj: Tensor, u: Tensor, delta: Tensor, projected: Tensor, packed: Tensor, states: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    xz_BTF, directions, lengths, conv_state, ssm_state, _ = arguments
    grad_y_BTE, grad_conv_state, grad_ssm_state = grads
    sizes = _Sizes.of(arguments)
    _, _, ways, batch, time, inner, rank, num_states, width, _ = sizes
    plans = _plans(sizes, triton_launch.TUNING)
    strides, rows, columns = plans.strides, batch * time, plans.columns
    new, new_float = xz_BTF.new_empty, A.new_empty
    if grad_y_BTE is None:
        grad_y_BTE = xz_BTF.new_zeros(batch, time, inner)

    grad_xz_BTF = new(xz_BTF.shape)
    grad_u, grad_delta = new(u.shape), new(delta.shape)
    parts, of_projections, ends = (
        new_float(plans.scan.parts_shape), new_float(plans.scan.projections_shape),
        new_float(plans.scan.ends_shape),
    )  # fmt: skip
    of_ways = grad_u.unbind()
    gradients = pair(
        WayGradientPointers(Sequence(of_u, *strides), Sequence(of_delta, *strides), *others)
        for of_u, of_delta, *others in zip(
            of_ways, grad_delta.unbind(), parts.unbind(), of_projections.unbind(),
            (by_state(grad_ssm_state), None), ends.unbind(),
            strict=False,
        )
    )  # fmt: skip
    triton_launch.launch_gradients(
        plans.scan, _way_pointers(arguments, plans, A, u, delta, packed, ends, states),
        gradients, _gate(xz_BTF, plans), Sequence(grad_y_BTE.contiguous(), *strides),
        _gate(grad_xz_BTF, plans), lengths,
    )  # fmt: skip
    grad_projected = new(ways, rows, columns)
    launch(collect_projections_kernel, plans.collect_projections, of_projections, grad_projected)

    # Both gradients of both ways in one piece, to be converted together.
    sizes_of_weights = [columns * inner, inner * rank]
    grad_weights = new(ways, sum(sizes_of_weights))
    of_x_proj, of_dt_proj = grad_weights.split(sizes_of_weights, 1)
    torch.bmm(grad_delta, dt_proj, out=grad_projected[..., :rank])
    torch.bmm(
        grad_delta.transpose(1, 2), projected[..., :rank], out=of_dt_proj.view(ways, inner, rank)
    )
    torch.bmm(
        grad_projected.transpose(1, 2), u.view(ways, rows, inner),
        out=of_x_proj.view(ways, columns, inner),
    )  # fmt: skip
    grad_u.view(ways, rows, inner).baddbmm_(grad_projected, x_proj)

    first, second = directions[0], directions[-1]
    conv_parts = new_float(ways, batch, plans.conv.grid[1], width + 1, inner)
    conv_parts_of_ways = conv_parts.unbind()
    grad_conv_initial = None
    if conv_state is not None:
        # Autograd converts it.
        grad_conv_initial = new_float(conv_state.shape)
    launch(
        causal_conv1d_backward_kernel, plans.conv, Sequence(of_ways[0], *strides),
        float32(grad_conv_state), Sequence(xz_BTF, *plans.strides_of_half), first.conv_weight,
        first.conv_bias, float32(conv_state), Sequence(grad_xz_BTF, *plans.strides_of_half),
        conv_parts_of_ways[0], grad_conv_initial, of_ways[-1], second.conv_weight,
        second.conv_bias, conv_parts_of_ways[-1], lengths,
    )  # fmt: skip

    grad_A_log, grad_D, grad_bias = (
        new_float(ways, inner, num_states), new_float(ways, inner), new_float(ways, inner)
    )  # fmt: skip
    grad_conv_weight, grad_conv_bias = new_float(ways, inner, width), new_float(ways, inner)
    launch(
        collect_parameters_kernel, plans.collect_parameters, parts, conv_parts, A, grad_A_log,
        grad_D, grad_bias, grad_conv_weight, grad_conv_bias,
    )  # fmt: skip
    of_x_proj, of_dt_proj = grad_weights.float().split(sizes_of_weights, 1)
    of_parameters = (
        grad_conv_weight, grad_conv_bias, of_x_proj.view(ways, columns, inner),
        of_dt_proj.view(ways, inner, rank), grad_bias, grad_A_log, grad_D,
    )  # fmt: skip
    of_directions = zip(*(grad.unbind() for grad in of_parameters), strict=True)
    return (
        None, None, grad_xz_BTF, None,
        grad_conv_initial,
        # Of the forward way, which enters with the first piece.
        None if ssm_state is None else parts[0, :, 0, -num_states:].transpose(1, 2),
        *itertools.chain(*of_directions),
    )  # fmt: skip
