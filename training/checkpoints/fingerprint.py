"""What a run's model was trained on: ``fingerprint.json``."""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import atomic_write, file_digest
from corpora.manifest import ManifestRow
from inference.scoring.reports import read_results

logger = logging.getLogger(__name__)

FINGERPRINT_FILE = "fingerprint.json"
VALIDATION_DATA = "validation data"

Described = dict[str, Any]
"""A thing that a run is made of: its ``sha256``, and what a person knows it by."""


def rows_digest(rows: Iterable[ManifestRow]) -> str:
    """Digest of what is said in which recordings, wherever they are and however they are listed."""
    lines = sorted(f"{row.ID}\t{row.duration:.2f}\t{row.wrd}\n" for row in rows)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def text_digest(text: str) -> str:
    """Digest of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def file_described(path: str | Path) -> Described:
    """A file and its digest."""
    return {"file": str(path), "sha256": file_digest(path)}


def read_fingerprint(folder: str | Path) -> dict[str, Described]:
    """What the folder's run is made of, by name; nothing where that was not recorded."""
    try:
        content = json.loads((Path(folder) / FINGERPRINT_FILE).read_text(encoding="utf-8"))
        return {name: part for name, part in content.items() if "sha256" in part}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def write_fingerprint(folder: str | Path, parts: Mapping[str, Described]) -> None:
    """Replace what is recorded."""
    with atomic_write(Path(folder) / FINGERPRINT_FILE) as stream:
        json.dump(parts, stream, indent=1, ensure_ascii=False)
        stream.write("\n")


def check_same(
    folder: str | Path, earlier: Mapping[str, Described], now: Mapping[str, Described]
) -> None:
    """Refuse to go on with other things than the checkpoints in ``folder`` were trained on.

    Args:
        now: those things that must be the same; what was not recorded is not compared.

    Raises:
        UserError: names both, and the ways out.
    """
    for name, part in now.items():
        recorded = earlier.get(name, part)
        if recorded["sha256"] != part["sha256"]:
            raise UserError(
                f"{folder} holds a run with the {name} {_named(recorded)}; now it is "
                f"{_named(part)}. Nothing was changed. Give the one that the run began with, or "
                f"another --output_folder; --init_from {folder} starts there from this run's "
                f"weights. Where you know that it should go on, delete {FINGERPRINT_FILE}."
            )


def check_seed_of_scores(folder: str | Path, seed: int) -> None:
    """Refuse to score a finished run as one of another seed.

    Raises:
        UserError: names both, and the ways out.
    """
    try:
        scored = (read_results(folder).get("run") or {}).get("seed", seed)
    except (OSError, ValueError):
        return
    if scored not in (None, seed):
        raise UserError(
            f"{folder} holds a finished run of seed {scored}; now it is {seed}, with which nothing "
            "would be trained and the scores be taken for those of another run. Give its own "
            "seed, or another --output_folder."
        )


def warn_of_other_validation(
    earlier: Mapping[str, Described], now: Mapping[str, Described]
) -> None:
    """Says so where the best checkpoints are chosen by figures of different data."""
    recorded, part = earlier.get(VALIDATION_DATA), now[VALIDATION_DATA]
    if recorded is not None and recorded["sha256"] != part["sha256"]:
        logger.warning(
            "The checkpoints of this run were validated on %s, those to come will be on %s: their "
            "figures cannot be compared, and the best are chosen among both.",
            *(_named(recorded), _named(part)),
        )


def _named(part: Described) -> str:
    described = [str(value) for key, value in part.items() if key != "sha256"]
    return f"{', '.join(described)} (sha256 {part['sha256'][:8]})"
