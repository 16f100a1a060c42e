"""The inner part of a causal mixer for one frame: what decoding token by token runs on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.checks import check_shape
from ops.mamba_inner import chunk_cpu
from ops.mamba_inner.arguments import Direction, check_directions
from ops.selective_scan.dispatch import BACKENDS


@torch.no_grad()
def mamba_inner_step(
    xz_BF: Tensor,
    parameters: Direction,
    conv_state: Tensor,
    ssm_state: Tensor,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`mamba_inner_fn` of a single frame of a causal mixer, without gradients.

    The general path prepares, checks and dispatches a scan and a convolution for every call, which
    for one frame costs several times the arithmetic.

    Args:
        xz_BF: input and gate (batch, 2 E) of the frame.
        parameters: of the mixer.
        conv_state: (batch, E, W-1), the inputs before it.
        ssm_state: (batch, E, N), the scan's state before it; its dtype is that of the arithmetic.
        backend: of the scan; all but ``cpu`` compute a single frame in torch.

    Returns:
        y (batch, E) in the dtype of ``xz_BF``, and both states after the frame; those given are
        left as they are.

    Raises:
        ValueError: a shape does not fit, or the backend asked for cannot be used here.
    """
    inner, state, taps = check_directions((parameters,))
    batch = xz_BF.shape[0]
    check_shape("xz", xz_BF, (batch, 2 * inner), "(batch, 2 E)")
    check_shape("conv_state", conv_state, (batch, inner, taps - 1), "(batch, E, W-1)")
    check_shape("ssm_state", ssm_state, (batch, inner, state), "(batch, E, N)")
    if chunk_cpu.fits(xz_BF, conv_state, ssm_state, *parameters, backend=backend):
        y_B1E, next_conv, next_ssm = chunk_cpu.chunk(
            xz_BF[:, None], [parameters], conv_state, ssm_state
        )
        return y_B1E[:, 0], next_conv, next_ssm
    BACKENDS.named(backend)
    return step_in_torch(xz_BF, parameters, conv_state, ssm_state)


@torch.no_grad()
def step_in_torch(
    xz_BF: Tensor, parameters: Direction, conv_state: Tensor, ssm_state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`mamba_inner_step` on any device and in any dtype."""
    x_BE, z_BE = xz_BF.chunk(2, dim=-1)
    exact = ssm_state.dtype
    window_BEW = torch.cat([conv_state.to(x_BE.dtype), x_BE.unsqueeze(-1)], dim=-1)
    u_BE = (window_BEW.to(exact) * parameters.conv_weight.to(exact)).sum(-1)
    if parameters.conv_bias is not None:
        u_BE = u_BE + parameters.conv_bias.to(exact)
    u_BE = F.silu(u_BE).to(x_BE.dtype)

    projected = F.linear(u_BE, parameters.x_proj.to(u_BE.dtype))
    dt_BR, B_BN, C_BN = parameters.split(projected)
    dt_BE = F.linear(dt_BR, parameters.dt_proj.to(dt_BR.dtype)).to(exact)
    dt_BE = F.softplus(dt_BE + parameters.dt_bias.to(exact))
    u_BE = u_BE.to(exact)
    # In place, since the passes over memory are what this costs: exp(dt A) h + dt u B.
    next_BEN = dt_BE.unsqueeze(-1) * parameters.A.to(exact)
    next_BEN.exp_().mul_(ssm_state)
    next_BEN.addcmul_((dt_BE * u_BE).unsqueeze(-1), B_BN.to(exact).unsqueeze(1))
    y_BE = (next_BEN @ C_BN.to(exact).unsqueeze(-1)).squeeze(-1)
    y_BE = y_BE.addcmul_(u_BE, parameters.D.to(exact)).mul_(F.silu(z_BE.to(exact)))
    return y_BE.to(x_BE.dtype), window_BEW[..., 1:], next_BEN
