"""The CSV manifests that SpeechBrain's datasets read: ``ID,duration,wav,spk_id,wrd``."""

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from common.files import atomic_write, why_unreadable

RECORD_NAME = "librispeech_prepare.json"
"""Beside manifests: what each was made from."""

# A transcript may be longer than the reader's default of 131,072 characters.
csv.field_size_limit(2**31 - 1)

DATA_ROOT = "$data_root"
"""Begins every audio path that is not absolute; who reads the manifest puts in the folder."""


class ManifestRow(NamedTuple):
    """One utterance. ``wav`` begins with `DATA_ROOT` or is absolute; ``duration`` is in seconds."""

    ID: str
    duration: float
    wav: str
    spk_id: str
    wrd: str


def write_manifest(path: str | Path, rows: Iterable[ManifestRow]) -> None:
    """Write a manifest, whole or not at all."""
    with atomic_write(path) as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(ManifestRow._fields)
        writer.writerows(rows)


def read_manifest(path: str | Path) -> list[ManifestRow]:
    """Read a manifest back, `DATA_ROOT` unreplaced.

    Raises:
        ValueError: the file cannot be read, has other columns, or a row that does not fit them.
    """
    if reason := why_unreadable(path):
        raise ValueError(f"{path} is no manifest: {reason}")
    rows = []
    with open(path, encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream)
        try:
            header = next(reader, [])
            if tuple(header) != ManifestRow._fields:
                raise ValueError(
                    f"it has the columns {header}, not {list(ManifestRow._fields)}; "
                    "python -m corpora.prepare table makes manifests of tables"
                )
            for cells in reader:
                if not cells:
                    continue
                identifier, duration, wav, spk_id, wrd = cells
                seconds = float(duration)
                if not 0 <= seconds < math.inf:
                    raise ValueError(f"{duration} is no duration in seconds")
                rows.append(ManifestRow(identifier, seconds, wav, spk_id, wrd))
        except (ValueError, csv.Error) as error:
            raise ValueError(
                f"{path}, line {reader.line_num}: not a manifest row ({error})"
            ) from error
    return rows


def merge_manifests(sources: Sequence[str | Path], target: str | Path) -> int:
    """Write the rows of several manifests into one, in the order given.

    Returns:
        The number of rows.

    Raises:
        ValueError: two sources hold the same utterance id, which a dataset cannot hold twice.
    """
    rows: dict[str, ManifestRow] = {}
    for source in sources:
        for row in read_manifest(source):
            if row.ID in rows:
                raise ValueError(
                    f"cannot merge into {Path(target).name}: utterance {row.ID} is both"
                    f" {rows[row.ID].wav} and {row.wav}"
                )
            rows[row.ID] = row
    write_manifest(target, rows.values())
    return len(rows)
