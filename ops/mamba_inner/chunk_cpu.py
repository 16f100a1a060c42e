"""A few frames of a mixer in one call of compiled code: streams and decoding on a CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ops import build
from ops.backends import override
from ops.mamba_inner.arguments import Direction
from ops.native import address, are_float32_on_cpu

_kernel = build.Kernel(Path(__file__).with_name("chunk.cpp"))
prepare = _kernel.prepare
MAX_FRAMES = 64
"""Of more, what the general path does at once for all frames pays for what it costs by itself."""

# Elements of (batch, frames, E, N) that are worth another thread: it takes a while to wake up.
_THREAD_ELEMENTS = 1 << 16


class _Way(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in Direction._fields]


class Chunk(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "frames", "kept", "dim", "state", "rank")),
        *((name, ctypes.c_int64) for name in ("taps", "directions")),
        ("xz", ctypes.c_void_p),
        ("ways", _Way * 2),
        *((name, ctypes.c_void_p) for name in ("conv_state", "ssm_state", "y")),
        *((name, ctypes.c_void_p) for name in ("next_conv_state", "next_ssm_state")),
        ("threads", ctypes.c_int64),
        ("parallel_for", ctypes.c_void_p),
    ]


def fits(first: Tensor, *others: Tensor | None, backend: str = "auto") -> bool:
    """Whether `chunk` can compute with these: compiled, float32 on the CPU, without gradients.

    It is the backend ``cpu``, which the caller or the environment may have ruled out.
    """
    return (
        not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and are_float32_on_cpu(first, *others)
        and (override() if backend == "auto" else backend) in ("auto", "cpu")
        and prepare() is None
    )


class Directions:
    """The directions of a mixer as the kernel sees them.

    Args:
        directions: one, or two, of which the second begins at the last frame, from nothing.
    """

    def __init__(self, directions: Sequence[Direction]):
        # The structure points at them.
        self._weights = [[None if x is None else x.contiguous() for x in d] for d in directions]
        self._ways = (_Way * 2)(*(_Way(*map(address, way)) for way in self._weights))
        self._rank = directions[0].dt_proj.shape[1]

    def chunk(
        self,
        batch: int,
        frames: int,
        conv_state: Tensor,
        ssm_state: Tensor,
        next_conv: Tensor,
        next_ssm: Tensor,
        xz: int | None = None,
        y: int | None = None,
        ahead: int = 0,
    ) -> Chunk:
        """A call for so many frames; ``xz`` and ``y`` are addresses, the states contiguous.

        The next states are those before the last ``ahead`` frames, fewer than all.
        """
        _, dim, state = ssm_state.shape
        return Chunk(
            batch,
            frames,
            frames - ahead,
            dim,
            state,
            self._rank,
            conv_state.shape[2] + 1,
            len(self._weights),
            xz,
            self._ways,
            conv_state.data_ptr(),
            ssm_state.data_ptr(),
            y,
            next_conv.data_ptr(),
            next_ssm.data_ptr(),
            min(torch.get_num_threads(), 1 + ssm_state.numel() * frames // _THREAD_ELEMENTS),
            build.parallel_for_address(),
        )


def chunk(
    xz_BTF: Tensor, directions: Sequence[Direction], conv_state: Tensor, ssm_state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`mamba_inner_fn` of one chunk with states, on tensors that fit.

    Args:
        xz_BTF: input and gate of the frames (batch, time, 2 E).
        directions: as in `Directions`.
        conv_state: (batch, E, W-1) of the first one.
        ssm_state: (batch, E, N) of the first one.

    Returns:
        y (batch, time, E), and both states after the last frame; those given are left as they are.
    """
    xz_BTF, conv_state, ssm_state = (x.contiguous() for x in (xz_BTF, conv_state, ssm_state))
    (batch, frames, _), dim = xz_BTF.shape, ssm_state.shape[1]
    y_BTE = xz_BTF.new_empty(batch, frames, dim)
    next_conv, next_ssm = torch.empty_like(conv_state), torch.empty_like(ssm_state)
    ways = Directions(directions)
    call = ways.chunk(
        batch,
        frames,
        conv_state,
        ssm_state,
        next_conv,
        next_ssm,
        xz_BTF.data_ptr(),
        y_BTE.data_ptr(),
    )
    _kernel.load().mamba_inner_chunk(ctypes.byref(call))
    return y_BTE, next_conv, next_ssm
