"""Downloads from a local server that misbehaves in chosen ways."""

import errno
import hashlib
import io
import re
import ssl
import subprocess
import sys
import tarfile
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from corpora import download
from corpora.download import DownloadError, download_split, fetch, unpack
from corpora.librispeech import OFFICIAL_NUM_UTTERANCES

REPOSITORY = Path(__file__).parents[2]
CONTENT = np.random.default_rng(0).bytes(700_000)
MD5 = hashlib.md5(CONTENT).hexdigest()


class Server:
    """Serves ``files``; ``cuts`` are numbers of bytes after which the next answers break off."""

    def __init__(self):
        self.files: dict[str, bytes] = {"/file": CONTENT}
        self.cuts: list[int] = []
        self.errors: list[int] = []
        self.resumes = True
        self.requests: list[str | None] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(handler):
                self._answer(handler)

            def log_message(handler, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        requested = handler.headers.get("Range")
        self.requests.append(requested)
        content = self.files.get(handler.path)
        if self.errors or content is None:
            handler.send_error(self.errors.pop(0) if self.errors else 404)
            return
        begin = 0
        if requested and self.resumes:
            begin = int(re.fullmatch(r"bytes=(\d+)-", requested)[1])
            if begin >= len(content):
                handler.send_error(416)
                return
            handler.send_response(206)
            handler.send_header("Content-Range", f"bytes {begin}-{len(content)}/{len(content)}")
        else:
            handler.send_response(200)
        body = content[begin:]
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[: self.cuts.pop(0)] if self.cuts else body)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(download, "_WAIT_S", 0)


def get(server: Server, target, md5: str = MD5):
    return fetch(f"{server.url}/file", target, md5, noprogressbar=True)


def archive(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


SPLIT_ARCHIVE = archive(
    {
        "LibriSpeech/README.TXT": b"readme",
        "LibriSpeech/dev-clean/1/2/1-2.trans.txt": b"1-2-0000 HELLO\n",
        "LibriSpeech/dev-clean/1/2/1-2-0000.flac": b"audio",
    }
)


def test_a_file_arrives_whole_and_leaves_no_part(server, tmp_path):
    assert get(server, tmp_path / "new" / "file").read_bytes() == CONTENT
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]


def test_a_broken_transfer_is_continued_where_it_broke(server, tmp_path):
    server.cuts = [300_000, 100_000]
    assert get(server, tmp_path / "file").read_bytes() == CONTENT
    assert server.requests == [None, "bytes=300000-", "bytes=400000-"]


@pytest.fixture
def two_attempts(monkeypatch):
    monkeypatch.setattr(download, "_NUM_ATTEMPTS", 2)


@pytest.mark.usefixtures("two_attempts")
def test_a_transfer_that_keeps_breaking_keeps_its_part_for_the_next_call(server, tmp_path):
    server.cuts = [200_000, 200_000, 0, 0]
    with pytest.raises(DownloadError, match=r"broke off 2 times .*400000 bytes are kept"):
        get(server, tmp_path / "file")
    assert not (tmp_path / "file").exists()
    assert get(server, tmp_path / "file").read_bytes() == CONTENT
    assert server.requests[-1] == "bytes=400000-"


