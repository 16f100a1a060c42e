"""Large pages for large results: a page fault costs more than the pass over a page of 4 KiB."""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable

from torch import Tensor

# Smaller results mostly reuse memory that the C library kept. NumPy draws the line here, too.
_MIN_BYTES = 4 << 20


def ask_for_large_pages(x: Tensor) -> Tensor:
    """``x``, whose memory the system may now map in pages of megabytes, not one small page a fault.

    Only memory that was not touched yet gains. Nothing happens to small tensors, off the CPU, while
    tracing, or where the system is not Linux or knows no such pages.
    """
    # A subclass (a fake tensor, a functional one) may have no memory.
    if type(x) is Tensor and x.device.type == "cpu":
        num_bytes = x.numel() * x.element_size()
        madvise = _madvise()
        if num_bytes >= _MIN_BYTES and madvise is not None:
            # Only whole pages may be named; those that x shares with others stay as they are.
            start = -(-x.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            stop = (x.data_ptr() + num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
            madvise(start, stop - start, mmap.MADV_HUGEPAGE)
    return x


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
