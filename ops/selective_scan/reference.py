"""The selective scan as its definition reads: one frame after the other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.frames import clear_at_block_start, is_block_start, select_valid, valid_frames
from ops.selective_scan.arguments import ScanArguments


def unavailable() -> str | None:
    """Why this backend cannot be used on this machine: never."""
    return None


def unsupported(_arguments: ScanArguments) -> str | None:
    """Why a call does not fit: every call does."""
    return None


def scan(arguments: ScanArguments) -> tuple[Tensor, Tensor]:
    """The plain loop, over one way, that every other backend is tested against.

    Per frame, with dt = softplus(delta + delta_bias)::

        h = exp(dt A) h + dt B u
        y = (C h + D u) silu(z)

    Returns:
        y (batch, dim, time) in the dtype of ``u`` and the last state (batch, dim, state), float32
        (float64 when the inputs are).

    Paper: arXiv:2312.00752, section 3.2, with exp(dt A) and dt B as discretisation.
    """
    (way,), z, softplus, lengths = arguments
    u, delta, A, B, C, D, delta_bias, initial_state, reverse, reset_every = way
    batch, dim, time = u.shape
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    valid = valid_frames(lengths, time)

    A = A.to(dtype)
    dt = select_valid(delta.to(dtype), valid)
    if delta_bias is not None:
        dt = dt + delta_bias.to(dtype)[:, None]
    # Padding gets dt = 0: exp(0 A) = 1 hands the state on unchanged, and nothing enters it.
    dt = select_valid(F.softplus(dt) if softplus else dt, valid)
    x = select_valid(u.to(dtype), valid)

    dt_frames, x_frames = dt.unbind(-1), x.unbind(-1)
    B_frames = _per_frame(B.to(dtype), dim, time, valid)
    C_frames = _per_frame(C.to(dtype), dim, time, valid)
    h = u.new_zeros(batch, dim, A.shape[1], dtype=dtype)
    if initial_state is not None:
        h = initial_state.to(dtype)

    outputs: list[Tensor] = [x.new_empty(0)] * time
    for t in reversed(range(time)) if reverse else range(time):
        if is_block_start(t, time, reverse, reset_every):
            h = clear_at_block_start(h, t, reverse, lengths)
        dt_BE1 = dt_frames[t].unsqueeze(-1)
        h = torch.exp(dt_BE1 * A) * h + dt_BE1 * x_frames[t].unsqueeze(-1) * B_frames[t]
        outputs[t] = (h * C_frames[t]).sum(-1)

    y = torch.stack(outputs, dim=-1) if outputs else x.clone()
    if D is not None:
        y = y + D.to(dtype)[:, None] * x
    if z is not None:
        y = y * F.silu(select_valid(z.to(dtype), valid))
    # Where C does not vary with time the state is read out in padding, too.
    y = select_valid(y, valid)
    # A state that never moved must not be the caller's own tensor, nor one that moved what the
    # gradient needs.
    return y.to(u.dtype), h.clone()


def _per_frame(projection: Tensor, dim: int, time: int, valid: Tensor | None) -> list[Tensor]:
    """B or C for each frame, broadcastable to (batch, dim, state)."""
    if projection.dim() == 2:
        return [projection] * time
    groups = projection.shape[1]
    frames = select_valid(projection, valid).unbind(-1)
    return [frame.repeat_interleave(dim // groups, dim=1) for frame in frames]
