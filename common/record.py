"""What prepared files were made from, so that a later run can tell whether they still stand."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.files import atomic_write, file_digest

_FORMAT = 1


class PreparationRecord:
    """Remembers, for each file of a folder, its digest and what it was made from.

    A file that exists proves nothing: it may stem from other data or other options, or be cut
    short. It is current if it still has the digest it was written with, and would be made from the
    same things today.

    Args:
        folder: where the files and this record are.
        name: the record's file name.
    """

    def __init__(self, folder: str | Path, name: str):
        self.folder = Path(folder)
        self.path = self.folder / name
        self._entries: dict[str, dict[str, Any]] = {}
        # A missing, damaged or foreign record only means that everything is made again.
        with suppress(OSError, ValueError, AttributeError, KeyError):
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content.get("format") == _FORMAT:
                self._entries = {
                    name: entry for name, entry in content["files"].items() if _is_entry(entry)
                }

    def is_current(self, name: str, made_from: dict[str, Any]) -> bool:
        """Whether the file is whole and was made from exactly this (JSON values)."""
        entry = self._entries.get(name)
        if entry is None or entry["made_from"] != made_from:
            return False
        try:
            return file_digest(self.folder / name) == entry["sha256"]
        except OSError:
            return False

    def note(self, name: str, key: str, default: Any = None) -> Any:
        """A note that was added with the file, or ``default``."""
        return self._entries.get(name, {}).get("notes", {}).get(key, default)

    def digest(self, name: str) -> str:
        """The digest that the file was recorded with."""
        return self._entries[name]["sha256"]

    def add(self, name: str, made_from: dict[str, Any], **notes: Any) -> None:
        """Record a file that has just been written, and save the record."""
        self._entries[name] = {
            "made_from": made_from,
            "sha256": file_digest(self.folder / name),
            "notes": notes,
        }
        self._save()

    def remove(self, name: str) -> None:
        """Delete a file and forget it."""
        (self.folder / name).unlink(missing_ok=True)
        if self._entries.pop(name, None) is not None:
            self._save()

    def _save(self) -> None:
        with atomic_write(self.path) as stream:
            json.dump({"format": _FORMAT, "files": self._entries}, stream, indent=1, sort_keys=True)
            stream.write("\n")


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("made_from"), dict)
        and isinstance(entry.get("sha256"), str)
        and isinstance(entry.get("notes"), dict)
    )
