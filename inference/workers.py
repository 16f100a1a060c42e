"""Batches that are worked on side by side."""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from inference.locks import Lock

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
Map = Callable[[Callable[[_Item], _Result], Iterable[_Item]], Iterator[_Result]]
"""``map``, or what does the same with other threads."""

_lock = Lock()


def threads_of_caller() -> int:
    """Threads that the calling thread's operations have.

    A thread keeps the number that holds when it first asks: not while workers get theirs.
    """
    with _lock:
        return torch.get_num_threads()


@contextlib.contextmanager
def side_by_side(workers: int, threads: int) -> Iterator[Map]:
    """A ``map`` whose calls are begun at once, in order, by so many workers.

    Who leaves the context before it is done drops what has not begun.

    Args:
        workers: calls at a time.
        threads: of the CPU, for the operations of each.
    """
    started = threading.Barrier(workers + 1)

    def start() -> None:
        torch.set_num_threads(threads)
        # A thread keeps the number that was the last to be set when it is first asked for.
        torch.get_num_threads()
        started.wait()

    pool = ThreadPoolExecutor(workers)
    try:
        with _lock:
            own = torch.get_num_threads()
            try:
                for _ in range(workers):
                    pool.submit(start)
                started.wait()
            finally:
                torch.set_num_threads(own)
        yield pool.map
    finally:
        started.abort()
        pool.shutdown(cancel_futures=True)
