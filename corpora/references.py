"""Recordings with what is said in them: of a corpus in LibriSpeech's layout, or of a manifest."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from common.errors import UserError
from corpora.librispeech import find_data_root, find_splits, list_split, unread_suffixes
from corpora.manifest import DATA_ROOT, read_manifest


class Reference(NamedTuple):
    """An utterance: its id, its audio file, its words (which may be none), and its speaker."""

    id: str
    audio: str
    words: str
    speaker: str


@dataclass
class ReferenceSplit:
    """The utterances of a split.

    Attributes:
        name: of the split.
        references: those that can be scored.
        problems: by id or path, why others cannot.
    """

    name: str
    references: list[Reference] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)


def read_references(
    corpus: str | os.PathLike,
    splits: Sequence[str] = (),
    data_root: str | os.PathLike | None = None,
) -> list[ReferenceSplit]:
    """The splits of a corpus; audio is not opened.

    Args:
        corpus: folder in LibriSpeech's layout, or a manifest (.csv), which is one split.
        splits: names of those wanted, of a folder; by default all but those for training.
        data_root: what ``$data_root`` stands for in a manifest.

    Raises:
        UserError: there is no corpus, no such split, or a manifest that cannot be used.
    """
    path = Path(corpus)
    if path.is_dir():
        if data_root is not None:
            raise UserError(f"--data_root belongs to a manifest, and {path} is a folder.")
        return _read_folder(path, splits)
    if not path.is_file():
        raise UserError(
            f"No corpus: {path} does not exist. Give a folder in LibriSpeech's layout "
            "(<split>/<speaker>/<chapter>/), or a manifest (ID,duration,wav,spk_id,wrd)."
        )
    if splits:
        raise UserError(f"--split belongs to a folder; the manifest {path} is one split.")
    return [_read_table(path, data_root)]


def _read_folder(folder: Path, wanted: Sequence[str]) -> list[ReferenceSplit]:
    try:
        root = find_data_root(folder, wanted)
    except ValueError as error:
        raise UserError(f"{error}") from None
    found = find_splits(root)
    missing = [split for split in wanted if split not in found]
    if missing:
        raise UserError(f"{root} has no {', '.join(missing)}; its splits are {', '.join(found)}.")
    names = list(dict.fromkeys(wanted)) or [s for s in found if not s.startswith("train")]
    if not names:
        raise UserError(f"{root} has splits for training alone: choose with --split.")
    splits = []
    for name in names:
        listing = list_split(root, name)
        split = ReferenceSplit(name)
        for utterance in listing.utterances:
            split.references.append(
                Reference(
                    utterance.id, str(root / utterance.path), utterance.words, utterance.speaker
                )
            )
        for problem in listing.problems:
            split.problems[problem.utterance_id or problem.path] = problem.reason
        if not split.references:
            suffixes = ", ".join(unread_suffixes(root, name)) or "none"
            raise UserError(f"{root / name} holds no utterances (files of type: {suffixes}).")
        splits.append(split)
    return splits


def _read_table(path: Path, data_root: str | os.PathLike | None) -> ReferenceSplit:
    try:
        rows = read_manifest(path)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{path} cannot be used: {error}") from None
    if not rows:
        raise UserError(f"{path} has no utterances.")
    repeated = [name for name, count in Counter(row.ID for row in rows).items() if count > 1]
    if repeated:
        raise UserError(f"{path} has ids more than once: {', '.join(repeated[:8])}.")
    for row in rows:
        # Reports have a line for each, in columns.
        if len(row.ID.splitlines()) != 1 or "\t" in row.ID:
            raise UserError(f"{path} has the id {row.ID!r}; wanted one line without tabs.")
    split = ReferenceSplit(path.stem)
    for row in rows:
        if not row.wav.startswith(DATA_ROOT):
            # From the table's folder, unless it is absolute.
            audio = path.parent / row.wav
        elif data_root is not None:
            audio = Path(f"{data_root}{row.wav.removeprefix(DATA_ROOT)}")
        else:
            raise UserError(
                f"The audio of {path} is in {DATA_ROOT}: say with --data_root where that is."
            )
        split.references.append(Reference(row.ID, str(audio), row.wrd, row.spk_id))
    return split
