import hashlib
import os

import pytest

from common.files import atomic_write, file_digest


def test_an_exception_leaves_the_old_file_and_no_temporary_one(tmp_path):
    target = tmp_path / "table.csv"
    target.write_text("old")

    def write_half() -> None:
        with atomic_write(target) as stream:
            stream.write("half of the n")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_half()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["table.csv"]


def test_the_file_is_not_there_before_it_is_whole(tmp_path):
    target = tmp_path / "table.csv"
    with atomic_write(target) as stream:
        stream.write("whole\n")
        assert not target.exists()
    assert target.read_bytes() == b"whole\n"


def test_the_file_gets_the_mode_of_an_ordinary_new_file(tmp_path):
    with atomic_write(tmp_path / "atomic") as stream:
        stream.write("x")
    (tmp_path / "plain").write_text("x")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_bytes_are_written_as_they_are(tmp_path):
    with atomic_write(tmp_path / "model", "wb") as stream:
        stream.write(b"\r\n\xff\x00")
    assert (tmp_path / "model").read_bytes() == b"\r\n\xff\x00"


def test_digest_of_a_file_longer_than_a_block(tmp_path):
    content = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(content)
    assert file_digest(tmp_path / "file", "md5") == hashlib.md5(content).hexdigest()
