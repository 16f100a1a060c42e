"""The causal depthwise convolution as its definition reads: one frame after the other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.causal_conv1d.arguments import ConvArguments
from ops.frames import clear_at_block_start, is_block_start, select_valid, valid_frames


def unavailable() -> str | None:
    """Why this backend cannot be used on this machine: never."""
    return None


def unsupported(_arguments: ConvArguments) -> str | None:
    """Why a call does not fit: every call does."""
    return None


def conv(arguments: ConvArguments) -> tuple[Tensor, Tensor]:
    """The plain loop that every other backend is tested against.

    A window of the last ``width`` inputs in scan order slides over the item, the newest input
    last. It starts from the initial state, and from zeros in every later block; padding neither
    moves it nor appears in the output.

    Returns:
        y (batch, dim, time) and the state (batch, dim, width-1), the newest width-1 inputs of the
        window where it stopped, both in the dtype of ``x``.
    """
    x, weight, bias, activation, lengths, reverse, initial_state, reset_every = arguments
    batch, dim, time = x.shape
    width = weight.shape[1]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    valid = valid_frames(lengths, time)
    frames = select_valid(x.to(dtype), valid).unbind(-1)
    state = x.new_zeros(batch, dim, width - 1, dtype=dtype)
    if initial_state is not None:
        state = initial_state.to(dtype)

    outputs: list[Tensor] = [state.new_empty(0)] * time
    for t in reversed(range(time)) if reverse else range(time):
        if is_block_start(t, time, reverse, reset_every):
            state = clear_at_block_start(state, t, reverse, lengths)
        window = torch.cat([state, frames[t].unsqueeze(-1)], dim=-1)
        outputs[t] = (window * weight.to(dtype)).sum(-1)
        if valid is None:
            state = window[..., 1:]
        else:
            state = torch.where(valid[:, t, None, None], window[..., 1:], state)

    y = torch.stack(outputs, dim=-1) if outputs else x.to(dtype).clone()
    if bias is not None:
        y = y + bias.to(dtype)[:, None]
    if activation is not None:
        y = F.silu(y)
    # A state that never moved must not be the caller's own tensor, nor an output without frames.
    return select_valid(y, valid).to(x.dtype), state.to(x.dtype).clone()
