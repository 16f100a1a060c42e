"""What takes long to make, kept for those who ask for it again."""

import os
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

from inference.locks import Lock

_Made = TypeVar("_Made")


class Kept(Generic[_Made]):
    """The latest few things by their keys, each made once; one object serves many threads.

    Args:
        limit: how many are kept.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._made: dict[Hashable, _Made] = {}
        # By the process, too: in a copy of it (fork) nobody goes on with what was begun.
        self._begun: dict[tuple[int, Hashable], Future[_Made]] = {}
        self._lock = Lock()

    def get(self, key: Hashable, make: Callable[[], _Made]) -> _Made:
        """What ``make`` gives for ``key``: who asks meanwhile waits, who wants others does not.

        What ``make`` raises is raised for all of them, and made again for who asks later.
        """
        of_process = os.getpid(), key
        with self._lock:
            if key in self._made:
                # The latest to be asked for goes last.
                self._made[key] = self._made.pop(key)
                return self._made[key]
            begun = self._begun.get(of_process)
            if begun is None:
                mine = self._begun[of_process] = Future()
        if begun is not None:
            return begun.result()
        try:
            made = make()
        except BaseException as error:
            with self._lock:
                del self._begun[of_process]
            mine.set_exception(error)
            raise
        with self._lock:
            del self._begun[of_process]
            self._made[key] = made
            while len(self._made) > self._limit:
                del self._made[next(iter(self._made))]
        mine.set_result(made)
        return made

    def drop(self, is_old: Callable[[Hashable], bool]) -> None:
        """Keeps no longer what has such a key."""
        with self._lock:
            self._made = {key: made for key, made in self._made.items() if not is_old(key)}
