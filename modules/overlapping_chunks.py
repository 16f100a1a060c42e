"""Chunks that end with frames of the next one, so that others hear how their sound goes on.

Letters: B items, C chunks of each, R = B C rows, L frames of a chunk, K frames before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig
from torch import Tensor

from modules.stream_state import last_frames


@dataclass
class ChunkConfig(DynChunkTrainConfig):
    """SpeechBrain's chunks, and how far they overlap.

    Args:
        lookahead: share of a chunk that the next one begins with, of encoders that look ahead.

    Raises:
        ValueError: it is no share below 1.
    """

    lookahead: float = 0.0

    def __post_init__(self):
        if not 0 <= self.lookahead < 1:
            raise ValueError(
                f"lookahead is {self.lookahead:g}; wanted a share of a chunk, from 0 to below 1."
            )


class OverlappingChunks(NamedTuple):
    """How an utterance is cut into rows, and put together again.

    Args:
        step: frames from the beginning of a chunk to that of the next one.
        ahead: further frames of a chunk, computed once more with the next one.
    """

    step: int
    ahead: int

    def count(self, num_frames: int) -> int:
        """Chunks of an utterance, at least one."""
        return max(-(-num_frames // self.step), 1)

    def split(self, x_BTD: Tensor) -> Tensor:
        """Every chunk as a row (R, L, D), those of an item in succession; zeros fill the last."""
        frames, count = x_BTD.shape[1], self.count(x_BTD.shape[1])
        padded = F.pad(x_BTD, (0, 0, 0, count * self.step + self.ahead - frames))
        rows_BCDL = padded.unfold(1, self.step + self.ahead, self.step)
        return rows_BCDL.transpose(2, 3).flatten(0, 1)

    def lengths(self, lengths_B: Tensor, num_frames: int) -> Tensor:
        """Valid frames (R,) of the rows."""
        starts_C = torch.arange(self.count(num_frames), device=lengths_B.device) * self.step
        return (lengths_B[:, None] - starts_C).clamp(0, self.step + self.ahead).flatten()

    def join(self, rows_RLD: Tensor, num_frames: int) -> Tensor:
        """The utterances (B, T, D), each frame from the row that it begins in."""
        rows_BCLD = rows_RLD[:, : self.step].unflatten(0, (-1, self.count(num_frames)))
        return rows_BCLD.flatten(1, 2)[:, :num_frames]


def before_and_after(
    before_BKD: Tensor, new_RHD: Tensor, lengths_R: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The frames before every chunk (R, K, D), and the last ones of each item (B, K, D).

    Args:
        before_BKD: those before the first chunk.
        new_RHD: the chunks, C rows for each item, without what they overlap.
        lengths_R: how many frames of each count, integers; None means all.
    """
    items, kept, _ = before_BKD.shape
    before_BKD = before_BKD.to(new_RHD.dtype)
    count, step = new_RHD.shape[0] // max(items, 1), new_RHD.shape[1]
    new_BCHD = new_RHD.unflatten(0, (items, count))
    seen_BTD = torch.cat([before_BKD, new_BCHD.flatten(1, 2)], dim=1)
    rows_BCDK = seen_BTD.unfold(1, kept, step)[:, :count]
    num_new_B = None if lengths_R is None else lengths_R.unflatten(0, (items, count)).sum(1)
    return rows_BCDK.transpose(2, 3).flatten(0, 1), last_frames(seen_BTD, kept, num_new_B)


def carried(gains_BC: Tensor, added_BC: Tensor, first_B: Tensor) -> tuple[Tensor, Tensor]:
    """States s[c] = gain[c] s[c-1] + added[c] of all items.

    Args:
        gains_BC: (B, C, ...).
        added_BC: the same shape.
        first_B: (B, ...), the state before the first chunk.

    Returns:
        the states before each chunk (B, C, ...), and those after the last one (B, ...).
    """
    if gains_BC.shape[1] == 1:
        return first_B[:, None], torch.addcmul(added_BC[:, 0], gains_BC[:, 0], first_B)
    return _Carried.apply(gains_BC, added_BC, first_B)


class _Carried(torch.autograd.Function):
    """One operation for each chunk and way: torch's gradients of slices fill memory with zeros."""

    @staticmethod
    def forward(ctx, gains_BC: Tensor, added_BC: Tensor, state_B: Tensor) -> tuple[Tensor, Tensor]:
        before_BC = torch.empty_like(added_BC)
        for chunk, (gain_B, added_B) in enumerate(
            zip(gains_BC.unbind(1), added_BC.unbind(1), strict=True)
        ):
            before_BC[:, chunk] = state_B
            state_B = torch.addcmul(added_B, gain_B, state_B)
        ctx.save_for_backward(gains_BC, before_BC)
        return before_BC, state_B

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_before_BC: Tensor, grad_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gains_BC, before_BC = ctx.saved_tensors
        grad_added_BC = torch.empty_like(gains_BC)
        for chunk in reversed(range(gains_BC.shape[1])):
            grad_added_BC[:, chunk] = grad_B
            grad_B = torch.addcmul(grad_before_BC[:, chunk], gains_BC[:, chunk], grad_B)
        return grad_added_BC * before_BC, grad_added_BC, grad_B
