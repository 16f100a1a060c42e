import hashlib
import os

import pytest

from common.errors import UserError, in_words
from common.files import (
    atomic_folder,
    atomic_write,
    file_digest,
    require_file,
    require_folder,
    require_place,
)


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


def test_a_folder_is_not_there_before_it_is_whole(tmp_path):
    target = tmp_path / "corpus"

    def fill(fails):
        with atomic_folder(target) as scratch:
            (scratch / "file").write_text("whole")
            assert not target.exists()
            if fails:
                raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        fill(fails=True)
    assert os.listdir(tmp_path) == []
    fill(fails=False)
    assert os.listdir(tmp_path) == ["corpus"]
    assert (target / "file").read_text() == "whole"
    assert target.stat().st_mode & 0o777 == 0o755


def test_digest_of_a_file_longer_than_a_block(tmp_path):
    content = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(content)
    assert file_digest(tmp_path / "file", "md5") == hashlib.md5(content).hexdigest()


def refused(require, path):
    """What is said of a path."""
    with pytest.raises(UserError) as error:
        require("kenlm_model_path", path, "Give another one.")
    message = str(error.value)
    assert message.startswith(f"kenlm_model_path {path}: ")
    assert message.endswith(". Give another one.")
    assert "Errno" not in message
    return message.removeprefix(f"kenlm_model_path {path}: ").removesuffix(". Give another one.")


def test_a_path_that_is_no_file_is_named_with_its_key(tmp_path):
    (tmp_path / "whole").write_text("text")
    require_file("key", tmp_path / "whole", "")
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    assert refused(require_file, tmp_path / "gone") == "there is no such file"
    assert refused(require_file, tmp_path / "dangling") == "there is no such file"
    assert refused(require_file, tmp_path) == "it is a folder, not a file"
    assert refused(require_file, tmp_path / "empty") == "it is empty"
    assert refused(require_file, tmp_path / "pipe") == "it is no regular file"
    assert refused(require_file, tmp_path / "whole" / "x").startswith(
        "it cannot be read (Not a dir"
    )
    assert refused(require_file, "nul\0l") == "it cannot be read (embedded null byte)"


def test_a_path_that_is_no_folder_is_named_with_its_key(tmp_path):
    require_folder("key", tmp_path, "")
    (tmp_path / "file").write_text("text")
    assert refused(require_folder, tmp_path / "gone") == "there is no such folder"
    assert refused(require_folder, tmp_path / "file") == "it is a file, not a folder"
    assert refused(require_folder, tmp_path / "file" / "x") == "there is no such folder"


def test_what_may_not_be_read_is_named_with_its_key(tmp_path, monkeypatch):
    def forbidden(path, *arguments):
        raise PermissionError(13, "Permission denied", path)

    (tmp_path / "file").write_text("text")
    monkeypatch.setattr("builtins.open", forbidden)
    monkeypatch.setattr("os.listdir", forbidden)
    assert refused(require_file, tmp_path / "file") == "it cannot be read (Permission denied)"
    assert refused(require_folder, tmp_path) == "it cannot be read (Permission denied)"


def test_a_folder_to_write_in_is_there_or_can_be_made(tmp_path, monkeypatch):
    require_place("output_folder", tmp_path)
    require_place("output_folder", tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    for path, reason in (("file", "is a file, not a folder"), ("dangling", "leads nowhere")):
        message = (
            f"output_folder {tmp_path / path}/x: {tmp_path / path} {reason}. Give another one."
        )
        with pytest.raises(UserError, match=f"^{message}$"):
            require_place("output_folder", tmp_path / path / "x")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(UserError, match=f"x: {tmp_path} cannot be written. Give another one"):
        require_place("output_folder", tmp_path / "x")


def test_an_error_of_the_system_is_said_in_words(tmp_path):
    with pytest.raises(OSError) as error:
        (tmp_path / "gone").read_text()
    assert in_words(error.value) == f"{tmp_path / 'gone'}: No such file or directory"
    assert in_words(ValueError("as it is")) == "as it is"
    assert in_words(OSError("without a number")) == "without a number"
