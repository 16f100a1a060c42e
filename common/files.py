"""Files that are either whole or not there."""

import errno
import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Literal

_BLOCK_BYTES = 1 << 20
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""Errors of file systems that have no locks."""


@contextmanager
def atomic_write(path: str | Path, mode: Literal["w", "wb"] = "w") -> Iterator[IO]:
    """Open a file that appears under its name only once it is complete.

    The content goes to a temporary file in the same folder and is renamed at the end, so a
    reader, a crash or a full disk never meets half a file. An exception inside the block leaves
    what was there before.

    Args:
        path: the file to create or replace; its folder must exist.
        mode: ``w`` for UTF-8 text, ``wb`` for bytes.

    Yields:
        The stream; newlines are written as given.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    # Not tempfile: its files may be read by nobody else, whatever the umask says.
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        encoding, newline = ("utf-8", "") if mode == "w" else (None, None)
        with open(descriptor, mode, encoding=encoding, newline=newline) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


@contextmanager
def alone_with(path: str | Path) -> Iterator[None]:
    """Inside, other processes that want to be alone with the file wait: to read it and replace it.

    The lock is a hidden file beside it, held by the process and released with it, on NFS as well;
    where a file system has no locks nobody waits.
    """
    path = Path(path)
    lock = path.with_name(f".{path.name}.lock")
    while True:
        with open(lock, "a") as stream:
            try:
                fcntl.lockf(stream, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
            # Who had it before may have removed it, and a third process may have the next one.
            if not _is_at(lock, stream):
                continue
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def _is_at(path: Path, stream: IO) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(stream.fileno()))
    except FileNotFoundError:
        return False


def file_digest(path: str | Path, algorithm: str = "sha256") -> str:
    """Hexadecimal digest of a file's bytes, read in blocks."""
    digest = hashlib.new(algorithm)
    with open(path, "rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
