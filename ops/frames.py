"""Which frames count: the meaning of ``lengths``, ``reverse`` and ``reset_every`` in one place."""

from __future__ import annotations

import torch
from torch import Tensor


def valid_frames(lengths: Tensor | None, num_frames: int) -> Tensor | None:
    """Mask (batch, frames) of the frames before each item's length."""
    if lengths is None:
        return None
    frames = torch.arange(num_frames, device=lengths.device)
    return frames < lengths[:, None]


def select(mask: Tensor, x: Tensor) -> Tensor:
    """``x`` where ``mask`` holds, else zero.

    A product with a mask would keep NaN; a selection stops it, in the gradient too.
    """
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))


def select_valid(x: Tensor, valid: Tensor | None) -> Tensor:
    """``x`` (batch, ..., frames) with zeros in padding, whatever stood there."""
    if valid is None:
        return x
    mask = valid.reshape(valid.shape[0], *[1] * (x.dim() - 2), valid.shape[1])
    return select(mask, x)


def is_block_start(frame: int, num_frames: int, reverse: bool, reset_every: int | None) -> bool:
    """Whether a block other than the first one scanned can begin at ``frame`` in scan order."""
    if reset_every is None:
        return False
    if reverse:
        return (frame + 1) % reset_every == 0 and frame + 1 < num_frames
    return frame % reset_every == 0 and frame > 0


def clear_at_block_start(
    state: Tensor, frame: int, reverse: bool, lengths: Tensor | None
) -> Tensor:
    """``state`` (batch, ...) with zeros for the items in which a new block begins at ``frame``.

    Items for which ``frame`` is padding keep their state: it is what they started from (reverse) or
    what they return (forward). For a reversed item the block that holds its last valid frame is
    the first one scanned, so that the initial state enters there.

    Call it only where `is_block_start` holds.
    """
    if lengths is None:
        return torch.zeros_like(state)
    begins = lengths > (frame + 1 if reverse else frame)
    mask = begins.reshape(-1, *[1] * (state.dim() - 1))
    return select(~mask, state)
