"""Where a result comes from: commit and versions."""

import importlib.metadata
import subprocess
from pathlib import Path

_REPOSITORY = Path(__file__).resolve().parents[1]


def git_commit() -> str | None:
    """The repository's commit, ``+dirty`` appended if tracked files differ; None outside git."""
    top, commit = _git("rev-parse", "--show-toplevel"), _git("rev-parse", "HEAD")
    # A copy without .git inside some other repository must not be given that one's commit.
    if not top or not commit or Path(top).resolve() != _REPOSITORY:
        return None
    return commit + ("+dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*arguments: str) -> str | None:
    try:
        answer = subprocess.run(
            ["git", "-C", str(_REPOSITORY), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def package_version(package: str) -> str | None:
    """Version of an installed distribution; None where it is not installed or does not tell."""
    try:
        return importlib.metadata.version(package)
    except (importlib.metadata.PackageNotFoundError, KeyError):
        return None
