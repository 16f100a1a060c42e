"""What the Triton kernels of all operations share: sequences, their lengths, a sigmoid."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


class Sequence(NamedTuple):
    """A tensor (batch, dim, time) of any type and layout, with its strides in elements."""

    pointer: torch.Tensor
    batch: int
    channel: int
    frame: int


@triton.jit
def num_valid_frames(lengths, time):
    """Valid frames of the program's item, never more than there are."""
    valid = time
    if lengths is not None:
        valid = tl.load(lengths + tl.program_id(2)).to(tl.int32)
        valid = tl.minimum(tl.maximum(valid, 0), time)
    return valid


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(x * -LOG2E))
