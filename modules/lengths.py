"""Frame counts as integers, as SpeechBrain's relative lengths, and as masks.

How many frames samples become is known to ``modules.speech_encoder.SpeechEncoder`` alone: a
relative length times the padded length, rounded, is not that number.
"""

from typing import TypeVar

import torch
from torch import Tensor

IntOrTensor = TypeVar("IntOrTensor", int, Tensor)


def padding_mask(lengths_B: Tensor, max_frames: int) -> Tensor:
    """Mask (batch, ``max_frames``), True where a frame is padding."""
    frames_T = torch.arange(max_frames, device=lengths_B.device)
    return frames_T[None] >= lengths_B[:, None]


def absolute_lengths(wav_lens: Tensor, max_frames: int) -> Tensor:
    """Relative lengths (fraction of the longest) as frame counts, int64 (batch,).

    Integers are frame counts already and stay as they are.

    Raises:
        ValueError: a fraction lies outside [0, 1], so that it is no relative length.
    """
    if not wav_lens.is_floating_point():
        return wav_lens.long()
    # Only on the CPU: elsewhere the check would make the host wait for the device; and a graph that
    # is being traced cannot branch on values.
    on_cpu = wav_lens.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and wav_lens.numel():
        low, high = wav_lens.min().item(), wav_lens.max().item()
        if low < 0 or high > 1:
            raise ValueError(
                f"wav_len lies between {low:g} and {high:g}; relative lengths lie between 0 and 1. "
                "Divide frame counts by the frames of the batch."
            )
    return torch.round(wav_lens.float() * max_frames).long()


def relative_lengths(lengths_B: Tensor, max_frames: int) -> Tensor:
    """Frame counts as SpeechBrain's relative lengths: float32 fractions of ``max_frames``."""
    return lengths_B.float() / max_frames


def valid_lengths(padding_mask_BT: Tensor | None) -> Tensor | None:
    """Frame counts, int64 (batch,), of a mask that is True where a frame is padding."""
    return None if padding_mask_BT is None else (~padding_mask_BT).sum(dim=1)
