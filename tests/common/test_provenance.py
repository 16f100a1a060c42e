"""Which commit a result belongs to."""

import shutil
import subprocess

import pytest

from common import provenance


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of one commit that stands in for ours."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "file.py").write_text("x = 1\n")
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "-c", "user.name=x", "-c", "user.email=x@localhost", "commit", "-q", "-m", "x")
    monkeypatch.setattr(provenance, "_REPOSITORY", folder.resolve())
    return folder


def git(folder, *arguments):
    subprocess.run(["git", "-C", str(folder), *arguments], check=True)


def test_commit_says_whether_tracked_files_differ(repository):
    (repository / "notes.txt").write_text("not tracked\n")
    clean = provenance.git_commit()
    assert len(clean) == 40
    (repository / "file.py").write_text("x = 2\n")
    assert provenance.git_commit() == f"{clean}+dirty"


def test_a_copy_inside_another_repository_is_not_given_that_ones_commit(repository, monkeypatch):
    copy = repository / "copy"
    copy.mkdir()
    monkeypatch.setattr(provenance, "_REPOSITORY", copy.resolve())
    assert provenance.git_commit() is None


def test_no_commit_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert provenance.git_commit() is None


def test_a_package_without_metadata_has_no_version(monkeypatch):
    assert provenance.package_version("no-such-package-anywhere") is None
    monkeypatch.setattr("importlib.metadata.distribution", lambda name: {}[name])
    assert provenance.package_version("torch") is None