@pytest.mark.usefixtures("two_attempts")
def test_a_transfer_that_makes_progress_goes_on(server, tmp_path):
    server.cuts = [100_000] * 6
    assert get(server, tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.usefixtures("two_attempts")
def test_the_same_bytes_again_are_no_progress(server, tmp_path):
    server.resumes = False
    server.cuts = [300_000] * 9
    with pytest.raises(DownloadError, match="broke off 2 times without progress"):
        get(server, tmp_path / "file")
    assert len(server.requests) == 3


class Broken:
    """A file whose method of this name fails the first time."""

    def __init__(self, file, method, error):
        self.file, self.method, self.error = file, method, error

    def __getattr__(self, name):
        return self.fail if name == self.method else getattr(self.file, name)

    def fail(self, *_):
        raise self.error

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


@pytest.mark.parametrize(
    "error", [OSError(errno.EHOSTUNREACH, "No route to host"), ssl.SSLError("bad record mac")]
)
def test_an_error_of_the_network_is_a_break(server, tmp_path, monkeypatch, error):
    urlopen, errors = urllib.request.urlopen, [error]

    def once(request, timeout):
        response = urlopen(request, timeout=timeout)
        return Broken(response, "read", errors.pop()) if errors else response

    monkeypatch.setattr(urllib.request, "urlopen", once)
    assert get(server, tmp_path / "file").read_bytes() == CONTENT
    assert len(server.requests) == 2


def test_a_full_disk_is_none(server, tmp_path, monkeypatch):
    server.files["/file"] = b"short"

    def full(*names):
        return Broken(open(*names), "write", OSError(errno.ENOSPC, "No space left"))

    monkeypatch.setattr(download, "open", full, raising=False)
    with pytest.raises(OSError, match="No space left"):
        get(server, tmp_path / "file")
    assert len(server.requests) == 1


def test_a_server_that_cannot_resume_sends_everything_again(server, tmp_path):
    server.resumes = False
    server.cuts = [300_000]
    assert get(server, tmp_path / "file").read_bytes() == CONTENT
    assert len(server.requests) == 2


def test_a_part_that_is_already_whole_is_taken(server, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT)
    assert get(server, tmp_path / "file").read_bytes() == CONTENT


def test_a_part_of_another_file_is_thrown_away_and_fetched_again(server, tmp_path):
    (tmp_path / "file.part").write_bytes(b"x" * 1000)
    assert get(server, tmp_path / "file").read_bytes() == CONTENT
    assert server.requests == ["bytes=1000-", None]


def test_a_wrong_checksum_is_an_error_and_leaves_nothing(server, tmp_path):
    with pytest.raises(DownloadError, match=f"MD5 {MD5} instead of {'0' * 32}"):
        get(server, tmp_path / "file", md5="0" * 32)
    assert list(tmp_path.iterdir()) == []


def test_a_busy_server_is_asked_again_and_a_missing_file_is_not(server, tmp_path):
    server.errors = [503, 500]
    assert get(server, tmp_path / "file").read_bytes() == CONTENT
    server.requests.clear()
    del server.files["/file"]
    with pytest.raises(DownloadError, match="404"):
        get(server, tmp_path / "other")
    assert len(server.requests) == 1


def test_a_file_that_is_there_is_checked_and_not_fetched(server, tmp_path):
    (tmp_path / "file").write_bytes(CONTENT)
    get(server, tmp_path / "file")
    (tmp_path / "file").write_bytes(b"something of the user's")
    with pytest.raises(DownloadError, match="delete it to fetch it again"):
        get(server, tmp_path / "file")
    assert server.requests == []
    assert (tmp_path / "file").read_bytes() == b"something of the user's"


def test_a_split_is_fetched_and_unpacked_once(server, tmp_path):
    server.files["/dev-clean.tar.gz"] = SPLIT_ARCHIVE
    md5 = hashlib.md5(SPLIT_ARCHIVE).hexdigest()
    for _ in range(2):
        folder = download_split(
            "dev-clean", tmp_path, base_url=server.url, md5=md5, noprogressbar=True
        )
    assert (folder / "1/2/1-2-0000.flac").read_bytes() == b"audio"
    assert (tmp_path / "LibriSpeech/README.TXT").read_bytes() == b"readme"
    assert len(server.requests) == 1
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"LibriSpeech", "dev-clean.tar.gz"}


def test_an_unknown_split_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"'dev-cleen'.*train-clean-100"):
        download_split("dev-cleen", tmp_path)


