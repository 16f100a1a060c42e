"""The inner part of a mixer on a GPU, as one node of autograd with few launches.

`fused` computes the same; it asks the operations for what they give anyone, and pays with a launch
for every conversion, transposition and sum. A small layer on a GPU waits for launches. Here both
ways' parameters are prepared in one launch, and their gradients added up in another; gradients of
sequences are written where they end.
"""

from __future__ import annotations

import itertools
from typing import Any

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
from ops.selective_scan.triton_launch import launch_backward_in_parts
from ops.triton_launcher import launcher

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


class _Prepared:
    """Parameters of all ways in the form in which the kernels and matrix products want them."""

    def __init__(self, A: Tensor, x_proj: Tensor, dt_proj: Tensor):
        # (ways, state, inner), (ways, rank + 2 state, inner), (ways, inner, rank)
        self.A, self.x_proj, self.dt_proj = A, x_proj, dt_proj

    @classmethod
    def of(cls, arguments: InnerArguments) -> _Prepared:
        xz_BTF, directions = arguments.xz_BTF, arguments.directions
        first, second = directions[0], directions[-1]
        count, (inner, num_states) = len(directions), first.A_log.shape
        rank = first.dt_proj.shape[1]
        cast = xz_BTF.dtype != torch.float32
        A = first.A_log.new_empty(count, num_states, inner)
        columns = rank + 2 * num_states
        if cast or count == 2:
            x_proj = xz_BTF.new_empty(count, columns, inner)
            dt_proj = xz_BTF.new_empty(count, inner, rank)
            cast = True
        else:
            x_proj, dt_proj = first.x_proj[None], first.dt_proj[None]
        grid = (ceil_div(max(num_states, columns) * inner, _BLOCK), count, 3 if cast else 1)
        launcher(prepare_parameters_kernel, grid)(
            first.A_log, second.A_log, first.x_proj, second.x_proj, first.dt_proj, second.dt_proj,
            A, x_proj, dt_proj, inner, rank, NUM_STATE=num_states, BOTH=count == 2, CAST=cast,
            BLOCK=_BLOCK,
        )  # fmt: skip
        return cls(A, x_proj, dt_proj)


def _ways(
    arguments: InnerArguments, prepared: _Prepared, projected: Tensor | None
) -> tuple[list[Way], Tensor, list[Tensor]]:
    """`arguments.prepare_ways`; ``projected`` (ways, batch * time, columns) may be known."""
    xz_BTF, directions = arguments.xz_BTF, arguments.directions
    batch, time, _ = xz_BTF.shape
    inner, num_states = directions[0].A_log.shape
    rank = directions[0].dt_proj.shape[1]
    known = projected is not None
    if projected is None:
        columns = rank + 2 * num_states
        projected = xz_BTF.new_empty(len(directions), batch * time, columns)
    ways, conv_states = [], []
    convolutions = arguments.convolutions()
    convolved = conv.conv_forward_of_ways(convolutions)
    for i, (direction, convolution) in enumerate(zip(directions, convolutions, strict=True)):
        u_BET, conv_state = convolved[i]
        rows = projected[i]
        if not known:
            u = u_BET.transpose(1, 2).view(batch * time, inner)
            torch.mm(u, prepared.x_proj[i].t(), out=rows)
        delta = torch.mm(rows[:, :rank], prepared.dt_proj[i].t())
        B = rows[:, rank : rank + num_states].view(batch, time, num_states)
        C = rows[:, rank + num_states :].view(batch, time, num_states)
        ways.append(
            Way(
                u_BET,
                delta.view(batch, time, inner).transpose(1, 2),
                prepared.A[i].t(),
                B.transpose(1, 2).unsqueeze(1),
                C.transpose(1, 2).unsqueeze(1),
                direction.D,
                direction.dt_bias,
                None if convolution.reverse else arguments.ssm_state,
                convolution.reverse,
                convolution.reset_every,
            )
        )
        conv_states.append(conv_state)
    return ways, projected, conv_states


class _MambaInner(torch.autograd.Function):
    @staticmethod
    def forward(ctx, chunk_size, save, *tensors):
        arguments = _arguments(tensors, chunk_size)
        with torch.cuda.device_of(arguments.xz_BTF):
            prepared = _Prepared.of(arguments)
            ways, projected, conv_states = _ways(arguments, prepared, None)
            y_BET, last_states, saved = scan.forward(arguments.scan(ways), save)
        if save:
            # Zeros would be made for states that nobody went on from.
            ctx.set_materialize_grads(False)
            ctx.chunk_size, ctx.num_tensors = chunk_size, len(tensors)
            kept = (prepared.A, prepared.x_proj, prepared.dt_proj, projected)
            ctx.save_for_backward(*tensors, *kept, *saved)
        return y_BET.transpose(1, 2), conv_states[0], last_states[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y_BTE, grad_conv_state, grad_ssm_state):
        # Once: recomputed tensors are handed out a single time.
        kept = ctx.saved_tensors
        arguments = _arguments(kept[: ctx.num_tensors], ctx.chunk_size)
        A, x_proj, dt_proj, projected, *states = kept[ctx.num_tensors :]
        with torch.cuda.device_of(arguments.xz_BTF):
            return _backward(
                arguments, _Prepared(A, x_proj, dt_proj), projected, states, grad_y_BTE,
                grad_conv_state, grad_ssm_state,
            )  # fmt: skip


