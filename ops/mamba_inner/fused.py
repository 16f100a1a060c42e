"""The inner part of a mixer as one autograd node that keeps little.

Only the input and the scan's own checkpoints are kept: the convolution and the narrow projections
are cheap to compute again.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ops.mamba_inner.arguments import Direction, InnerArguments, prepare_ways
from ops.native import without_views

_PARAMETERS = len(Direction._fields)


def mamba_inner(
    arguments: InnerArguments, scan: ModuleType, conv: ModuleType
) -> tuple[Tensor, Tensor, Tensor]:
    """`dispatch.mamba_inner_fn`, with the modules that scan and convolve; differentiable once."""
    xz_BTF, directions, lengths, conv_state, ssm_state, chunk_size = arguments
    tensors = (xz_BTF, lengths, conv_state, ssm_state, *itertools.chain(*directions))
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    return _MambaInner.apply(scan, conv, chunk_size, save, *tensors)


class _MambaInner(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scan, conv, chunk_size, save, *tensors):
        arguments = _arguments(tensors, chunk_size)
        ways, _, conv_states = prepare_ways(arguments, conv.conv_forward)
        y_BET, last_states, saved = scan.forward(arguments.scan(ways), save)
        if save:
            ctx.modules, ctx.chunk_size = (scan, conv), chunk_size
            ctx.num_tensors = len(tensors)
            ctx.save_for_backward(*tensors, *saved)
        return without_views(y_BET.transpose(1, 2), conv_states[0], last_states[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y_BTE, grad_conv_state, grad_ssm_state):
        scan, conv = ctx.modules
        # Once: recomputed tensors are handed out a single time.
        kept = ctx.saved_tensors
        tensors, saved = kept[: ctx.num_tensors], kept[ctx.num_tensors :]
        arguments = _arguments(tensors, ctx.chunk_size)
        xz_BTF = arguments.xz_BTF
        ways, projections, _ = prepare_ways(arguments, conv.conv_forward)
        no_state = [None] * (len(ways) - 1)
        scan_grads, grad_z_BET = scan.backward(
            grad_y_BTE.transpose(1, 2), [grad_ssm_state, *no_state], saved, arguments.scan(ways)
        )

        grad_xz_BTF = torch.empty_like(xz_BTF, memory_format=torch.contiguous_format)
        grad_x_BET, grad_z_target = grad_xz_BTF.transpose(1, 2).chunk(2, dim=1)
        grad_z_target.copy_(grad_z_BET)
        grad_states, grad_parameters = [], []
        for index, (direction, convolution, projected, way, grads) in enumerate(
            zip(
                arguments.directions, arguments.convolutions(), projections, ways, scan_grads,
                strict=True,
            )
        ):  # fmt: skip
            grad_u_BET, projection_grads = _projection_backward(direction, projected, way, grads)
            grad_x, grad_weight, grad_bias, grad_initial = conv.conv_backward(
                grad_u_BET, grad_conv_state if index == 0 else None, convolution
            )
            if index == 0:
                grad_x_BET.copy_(grad_x)
            else:
                grad_x_BET += grad_x
            grad_states.append(grad_initial)
            grad_parameters += [
                grad_weight, grad_bias, *projection_grads, grads.delta_bias,
                (grads.A * way.A).to(direction.A_log.dtype), grads.D,
            ]  # fmt: skip
        grad_states = [grad_states[0], scan_grads[0].initial_state]
        return None, None, None, None, grad_xz_BTF, None, *grad_states, *grad_parameters


def _arguments(tensors: Sequence[Any], chunk_size: int | None) -> InnerArguments:
    xz_BTF, lengths, conv_state, ssm_state, *parameters = tensors
    directions = tuple(
        Direction(*parameters[start : start + _PARAMETERS])
        for start in range(0, len(parameters), _PARAMETERS)
    )
    return InnerArguments(xz_BTF, directions, lengths, conv_state, ssm_state, chunk_size)


def _projection_backward(direction, projected, way, grads):
    """The gradient of u, completed by its way through ``x_proj``; gradients of both projections."""
    batch, inner, time = way.u.shape
    dt, *_ = direction.split(projected)
    grad_projected = torch.empty_like(projected)
    grad_dt, grad_B, grad_C = direction.split(grad_projected)
    grad_delta = grads.delta.transpose(1, 2).reshape(batch * time, inner)
    grad_dt.copy_((grad_delta @ direction.dt_proj.to(grad_delta.dtype)).view_as(grad_dt))
    grad_B.copy_(grads.B.squeeze(1).transpose(1, 2))
    grad_C.copy_(grads.C.squeeze(1).transpose(1, 2))

    rows = grad_projected.view(batch * time, -1)
    grad_u = grads.u.transpose(1, 2).reshape(batch * time, inner)
    u = way.u.transpose(1, 2).reshape(batch * time, inner)
    grad_u.addmm_(rows, direction.x_proj.to(rows.dtype))
    grad_x_proj = (rows.t() @ u).to(direction.x_proj.dtype)
    grad_dt_proj = (grad_delta.t() @ dt.reshape(batch * time, -1)).to(direction.dt_proj.dtype)
    return grad_u.view(batch, time, inner).transpose(1, 2), (grad_x_proj, grad_dt_proj)
