"""How the C library hands out memory: a setting that CPU training gains from."""

import ctypes
import platform

# Parameters of glibc's mallopt(3).
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3


def keep_freed_memory() -> bool:
    """Let freed tensors be used again in the place of going back to the system.

    By default glibc maps every tensor of some megabytes anew, and the system clears its pages at
    their first use: with five minutes of speech in a batch, about a fifth of a training step on a
    CPU. The process then keeps its peak memory until it ends.

    Returns:
        whether the C library is glibc and took the setting; elsewhere nothing changes.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL("libc.so.6")
    largest_block_bytes = 2**30
    never = -1
    return bool(
        libc.mallopt(_MMAP_THRESHOLD, largest_block_bytes) and libc.mallopt(_TRIM_THRESHOLD, never)
    )