def _arguments(tensors: Any, chunk_size: int | None) -> InnerArguments:
    xz_BTF, lengths, conv_state, ssm_state, *parameters = tensors
    directions = tuple(
        Direction(*parameters[start : start + _PARAMETERS])
        for start in range(0, len(parameters), _PARAMETERS)
    )
    return InnerArguments(xz_BTF, directions, lengths, conv_state, ssm_state, chunk_size)


def _backward(
    arguments: InnerArguments, prepared: _Prepared, projected: Tensor, states: list[Tensor],
    grad_y_BTE: Tensor | None, grad_conv_state: Tensor | None, grad_ssm_state: Tensor | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    xz_BTF, directions = arguments.xz_BTF, arguments.directions
    batch, time, _ = xz_BTF.shape
    inner, num_states = directions[0].A_log.shape
    rank, count = directions[0].dt_proj.shape[1], len(directions)
    columns, rows = rank + 2 * num_states, batch * time
    ways, _, _ = _ways(arguments, prepared, projected)
    if grad_y_BTE is None:
        grad_y_BTE = xz_BTF.new_zeros(()).expand(batch, time, inner)

    grad_xz_BTF = torch.empty_like(xz_BTF, memory_format=torch.contiguous_format)
    grad_x_BET, grad_z_BET = grad_xz_BTF.transpose(1, 2).chunk(2, dim=1)
    parts = launch_backward_in_parts(
        grad_y_BTE.transpose(1, 2), [grad_ssm_state, None][:count], states,
        ScanArguments(tuple(ways), arguments.input_and_gate()[1], True, arguments.lengths),
        grad_z_BET,
    )  # fmt: skip
    memory = parts[0].memory
    assert memory.projections is not None
    grad_projected = projected.new_empty(count, rows, columns)
    launcher(collect_projections_kernel, (ceil_div(time, _FRAMES), 2 * count, batch))(
        memory.projections, grad_projected, time, memory.projections.shape[3], columns, rank,
        NUM_STATE=num_states, STATES=next_power_of_2(num_states), FRAMES=_FRAMES,
    )  # fmt: skip

    # Both gradients of both ways in one piece, to be converted together.
    sizes = [columns * inner, inner * rank]
    grad_weights = projected.new_empty(count, sum(sizes))
    for i, (way, part) in enumerate(zip(ways, parts, strict=True)):
        grad_delta = part.delta.transpose(1, 2).view(rows, inner)
        grad_u = part.u.transpose(1, 2).view(rows, inner)
        u = way.u.transpose(1, 2).view(rows, inner)
        of_x_proj, of_dt_proj = grad_weights[i].split(sizes)
        torch.mm(grad_delta, prepared.dt_proj[i], out=grad_projected[i, :, :rank])
        torch.mm(grad_delta.t(), projected[i, :, :rank], out=of_dt_proj.view(inner, rank))
        torch.mm(grad_projected[i].t(), u, out=of_x_proj.view(columns, inner))
        grad_u.addmm_(grad_projected[i], prepared.x_proj[i])
    conv_parts, grad_conv_initial = conv.conv_backward_of_ways(
        [part.u for part in parts], grad_conv_state, arguments.convolutions(), grad_x_BET
    )

    new = prepared.A.new_empty
    width = directions[0].conv_weight.shape[1]
    grad_A_log, grad_D, grad_bias = (
        new(count, inner, num_states), new(count, inner), new(count, inner)
    )  # fmt: skip
    grad_conv_weight, grad_conv_bias = new(count, inner, width), new(count, inner)
    grid = ceil_div(inner, _CHANNELS), count, num_states + 3 + width
    launcher(collect_parameters_kernel, grid)(
        memory.parts, conv_parts, prepared.A, grad_A_log, grad_D, grad_bias, grad_conv_weight,
        grad_conv_bias, inner, memory.parts.shape[1] * memory.parts.shape[2],
        conv_parts.shape[1] * conv_parts.shape[2], NUM_STATE=num_states, WIDTH=width,
        CHANNELS=_CHANNELS, ROWS=_ROWS,
    )  # fmt: skip
    grad_weights = grad_weights.float()
    grads: list[Tensor | None] = []
    for i in range(count):
        of_x_proj, of_dt_proj = grad_weights[i].split(sizes)
        grads += [
            grad_conv_weight[i], grad_conv_bias[i], of_x_proj.view(columns, inner),
            of_dt_proj.view(inner, rank), grad_bias[i], grad_A_log[i], grad_D[i],
        ]  # fmt: skip
    return None, None, grad_xz_BTF, None, grad_conv_initial, parts[0].initial_state(), *grads
