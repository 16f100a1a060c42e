"""Which recordings a command line means."""

import os
import sys
from pathlib import PurePath

import pytest

from inference.sources import find_sources, unique_stems


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("b.wav", "a.MP3", "notes.txt", "._a.wav", "sub/c.m4a", ".cache/d.wav", "x[1].ogg"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "in" / "nothing").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "in"


def found(*arguments):
    sources, problems = find_sources(arguments)
    return [source.name for source in sources], problems


def test_a_folder_is_searched_and_sorted_without_hidden_files(folder):
    expected = ["in/a.MP3", "in/b.wav", "in/sub/c.m4a", "in/x[1].ogg"]
    assert found("in") == (expected, [])
    sources, _ = find_sources(["in"])
    assert [source.stem for source in sources] == ["a", "b", "sub/c", "x[1]"]


def test_files_and_globs_keep_the_order_of_the_arguments(folder):
    assert found("in/b.wav", "in/*.[mM][pP]3", "in/x[1].ogg") == (
        ["in/b.wav", "in/a.MP3", "in/x[1].ogg"],
        [],
    )
    assert found("in/**/*.m4a") == (["in/sub/c.m4a"], [])
    # Any suffix is tried if the file is named.
    assert found("in/notes.txt") == (["in/notes.txt"], [])


def test_arguments_that_mean_nothing_are_told(folder):
    names, problems = found("in/nothing", "*.wav", "missing.wav", "", "missing/", "in/b.wav")
    assert names == ["missing.wav", "missing/", "in/b.wav"]
    assert problems == [
        "in/nothing: no audio in this folder",
        "*.wav: no file matches",
        "'': an empty name is no recording",
    ]


def test_a_place_without_a_name_has_results(folder):
    sources, _ = find_sources(["missing/.", "missing/.."])
    assert [source.stem for source in sources] == ["missing", "audio"]


def test_a_subfolder_that_cannot_be_read_is_told(folder, monkeypatch):
    scandir = os.scandir

    def refused(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    names, problems = found("in")
    assert "in/sub/c.m4a" not in names
    assert problems == ["in/sub: Permission denied"]


def test_results_never_share_a_name():
    paths = ["a.wav", "a.mp3", "b.wav", "sub/a.wav", "A.wav", "a.wav", "a.mp3-2"]
    stems = unique_stems([PurePath(path) for path in paths])
    assert stems[:4] == ["a.wav", "a.mp3", "b", "sub/a"]
    assert len({stem.casefold() for stem in stems}) == len(paths)


@pytest.mark.skipif(sys.platform != "linux", reason="names are any bytes on Linux alone")
def test_names_that_are_no_text_can_be_written(tmp_path):
    with open(os.fsencode(tmp_path) + b"/caf\xe9.wav", "wb"):
        pass
    ((source,), _) = find_sources([str(tmp_path)])
    assert os.fsencode(source.audio).endswith(b"caf\xe9.wav")
    assert source.title == "caf\ufffd"
    assert source.name.endswith("caf\ufffd.wav")
