"""The inner part of a mixer through calls of its submodules, whatever stands in their places.

`ops.mamba_inner` reads the weights of plain submodules instead and is faster.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.lengths import padding_mask
from modules.overlapping_chunks import before_and_after, carried
from modules.plain_layers import is_plain
from ops.causal_conv1d import causal_conv1d_fn
from ops.causal_conv1d.dispatch import BACKENDS as CONV_BACKENDS
from ops.checks import normalise_lengths
from ops.selective_scan import selective_scan_fn


class DirectionModules(NamedTuple):
    """What one direction of a mixer has of its own; shapes as in ``ops.mamba_inner.Direction``."""

    conv1d: nn.Module
    x_proj: nn.Module
    dt_proj: nn.Module
    A_log: Tensor
    D: Tensor

    def are_plain(self) -> bool:
        """Whether the weights of all submodules say what these compute."""
        return is_plain(self.conv1d) and is_plain(self.x_proj) and is_plain(self.dt_proj)


def mamba_inner_of_modules(
    xz_BTF: Tensor,
    forward: DirectionModules,
    backward: DirectionModules | None = None,
    *,
    d_conv: int,
    lengths: Tensor | None,
    conv_state: Tensor | None,
    ssm_state: Tensor | None,
    chunk_size: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``ops.mamba_inner.mamba_inner_fn`` and its states, calling each submodule that is not plain.

    Args:
        d_conv: W, how many frames an output of ``conv1d`` depends on.
        Others as in ``mamba_inner_fn``.
    """
    x_BET, z_BET = xz_BTF.transpose(1, 2).chunk(2, dim=1)
    batch, _, time = x_BET.shape
    lengths = normalise_lengths(lengths, batch, time, x_BET.device)
    u_BET, last_conv = _convolved(forward.conv1d, x_BET, d_conv, lengths, conv_state, backend)
    y_BET, last_ssm = _scanned(
        forward, u_BET, z_BET, lengths=lengths, initial_state=ssm_state, backend=backend
    )
    if backward is not None:
        u_BET = _convolved_backwards(backward.conv1d, x_BET, d_conv, lengths, chunk_size, backend)
        y_backward_BET, _ = _scanned(
            backward,
            u_BET,
            z_BET,
            lengths=lengths,
            reverse=True,
            reset_every=chunk_size,
            backend=backend,
        )
        y_BET = (y_BET + y_backward_BET) * 0.5
    return y_BET.transpose(1, 2), last_conv, last_ssm


