"""Locks that no copy of a process (fork) finds taken."""

import os
import threading
import weakref
from contextlib import AbstractContextManager
from types import TracebackType


class Lock:
    """A lock that is free in each copy of its process: the thread that holds it is not in there."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        _locks.add(self)

    def __enter__(self) -> None:
        self._lock.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lock.__exit__(kind, error, traceback)


def held_over_forks(lock: AbstractContextManager) -> AbstractContextManager:
    """The lock, which a process holds while it is copied: what it guards is not half done there."""
    _held_over_forks.add(lock)
    return lock


_locks: weakref.WeakSet[Lock] = weakref.WeakSet()
_held_over_forks: weakref.WeakSet[AbstractContextManager] = weakref.WeakSet()
_held: list[AbstractContextManager] = []


def _hold() -> None:
    locks = list(_held_over_forks)
    for lock in locks:
        lock.__enter__()
    _held[:] = locks


def _give_back() -> None:
    locks, _held[:] = _held[:], []
    for lock in locks:
        lock.__exit__(None, None, None)


def _give_back_and_free() -> None:
    _give_back()
    for lock in list(_locks):
        lock._lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_hold, after_in_parent=_give_back, after_in_child=_give_back_and_free
    )
