"""Official archives: fetched with resume, checked, and unpacked without leaving their folder."""

import gzip
import http.client
import logging
import os
import shutil
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from common.files import alone_with, file_digest

logger = logging.getLogger(__name__)

SPEECH_URL = "https://www.openslr.org/resources/12"
LEXICON_URL = "https://www.openslr.org/resources/11/librispeech-lexicon.txt"

# https://www.openslr.org/resources/12/md5sum.txt
ARCHIVE_MD5 = {
    "train-clean-100": "2a93770f6d5c6c964bc36631d331a522",
    "train-clean-360": "c0e676e450a7ff2f54aeade5171606fa",
    "train-other-500": "d1a0fd59409feb2c614ce4d30c387708",
    "dev-clean": "42e2234ba48799c1f50f24a7926300a1",
    "dev-other": "c8d0bcc9cca99d4f8b62fcc847357931",
    "test-clean": "32fa31d27d2e1cad72775fee3f4849a9",
    "test-other": "fb5a50374b501bb3bac4815ee91d3135",
}
LEXICON_MD5 = "28f72663f6bfed7cd346283c064c315b"

_DAMAGED = (
    tarfile.TarError,
    EOFError,
    gzip.BadGzipFile,
    zlib.error,
    FileExistsError,
    NotADirectoryError,
)
_BLOCK_BYTES = 1 << 18
_TIMEOUT_S = 60
_NUM_ATTEMPTS = 5
"""How often a transfer may break in a row without a byte more."""
_WAIT_S = 2.0
"""Pause before the second attempt; it doubles each time."""
_BROKEN_TRANSFER = (
    urllib.error.URLError,
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
)


class DownloadError(OSError):
    """A file that could not be fetched, or is not what it should be."""


