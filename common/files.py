"""Files that are either whole or not there."""

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Literal

_BLOCK_BYTES = 1 << 20


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


def file_digest(path: str | Path, algorithm: str = "sha256") -> str:
    """Hexadecimal digest of a file's bytes, read in blocks."""
    digest = hashlib.new(algorithm)
    with open(path, "rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