def states_of_chunks(
    x_RHE: Tensor,
    direction: DirectionModules,
    conv_state: Tensor,
    ssm_state: Tensor,
    *,
    d_conv: int,
    lengths: Tensor | None,
    backend: str,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The states (conv, ssm) of the forward direction before every chunk, and after all.

    Every chunk is scanned from nothing. The scan is linear in its state, so that what came before a
    chunk decays by exp(A) to the power of all its step sizes, and is added.

    Args:
        x_RHE: input of the mixer's convolution, the chunks of every item in succession.
        conv_state: (B, E, W-1), before the first chunk of each item.
        ssm_state: (B, E, N), the same.
        lengths: valid frames of each row (R,), integers; None means all.
        Others as in ``mamba_inner_of_modules``.
    """
    conv_RKE, last_conv_BKE = before_and_after(conv_state.transpose(1, 2), x_RHE, lengths)
    conv_REK, x_REH = conv_RKE.transpose(1, 2), x_RHE.transpose(1, 2)
    u_REH, _ = _convolved(direction.conv1d, x_REH, d_conv, lengths, conv_REK, backend)
    delta_REH, bias, B, C = _projected(direction, u_REH)
    A = _decay_rates(direction)
    _, added_REN = selective_scan_fn(
        u_REH,
        delta_REH,
        A,
        B,
        C,
        delta_bias=bias,
        delta_softplus=True,
        return_last_state=True,
        lengths=lengths,
        backend=backend,
    )
    steps_REH = delta_REH.to(added_REN.dtype)
    steps_REH = F.softplus(steps_REH if bias is None else steps_REH + bias[:, None])
    gains_REN = torch.exp(_without_padding(steps_REH, lengths).sum(-1, keepdim=True) * A)
    items = ssm_state.shape[0]
    rows = items, x_RHE.shape[0] // max(items, 1)
    states_BCEN, last_BEN = carried(
        gains_REN.unflatten(0, rows), added_REN.unflatten(0, rows), ssm_state.to(added_REN.dtype)
    )
    return (conv_REK, states_BCEN.flatten(0, 1)), (last_conv_BKE.transpose(1, 2), last_BEN)


def _convolved(
    conv1d: nn.Module,
    x_BET: Tensor,
    d_conv: int,
    lengths: Tensor | None,
    state: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Activated convolution from the first frame to the last, and its last W-1 valid inputs."""
    if is_plain(conv1d):
        return _plain_conv(
            conv1d, x_BET, backend, lengths=lengths, initial_state=state, return_last_state=True
        )
    batch, inner, time = x_BET.shape
    x_BET = _without_padding(x_BET, lengths)
    if state is None:
        state = x_BET.new_zeros(batch, inner, d_conv - 1)
    seen_BEL = torch.cat([state.to(x_BET.dtype), x_BET], dim=-1)
    ends_B = x_BET.new_full((batch,), time, dtype=torch.long) if lengths is None else lengths
    places_W = torch.arange(d_conv - 1, device=x_BET.device)
    last_BEW = (ends_B[:, None, None] + places_W).expand(-1, inner, -1)
    return _called_conv(conv1d, seen_BEL, d_conv), seen_BEL.gather(-1, last_BEW)


def _convolved_backwards(
    conv1d: nn.Module,
    x_BET: Tensor,
    d_conv: int,
    lengths: Tensor | None,
    chunk_size: int | None,
    backend: str,
) -> Tensor:
    """Activated convolution from each chunk's last valid frame to its first."""
    if is_plain(conv1d):
        return _plain_conv(
            conv1d, x_BET, backend, lengths=lengths, reverse=True, reset_every=chunk_size
        )
    batch, _, time = x_BET.shape
    chunk_size = chunk_size or max(time, 1)
    filler = -time % chunk_size
    padded_BEL = F.pad(_without_padding(x_BET, lengths), (0, filler))
    # One row per chunk. Padding, zero by now, comes first, where zeros stand anyway.
    num_chunks = (time + filler) // chunk_size
    chunks_BCEK = padded_BEL.unflatten(-1, (num_chunks, chunk_size)).transpose(1, 2)
    rows_REL = F.pad(chunks_BCEK.flatten(0, 1).flip(-1), (d_conv - 1, 0))
    u_REK = _called_conv(conv1d, rows_REL, d_conv).flip(-1)
    return u_REK.unflatten(0, (batch, num_chunks)).transpose(1, 2).flatten(2)[..., :time]


def _plain_conv(conv1d: nn.Linear | nn.Conv1d, x_BET: Tensor, backend: str, **options) -> Any:
    backend = backend if backend in CONV_BACKENDS.names else "auto"
    weight_EW = conv1d.weight.squeeze(1)
    return causal_conv1d_fn(x_BET, weight_EW, conv1d.bias, "silu", backend=backend, **options)


def _called_conv(conv1d: nn.Module, x_BEL: Tensor, d_conv: int) -> Tensor:
    """Activated outputs behind the first W-1 frames; the module's own padding goes unused."""
    return F.silu(conv1d(x_BEL)[..., d_conv - 1 : x_BEL.shape[-1]])


def _without_padding(x_BET: Tensor, lengths: Tensor | None) -> Tensor:
    if lengths is None:
        return x_BET
    return x_BET.masked_fill(padding_mask(lengths, x_BET.shape[-1])[:, None], 0.0)


def _scanned(
    direction: DirectionModules, u_BET: Tensor, z_BET: Tensor, **options
) -> tuple[Tensor, Tensor]:
    """Gated output and last state of the scan; ``options`` as in ``selective_scan_fn``."""
    delta_BET, bias, B, C = _projected(direction, u_BET)
    outputs = selective_scan_fn(
        u_BET,
        delta_BET,
        _decay_rates(direction),
        B,
        C,
        direction.D,
        z_BET,
        bias,
        delta_softplus=True,
        return_last_state=True,
        **options,
    )
    return cast(tuple[Tensor, Tensor], outputs)


def _projected(
    direction: DirectionModules, u_BET: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Step sizes before softplus, the bias that is still to be added to them, B and C."""
    state = direction.A_log.shape[1]
    projected = direction.x_proj(u_BET.transpose(1, 2))
    dt, B, C = projected.split([projected.shape[-1] - 2 * state, state, state], dim=-1)
    dt_proj = direction.dt_proj
    if is_plain(dt_proj):
        # Its bias is left to the scan, which does not round.
        delta_BTE, bias = F.linear(dt, dt_proj.weight.to(dt.dtype)), dt_proj.bias
    else:
        delta_BTE, bias = dt_proj(dt), None
    return delta_BTE.transpose(1, 2), bias, B.transpose(1, 2), C.transpose(1, 2)


def _decay_rates(direction: DirectionModules) -> Tensor:
    exact = torch.promote_types(direction.A_log.dtype, torch.float32)
    return -torch.exp(direction.A_log.to(exact))