def fetch(url: str, target: str | Path, md5: str, *, noprogressbar: bool = False) -> Path:
    """Download a file; continue where an earlier call or a broken transfer stopped.

    Bytes are collected in ``<target>.part``, which becomes ``target`` once its MD5 is right. A
    ``target`` that is there already is checked, not fetched. A second process that fetches the file
    waits, and then finds it there.

    Args:
        url: http or https.
        target: the file to create; its folder is created too.
        md5: the digest the file must have, hexadecimal.
        noprogressbar: no progress bar.

    Raises:
        DownloadError: the server refused, the transfer kept breaking (the part stays, so that the
            next call continues), or the checksum is wrong (the part is deleted).
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with alone_with(target):
        _fetch(url, target, md5, noprogressbar)
    return target


def _fetch(url: str, target: Path, md5: str, noprogressbar: bool) -> None:
    if target.exists():
        found = file_digest(target, "md5")
        if found == md5:
            return
        raise DownloadError(
            f"{target} has the MD5 {found} instead of {md5}: it is damaged or another file;"
            " delete it to fetch it again"
        )
    part = target.with_name(target.name + ".part")
    resumed = part.exists() and part.stat().st_size > 0
    _transfer_with_retries(url, part, noprogressbar)
    found = file_digest(part, "md5")
    if found != md5 and resumed:
        # The part may have been begun from another version of the file: once more from the start.
        logger.warning("%s continued from an earlier part is damaged: fetching it whole", url)
        part.unlink()
        _transfer_with_retries(url, part, noprogressbar)
        found = file_digest(part, "md5")
    if found != md5:
        part.unlink()
        raise DownloadError(
            f"{url} arrived with the MD5 {found} instead of {md5}: damaged on the way or not the"
            " official file. It was deleted; try again, or try a mirror with --download_url"
        )
    os.replace(part, target)


def download_split(
    split: str,
    folder: str | Path,
    *,
    base_url: str = SPEECH_URL,
    md5: str | None = None,
    noprogressbar: bool = False,
) -> Path:
    """Fetch and unpack one official split.

    The archive stays in ``folder`` and may be deleted. A split folder that is there already is left
    alone: it appears only when its archive is unpacked completely.

    Args:
        split: its name.
        folder: gets ``<split>.tar.gz`` and ``LibriSpeech/<split>``.
        base_url: the folder on the server that holds the archives.
        md5: the archive's digest; by default the official one.
        noprogressbar: no progress bar.

    Returns:
        The split's folder.

    Raises:
        ValueError: no official split has this name.
        DownloadError: see `fetch` and `unpack`.
    """
    if md5 is None:
        if split not in ARCHIVE_MD5:
            raise ValueError(
                f"unknown split {split!r}: LibriSpeech has {', '.join(sorted(ARCHIVE_MD5))}"
            )
        md5 = ARCHIVE_MD5[split]
    folder = Path(folder)
    target = folder / "LibriSpeech" / split
    if target.is_dir():
        logger.info("%s is there already", target)
        return target
    archive = fetch(
        f"{base_url.rstrip('/')}/{split}.tar.gz",
        folder / f"{split}.tar.gz",
        md5,
        noprogressbar=noprogressbar,
    )
    unpack(archive, folder, split, noprogressbar=noprogressbar)
    return target


def unpack(
    archive: str | Path, folder: str | Path, split: str, *, noprogressbar: bool = False
) -> None:
    """Unpack a split's archive into ``folder/LibriSpeech``.

    Everything is written to a temporary folder first and moved when complete, the split last, by a
    rename. Only plain files and folders below ``LibriSpeech`` are accepted. A second process that
    unpacks the split waits, and then finds it there.

    Args:
        archive: a tar file, gzipped.
        folder: gets the folder ``LibriSpeech``.
        split: the split that the archive must hold.
        noprogressbar: no progress bar.

    Raises:
        DownloadError: the archive is damaged, does not hold the split, or holds links, devices or
            paths that lead out of the folder. Nothing is left behind.
    """
    archive, folder = Path(archive), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    root, scratch = folder / "LibriSpeech", folder / f".unpack-{split}"
    with alone_with(folder / split):
        if (root / split).is_dir():
            return
        if scratch.exists():
            # Of a process that was killed.
            shutil.rmtree(scratch)
        scratch.mkdir()
        try:
            extract(archive, scratch, noprogressbar=noprogressbar)
            unpacked = scratch / "LibriSpeech"
            if not (unpacked / split).is_dir():
                raise DownloadError(f"{archive} holds no LibriSpeech/{split}")
            root.mkdir(exist_ok=True)
            for path in sorted(unpacked.iterdir(), key=lambda path: path.name == split):
                if not (root / path.name).exists():
                    os.rename(path, root / path.name)
        finally:
            shutil.rmtree(scratch)


def extract(archive: str | Path, folder: str | Path, *, noprogressbar: bool = False) -> None:
    """Unpack a gzipped tar file of plain files and folders into a folder of yours.

    Raises:
        DownloadError: the archive is damaged, or holds links, devices or paths that lead out of
            the folder. What came before stays in the folder.
    """
    archive, folder = Path(archive), Path(folder)
    try:
        with (
            # tarfile's own way to read gzip does not check what it unpacks.
            gzip.open(archive) as unzipped,
            tarfile.open(fileobj=unzipped, mode="r|") as tar,
            tqdm(desc=f"unpacking {archive.name}", unit=" files", disable=noprogressbar) as bar,
        ):
            for member in tar:
                path = PurePosixPath(member.name)
                inside = not path.is_absolute() and ".." not in path.parts
                # On Windows a backslash or a drive letter would lead out as well.
                inside = inside and "\\" not in member.name and ":" not in member.name
                if not inside or not (member.isfile() or member.isdir()):
                    raise DownloadError(
                        f"{archive} holds {member.name!r}, which is no plain file inside the"
                        " archive's folder: not unpacked"
                    )
                target = folder.joinpath(*path.parts)
                if member.isdir():
                    target.mkdir(parents=True, exist_ok=True)
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                with tar.extractfile(member) as source, open(target, "xb") as copy:
                    shutil.copyfileobj(source, copy, _BLOCK_BYTES)
                # A second preparation elsewhere then finds the same times as this one.
                os.utime(target, (member.mtime, member.mtime))
                bar.update()
            # The checksum is behind the end.
            while unzipped.read(_BLOCK_BYTES):
                pass
    except _DAMAGED as error:
        raise DownloadError(f"{archive} is damaged: {error}") from error


def _transfer_with_retries(url: str, part: Path, noprogressbar: bool) -> None:
    attempt, furthest = 0, _size_of(part)
    while attempt < _NUM_ATTEMPTS:
        attempt += 1
        try:
            _transfer(url, part, noprogressbar)
            return
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 429):
                message = f"{url}: the server says {error.code} {error.reason}"
                raise DownloadError(message) from error
            reason: Exception = error
        except _BROKEN_TRANSFER as error:
            reason = error
        # A server that cannot resume sends again what came before: that is no progress.
        if (size := _size_of(part)) > furthest:
            attempt, furthest = 0, size
        if attempt < _NUM_ATTEMPTS:
            logger.warning("%s broke off (%s): continuing", url, reason)
            time.sleep(_WAIT_S * 2 ** max(0, attempt - 1))
    raise DownloadError(
        f"{url} broke off {_NUM_ATTEMPTS} times without progress (last: {reason}); "
        f"{_size_of(part)} bytes are kept in {part}, the same command continues from there"
    )


def _size_of(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _transfer(url: str, part: Path, noprogressbar: bool) -> None:
    offset = _size_of(part)
    request = urllib.request.Request(url)
    if offset:
        request.add_header("Range", f"bytes={offset}-")
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code == 416 and offset:
            # Nothing lies beyond the part: it is whole, or longer than the file. The MD5 decides.
            return
        raise
    except OSError as error:
        raise ConnectionError(error) from error
    with response:
        begin = (response.headers.get("Content-Range") or "").removeprefix("bytes ").split("-")[0]
        if response.status != 206 or begin != str(offset):
            offset = 0  # the server does not resume and sends the whole file
        length = response.headers.get("Content-Length")
        total = offset + int(length) if length is not None else None
        received = offset
        with (
            open(part, "ab" if offset else "wb") as stream,
            tqdm(
                desc=part.name.removesuffix(".part"),
                initial=offset,
                total=total,
                unit="B",
                unit_scale=True,
                disable=noprogressbar,
            ) as bar,
        ):
            while block := _read(response):
                stream.write(block)
                received += len(block)
                bar.update(len(block))
        if total is not None and received < total:
            raise ConnectionError(f"{received} of {total} bytes arrived")


def _read(response: http.client.HTTPResponse) -> bytes:
    """The next block. No error of the network is taken for one of the disk, which stays."""
    try:
        return response.read(_BLOCK_BYTES)
    except OSError as error:
        raise ConnectionError(error) from error
