"""What takes long to make, kept for those who ask for it again."""

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

_Made = TypeVar("_Made")


class Kept(Generic[_Made]):
    """The latest few things by their keys, each made once; one object serves many threads.

    Args:
        limit: how many are kept.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._made: dict[Hashable, Future[_Made]] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], _Made]) -> _Made:
        """What ``make`` gives for ``key``: who asks meanwhile waits, who wants others does not.

        What ``make`` raises is raised for all of them, and made again for who asks later.
        """
        with self._lock:
            # The latest to be asked for goes last.
            made = self._made.pop(key, None)
            is_new = made is None
            if made is None:
                made = Future()
            self._made[key] = made
            while len(self._made) > self._limit:
                del self._made[next(iter(self._made))]
        if is_new:
            try:
                made.set_result(make())
            except BaseException as error:
                with self._lock:
                    if self._made.get(key) is made:
                        del self._made[key]
                made.set_exception(error)
        return made.result()
