"""One training run in a folder at a time."""

import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from common.errors import UserError
from common.files import NO_LOCKS
from training.launch.processes import on_main

logger = logging.getLogger(__name__)

LOCK_FILE = ".run.lock"


@contextmanager
def sole_run(folder: str | Path) -> Iterator[None]:
    """Inside, no other process trains in the folder, which exists afterwards.

    The lock is the operating system's (POSIX record locks, which NFS knows, too): it ends with the
    process, whatever ends that, and loader workers do not inherit it. The main process holds it for
    the others.

    Raises:
        UserError: another process trains there, or the folder cannot be written.
    """
    stream = None

    def take() -> None:
        nonlocal stream
        stream = _taken(Path(folder))

    on_main(take)
    try:
        yield
    finally:
        if stream is not None:
            stream.close()


def _taken(folder: Path) -> IO:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = open(folder / LOCK_FILE, "a+", encoding="utf-8")  # noqa: SIM115 held open
    except OSError as error:
        raise UserError(
            f"output_folder {folder} cannot be written: {error.strerror}. Give another one."
        ) from None
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise UserError(
                f"Another run trains in {folder}: {_owner(stream)}. Wait for its end or stop it, "
                "or give another --output_folder. --test_only may run beside it."
            ) from None
        logger.warning("%s is on a file system without locks: start no second run there.", folder)
    stream.truncate(0)
    owner = {"process": os.getpid(), "host": socket.gethostname(), "since": time.time()}
    json.dump(owner, stream)
    stream.flush()
    return stream


def _owner(stream: IO) -> str:
    stream.seek(0)
    try:
        owner = json.load(stream)
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(owner["since"]))
        return f"process {owner['process']} on {owner['host']}, since {since}"
    except (OSError, ValueError, TypeError, KeyError):
        return "a process that has not said which"
