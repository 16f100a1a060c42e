"""The numbers a training run produces on its way, one JSON object per line."""

import json
import logging
import math
import os
from pathlib import Path

from common.files import atomic_write

logger = logging.getLogger(__name__)


class MetricsLog:
    """Append-only ``metrics.jsonl``, safe against a process that is killed while it writes.

    Each line is ``{"step": optimiser steps, ...}`` with whatever else was measured there:
    ``epoch``, ``train_loss``, ``lr``, ``grad_norm`` and, of the steps since the line before,
    ``data_s``, ``forward_s``, ``backward_s`` and ``optimizer_s`` during an epoch (on a GPU also
    ``memory_gib`` and ``gpu_use_percent``), ``valid_loss``, ``wer`` and ``cer`` (both percent) and
    ``search_s`` after one. A value that is not finite is stored as null.

    Args:
        path: the file; it is created by the first :meth:`append`.

    Example:
        >>> import tempfile
        >>> log = MetricsLog(Path(tempfile.mkdtemp(), "metrics.jsonl"))
        >>> log.append(step=10, epoch=1, train_loss=3.5, lr=1e-3)
        >>> log.append(step=20, epoch=1, train_loss=2.5, lr=2e-3)
        >>> log.truncate_after(10)
        >>> log.read()
        [{'step': 10, 'epoch': 1, 'train_loss': 3.5, 'lr': 0.001}]
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)

    def append(self, *, step: int, **values: object) -> None:
        """Write one line and flush it.

        Args:
            step: optimiser steps taken since the start of training.
            **values: numbers (one-element tensors too) or strings.
        """
        entry = {"step": int(step)} | {name: _plain(value) for name, value in values.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab+") as file:
            _drop_unfinished_line(file)
            file.write(_line(entry).encode())

    def read(self) -> list[dict]:
        """All entries in the order they were written; none if there is no file.

        A last line that was cut off is left out silently, any other damaged line with a warning.
        """
        if not self.path.exists():
            return []
        *lines, _unfinished = self.path.read_bytes().split(b"\n")
        entries = [entry for entry in map(_parse, lines) if entry is not None]
        if len(entries) < len(lines):
            logger.warning("%s: %d unreadable lines left out", self.path, len(lines) - len(entries))
        return entries

    def truncate_after(self, step: int, ended_epochs: int | None = None) -> None:
        """Forget what was logged later than ``step``.

        A run that resumes from the checkpoint of ``step`` will log the following steps again.

        Args:
            ended_epochs: those that the checkpoint has ended; others are validated again, which may
                be at ``step``.
        """
        entries = self.read()
        kept = [
            entry
            for entry in entries
            if entry["step"] <= step
            and not (
                ended_epochs is not None
                and "valid_loss" in entry
                and entry.get("epoch", 0) > ended_epochs
            )
        ]
        if len(kept) == len(entries):
            return
        with atomic_write(self.path) as file:
            file.writelines(map(_line, kept))


def _line(entry: dict) -> str:
    return json.dumps(entry, allow_nan=False, ensure_ascii=False) + "\n"


def _plain(value: object) -> object:
    if value is None or isinstance(value, str | bool | int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def _parse(line: bytes) -> dict | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else None


def _drop_unfinished_line(file) -> None:
    """Cut ``file``, open for reading and appending, behind its last line break."""
    size = end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 4096)
        file.seek(start)
        line_break = file.read(end - start).rfind(b"\n")
        if line_break >= 0:
            end = start + line_break + 1
            break
        end = start
    if end < size:
        file.truncate(end)
