"""Which recordings a command line means, and what their results are called."""

import glob
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import IO

from corpora.audio import AUDIO_SUFFIXES
from inference.audio import MEDIA_SUFFIXES

STANDARD_INPUT = "-"
SUFFIXES = AUDIO_SUFFIXES | MEDIA_SUFFIXES | {".aifc", ".caf", ".mp2", ".rf64", ".snd", ".voc"}
"""Of files that a folder is searched for, in small letters."""


@dataclass(frozen=True)
class Source:
    """A recording.

    Attributes:
        audio: path, or standard input.
        name: its path, for people and texts.
        stem: unique relative path, without a suffix, for files that are made of it.
    """

    audio: str | IO[bytes]
    name: str
    stem: str

    @property
    def title(self) -> str:
        """The stem, for people and texts."""
        return _printable(self.stem)


def find_sources(arguments: Sequence[str]) -> tuple[list[Source], list[str]]:
    """The recordings that are meant, in order, and what is wrong with arguments that mean none.

    Args:
        arguments: files, folders (searched for audio, whose results keep their subfolders), globs,
            or ``-`` for standard input.
    """
    found: list[tuple[str | IO[bytes], PurePath]] = []
    problems = []
    for argument in arguments:
        if argument == STANDARD_INPUT:
            if sys.stdin is None:
                problems.append("-: standard input is closed")
                continue
            found.append((sys.stdin.buffer, PurePath("stdin")))
            continue
        if not argument:
            problems.append("'': an empty name is no recording")
            continue
        paths = [argument]
        if not os.path.lexists(argument) and glob.has_magic(argument):
            paths = sorted(glob.glob(argument, recursive=True))
            if not paths:
                problems.append(f"{_printable(argument)}: no file matches")
        for path in paths:
            if not os.path.isdir(path):
                # Of a folder that is not there, nothing follows the last slash.
                name = os.path.basename(os.path.normpath(path))
                found.append((path, PurePath("audio" if name in ("", ".", "..") else name)))
                continue
            below = sorted(_recordings_below(path, problems))
            found += [(os.path.join(path, name), PurePath(name)) for name in below]
            if not below:
                problems.append(f"{_printable(path)}: no audio in this folder")
    stems = unique_stems([relative for _, relative in found])
    sources = [
        Source(audio, _printable(audio if isinstance(audio, str) else "<stdin>"), stem)
        for (audio, _), stem in zip(found, stems, strict=True)
    ]
    return sources, problems


def unique_stems(paths: Sequence[PurePath]) -> list[str]:
    """Paths without their suffixes; with them or with a number where two would be the same."""
    plain = [str(path.with_suffix("")) for path in paths]
    counts = Counter(stem.casefold() for stem in plain)
    stems: list[str] = []
    used: set[str] = set()
    for path, stem in zip(paths, plain, strict=True):
        whole = stem if counts[stem.casefold()] == 1 else str(path)
        number, unique = 1, whole
        while unique.casefold() in used:
            number += 1
            unique = f"{whole}-{number}"
        used.add(unique.casefold())
        stems.append(unique)
    return stems


def _recordings_below(folder: str, problems: list[str]) -> Iterator[str]:
    """Relative paths of the audio files in a folder and its subfolders, hidden ones left out.

    Args:
        problems: gets the subfolders that cannot be read.
    """

    def cannot_read(error: OSError) -> None:
        problems.append(f"{_printable(error.filename)}: {error.strerror}")

    for parent, folders, files in os.walk(folder, onerror=cannot_read):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
                yield os.path.relpath(os.path.join(parent, name), folder)


def _printable(path: str) -> str:
    """A path whose bytes are no UTF-8 can be opened, but not be written into a text."""
    return os.fsencode(path).decode("utf-8", "replace")
