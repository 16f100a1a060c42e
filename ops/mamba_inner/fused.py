"""The inner part of a mixer as one autograd node that keeps little.

Only the input and the scan's own checkpoints are kept: the convolution and the narrow projections
are cheap to compute again.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ops.mamba_inner.arguments import Direction
from ops.selective_scan.arguments import Way

_PARAMETERS = len(Direction._fields)


def mamba_inner(
    xz_BTF: Tensor,
    forward: Direction,
    backward: Direction | None,
    lengths: Tensor | None,
    conv_state: Tensor | None,
    ssm_state: Tensor | None,
    chunk_size: int | None,
    modules: tuple[ModuleType, ModuleType],
) -> tuple[Tensor, Tensor, Tensor]:
    """`dispatch.mamba_inner_fn`, with the modules that scan and convolve; differentiable once."""
    parameters = (*forward, *(backward or ()))
    tensors = (xz_BTF, conv_state, ssm_state, *parameters)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    return _MambaInner.apply(
        xz_BTF, lengths, conv_state, ssm_state, chunk_size, modules, save, *parameters
    )


class _MambaInner(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, xz_BTF, lengths, conv_state, ssm_state, chunk_size, modules, save, *parameters
    ):
        scan, conv = modules
        directions = _directions(parameters)
        x_BET, z_BET = xz_BTF.transpose(1, 2).chunk(2, dim=1)
        ways, conv_states = [], []
        for direction, conv_call, options in _calls(
            x_BET, directions, lengths, conv_state, ssm_state, chunk_size
        ):
            u_BET, last_conv = conv.conv_forward(*conv_call)
            ways.append(_way(direction, u_BET, _project(direction, u_BET), options))
            conv_states.append(last_conv)
        y_BET, last_states, saved = scan.forward(ways, z_BET, True, lengths, save)
        if save:
            ctx.modules, ctx.chunk_size = modules, chunk_size
            ctx.save_for_backward(xz_BTF, lengths, conv_state, ssm_state, *saved, *parameters)
        return y_BET.transpose(1, 2), conv_states[0], last_states[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y_BTE, grad_conv_state, grad_ssm_state):
        scan, conv = ctx.modules
        xz_BTF, lengths, conv_state, ssm_state, *rest = ctx.saved_tensors
        num_directions = len(rest) // (1 + _PARAMETERS)
        saved, directions = rest[:num_directions], _directions(rest[num_directions:])
        x_BET, z_BET = xz_BTF.transpose(1, 2).chunk(2, dim=1)

        conv_calls, projections, ways = [], [], []
        for direction, conv_call, options in _calls(
            x_BET, directions, lengths, conv_state, ssm_state, ctx.chunk_size
        ):
            u_BET, _ = conv.conv_forward(*conv_call)
            conv_calls.append(conv_call)
            projections.append(_project(direction, u_BET))
            ways.append(_way(direction, u_BET, projections[-1], options))
        no_state = [None] * (num_directions - 1)
        scan_grads, grad_z_BET = scan.backward(
            grad_y_BTE.transpose(1, 2),
            [grad_ssm_state, *no_state],
            saved,
            ways,
            z_BET,
            True,
            lengths,
        )

        grad_xz_BTF = torch.empty_like(xz_BTF, memory_format=torch.contiguous_format)
        grad_x_BET, grad_z_target = grad_xz_BTF.transpose(1, 2).chunk(2, dim=1)
        grad_z_target.copy_(grad_z_BET)
        grad_states, grad_parameters = [], []
        for index, (direction, projected, conv_call, way, grads) in enumerate(
            zip(directions, projections, conv_calls, ways, scan_grads, strict=True)
        ):
            grad_u_BET, projection_grads = _projection_backward(direction, projected, way, grads)
            conv_grads = conv.conv_backward(
                grad_u_BET, grad_conv_state if index == 0 else None, *conv_call
            )
            grad_x, grad_weight, grad_bias, grad_initial = conv_grads
            if index == 0:
                grad_x_BET.copy_(grad_x)
            else:
                grad_x_BET += grad_x
            grad_states.append(grad_initial)
            grad_parameters += [
                grad_weight, grad_bias, *projection_grads, grads.delta_bias,
                (grads.A * way.A).to(direction.A_log.dtype), grads.D,
            ]  # fmt: skip
        return (
            grad_xz_BTF,
            None,
            grad_states[0],
            scan_grads[0].initial_state,
            None,
            None,
            None,
            *grad_parameters,
        )


def _directions(parameters) -> list[Direction]:
    return [
        Direction(*parameters[start : start + _PARAMETERS])
        for start in range(0, len(parameters), _PARAMETERS)
    ]


def _calls(x_BET, directions, lengths, conv_state, ssm_state, chunk_size):
    """Per direction: its parameters, the arguments of its convolution, what else its scan takes."""
    options = [(False, conv_state, ssm_state, None), (True, None, None, chunk_size)]
    for direction, (reverse, conv_initial, ssm_initial, reset_every) in zip(
        directions, options, strict=False
    ):
        conv_call = (
            x_BET,
            direction.conv_weight,
            direction.conv_bias,
            "silu",
            lengths,
            reverse,
            conv_initial,
            reset_every,
        )
        yield direction, conv_call, (reverse, ssm_initial, reset_every)


def _project(direction: Direction, u_BET: Tensor) -> Tensor:
    """Step sizes, B and C of every frame, side by side."""
    return torch.matmul(u_BET.transpose(1, 2), direction.x_proj.to(u_BET.dtype).t())


def _way(direction: Direction, u_BET: Tensor, projected: Tensor, options: tuple) -> Way:
    dt, B, C = direction.split(projected)
    delta_BTE = torch.matmul(dt, direction.dt_proj.to(dt.dtype).t())
    return Way(
        u_BET,
        delta_BTE.transpose(1, 2),
        direction.A,
        B.transpose(1, 2).unsqueeze(1),
        C.transpose(1, 2).unsqueeze(1),
        direction.D,
        direction.dt_bias,
        *options,
    )


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