def linked(name: str, kind: bytes, target: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, target
        tar.addfile(member)
        file = tarfile.TarInfo(f"{name}/escaped")
        tar.addfile(file)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        archive({"LibriSpeech/dev-clean/a": b"", "../escaped": b"!"}),
        archive({"LibriSpeech/dev-clean/../../../escaped": b"!"}),
        archive({"/escaped": b"!"}),
        archive({"LibriSpeech\\..\\..\\escaped": b"!"}),
        linked("LibriSpeech/dev-clean", tarfile.SYMTYPE, "../.."),
        linked("LibriSpeech/dev-clean", tarfile.LNKTYPE, "../outside"),
        linked("LibriSpeech/dev-clean", tarfile.FIFOTYPE, ""),
    ],
    ids=["parent", "inner parent", "absolute", "backslash", "symlink", "hard link", "fifo"],
)
def test_an_archive_that_leads_out_of_its_folder_is_refused(tmp_path, content):
    (tmp_path / "a.tar.gz").write_bytes(content)
    with pytest.raises(DownloadError, match="no plain file inside"):
        unpack(tmp_path / "a.tar.gz", tmp_path / "to", "dev-clean", noprogressbar=True)
    assert {path.name for path in tmp_path.rglob("*")} == {"a.tar.gz", "to"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (SPLIT_ARCHIVE[: len(SPLIT_ARCHIVE) // 2], "damaged"),
        (b"not an archive", "damaged"),
        (archive({"LibriSpeech/test-clean/a": b""}), "holds no LibriSpeech/dev-clean"),
    ],
)
def test_a_damaged_or_foreign_archive_leaves_nothing(tmp_path, content, message):
    (tmp_path / "a.tar.gz").write_bytes(content)
    with pytest.raises(DownloadError, match=message):
        unpack(tmp_path / "a.tar.gz", tmp_path / "to", "dev-clean", noprogressbar=True)
    assert list((tmp_path / "to").iterdir()) == []


def test_what_a_killed_unpacking_left_is_removed(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(SPLIT_ARCHIVE)
    left = tmp_path / "to" / ".unpack-dev-clean" / "LibriSpeech"
    left.mkdir(parents=True)
    (left / "README.TXT").write_bytes(b"half of i")
    unpack(tmp_path / "a.tar.gz", tmp_path / "to", "dev-clean", noprogressbar=True)
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["LibriSpeech"]
    assert (tmp_path / "to/LibriSpeech/README.TXT").read_bytes() == b"readme"


def test_processes_that_unpack_one_split_do_not_disturb_each_other(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(SPLIT_ARCHIVE)
    code = (
        "import sys, time; from corpora import download\n"
        "whole = download.extract\n"
        "def slow(*names, **options):\n    time.sleep(0.3); whole(*names, **options)\n"
        "download.extract = slow\n"
        "download.unpack(*sys.argv[1:], 'dev-clean', noprogressbar=True)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.tar.gz"), str(tmp_path / "to")]
    processes = [subprocess.Popen(command, cwd=REPOSITORY) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["LibriSpeech"]


def test_processes_that_fetch_one_split_do_not_disturb_each_other(server, tmp_path):
    server.files["/dev-clean.tar.gz"] = SPLIT_ARCHIVE
    code = (
        "import sys, time; from corpora import download\n"
        "whole = download._transfer\n"
        "def slow(*names):\n    whole(*names); time.sleep(0.3)\n"
        "download._transfer = slow\n"
        "folder, url, md5 = sys.argv[1:]\n"
        "download.download_split("
        "'dev-clean', folder, base_url=url, md5=md5, noprogressbar=True)"
    )
    names = [str(tmp_path), server.url, hashlib.md5(SPLIT_ARCHIVE).hexdigest()]
    command = [sys.executable, "-c", code, *names]
    processes = [subprocess.Popen(command, cwd=REPOSITORY) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert server.requests == [None]
    assert {path.name for path in tmp_path.iterdir()} == {"LibriSpeech", "dev-clean.tar.gz"}


def test_a_flipped_bit_is_found(tmp_path):
    content = np.random.default_rng(1).bytes(20_000)
    whole = archive({"LibriSpeech/dev-clean/a": content})
    for place in range(200, len(whole), len(whole) // 20):
        damaged = bytearray(whole)
        damaged[place] ^= 4
        (tmp_path / "a.tar.gz").write_bytes(damaged)
        with pytest.raises(DownloadError, match="damaged"):
            unpack(tmp_path / "a.tar.gz", tmp_path / "to", "dev-clean", noprogressbar=True)
        assert list((tmp_path / "to").iterdir()) == []


def test_every_official_split_has_a_checksum_and_a_number_of_utterances():
    assert download.ARCHIVE_MD5.keys() == OFFICIAL_NUM_UTTERANCES.keys()
    assert sum(OFFICIAL_NUM_UTTERANCES.values()) == 292_367
