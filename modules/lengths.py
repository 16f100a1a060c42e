"""Frame counts: how many frames a number of samples becomes, and masks made from the counts.

Every part that needs a frame count takes it from here. A relative length times the padded length,
rounded, is not the same number.
"""

from typing import TypeVar

import torch
from torch import Tensor

IntOrTensor = TypeVar("IntOrTensor", int, Tensor)

HOP_SAMPLES = 160
"""Samples between two feature frames: 10 ms at 16 kHz."""


def num_feature_frames(num_samples: IntOrTensor, hop_samples: int = HOP_SAMPLES) -> IntOrTensor:
    """Frames that the filterbank makes of ``num_samples`` samples (int or integer tensor)."""
    _check_counts(num_samples, "num_samples")
    return 1 + num_samples // hop_samples


def halved(num_frames: IntOrTensor) -> IntOrTensor:
    """Frames left by one convolution of stride 2, the odd one kept."""
    return (num_frames + 1) // 2


def num_frames(num_samples: IntOrTensor, hop_samples: int = HOP_SAMPLES) -> IntOrTensor:
    """Encoder frames (25 a second) that ``num_samples`` samples become: int or integer tensor.

    >>> num_frames(16000)
    26
    >>> num_frames(torch.tensor([0, 159, 160, 16000]))
    tensor([ 1,  1,  1, 26])
    """
    return halved(halved(num_feature_frames(num_samples, hop_samples)))


def padding_mask(lengths_B: Tensor, max_frames: int) -> Tensor:
    """Mask (batch, ``max_frames``), True where a frame is padding."""
    frames_T = torch.arange(max_frames, device=lengths_B.device)
    return frames_T[None] >= lengths_B[:, None]


def absolute_lengths(wav_lens: Tensor, max_frames: int) -> Tensor:
    """Relative lengths (fraction of the longest) as frame counts, int64 (batch,).

    Raises:
        ValueError: a fraction lies outside [0, 1], so that it is no relative length.
    """
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


def _check_counts(counts: int | Tensor, name: str) -> None:
    if isinstance(counts, Tensor):
        if counts.is_floating_point():
            raise ValueError(
                f"{name} has dtype {counts.dtype}; absolute counts are integers. "
                "Relative lengths must be multiplied by the padded length first."
            )
    elif counts < 0:
        raise ValueError(f"{name} is {counts}; a count cannot be negative.")


def valid_lengths(padding_mask_BT: Tensor | None) -> Tensor | None:
    """Frame counts, int64 (batch,), of a mask that is True where a frame is padding."""
    return None if padding_mask_BT is None else (~padding_mask_BT).sum(dim=1)
