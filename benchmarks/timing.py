"""Times by the clock, of candidates that take turns; and the memory of this process."""

from __future__ import annotations

import math
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

# A block lasts at least so long: what ran before it has left the caches by then.
BLOCK_MS = 100


def nothing() -> None:
    """Waits for a CPU, which is done with its work when a call returns."""


def tell(what: str, times_ms: dict[str, float]) -> None:
    """Say on stderr what has been measured so far: the tables come at the end."""
    times = ", ".join(f"{name} {ms:.3f} ms" for name, ms in times_ms.items())
    print(f"{what}: {times}", file=sys.stderr, flush=True)


def blocks_ms(
    candidates: dict[str, Callable[[], None]],
    rounds: int,
    synchronise: Callable[[], None],
) -> dict[str, list[float]]:
    """Milliseconds per call of each, one value per block of calls that last ``BLOCK_MS``.

    They take turns, so that a busy spell hits all of them.
    """

    def block(call: Callable[[], None], count: int) -> float:
        synchronise()
        start = time.perf_counter()
        for _ in range(count):
            call()
        synchronise()
        return (time.perf_counter() - start) * 1e3 / count

    calls = {}
    for name, call in candidates.items():
        # The first call pays for compilation and fresh memory, a disturbed one tells nothing.
        fastest_ms = min([block(call, 1) for _ in range(3)][1:])
        calls[name] = max(1, math.ceil(BLOCK_MS / fastest_ms))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            times[name].append(block(call, calls[name]))
    return times


def medians_ms(
    candidates: dict[str, Callable[[], None]], rounds: int, synchronise: Callable[[], None]
) -> dict[str, float]:
    """Medians of ``blocks_ms``."""
    times = blocks_ms(candidates, rounds, synchronise)
    return {name: statistics.median(values) for name, values in times.items()}


def cold_ms(call: Callable[[], None], rounds: int) -> float:
    """Median milliseconds of a single call that finds nothing of its own in the caches."""
    other_work = torch.empty(1 << 26)
    times = []
    for _ in range(rounds):
        other_work.zero_()
        times.append(timed_ms(call))
    return statistics.median(times)


def timed_ms(call: Callable[[], None]) -> float:
    """Milliseconds of a single call."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def copy_bandwidth(device: str, elements: int, synchronise: Callable[[], None]) -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.ones(elements, device=device)
    target = torch.ones_like(source)
    ms = medians_ms({"copy": lambda: target.copy_(source)}, 10, synchronise)["copy"]
    return 2 * source.numel() * source.element_size() / ms * 1e3


def memory_bytes(field: str = "VmRSS") -> int:
    """Memory of this process now (``VmRSS``) or at its peak (``VmHWM``), as Linux counts it."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(rf"{field}:\s+(\d+) kB", status).group(1)) * 1024
