"""Files that are either whole or not there."""

import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Literal

from common.errors import UserError

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
    # A name may be as long as names can be.
    temporary = path.with_name(f".{path.name[:48]}.{secrets.token_hex(8)}")
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
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A folder to fill that gets its name once it is complete; an exception deletes it.

    Args:
        path: the folder to create; the one above it must exist, and it itself not, at the end.

    Yields:
        Where it is until then.
    """
    path = Path(path)
    scratch = Path(tempfile.mkdtemp(dir=path.parent, prefix=".making-"))
    try:
        yield scratch
        os.chmod(scratch, 0o755)
        os.rename(scratch, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


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


def why_unreadable(path: str | Path, regular: bool = True) -> str | None:
    """Why a file that somebody names cannot be read, in words; None where it can.

    Args:
        regular: a pipe will not do.
    """
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            return "it is a folder, not a file"
        if not stat.S_ISREG(mode):
            return "it is no regular file" if regular else None
        with open(path, "rb") as stream:
            return None if stream.read(1) else "it is empty"
    except FileNotFoundError:
        return "there is no such file"
    except (OSError, ValueError) as error:
        return f"it cannot be read ({getattr(error, 'strerror', None) or error})"


def require_file(name: str, path: str | Path, advice: str) -> None:
    """Refuses what is no file that can be read.

    Args:
        name: of the key or the option that names it.
        advice: a sentence that says what to give.

    Raises:
        UserError: names key and path, and says what is wrong.
    """
    if reason := why_unreadable(path):
        raise UserError(f"{name} {path}: {reason}. {advice}")


def require_folder(name: str, path: str | Path, advice: str) -> None:
    """Refuses what is no folder that can be read; arguments and errors as of `require_file`."""
    try:
        os.listdir(path)
        return
    except FileNotFoundError:
        reason = "there is no such folder"
    except NotADirectoryError:
        reason = "it is a file, not a folder" if Path(path).exists() else "there is no such folder"
    except (OSError, ValueError) as error:
        reason = f"it cannot be read ({getattr(error, 'strerror', None) or error})"
    raise UserError(f"{name} {path}: {reason}. {advice}")


def require_place(name: str, folder: str | Path) -> None:
    """Refuses a folder that is not there and cannot be made, or that cannot be written.

    Raises:
        UserError: names key and path, and says what is in the way.
    """
    place = Path(os.path.abspath(folder))
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        reason = f"{place} is a file, not a folder" if place.exists() else f"{place} leads nowhere"
    elif not os.access(place, os.W_OK | os.X_OK):
        reason = f"{place} cannot be written"
    else:
        return
    raise UserError(f"{name} {folder}: {reason}. Give another one.")


def file_digest(path: str | Path, algorithm: str = "sha256") -> str:
    """Hexadecimal digest of a file's bytes, read in blocks."""
    digest = hashlib.new(algorithm)
    with open(path, "rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
