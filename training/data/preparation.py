"""Manifests of a run, made without touching those that its model was trained on."""

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.errors import UserError
from corpora.librispeech import HELD_OUT_SUFFIX, find_data_root
from corpora.manifest import ManifestRow, merge_manifests, read_manifest
from corpora.table import find_table, prepare_tables
from librispeech_prepare import RECORD_NAME, prepare_librispeech


def train_manifest(hparams: Mapping[str, Any]) -> str:
    """Name of the manifest of all training splits; one of a split's own is not overwritten."""
    splits = {*hparams["train_splits"], *hparams["dev_splits"], *hparams["test_splits"]}
    name = "train"
    while name in splits and hparams["train_splits"] != [name]:
        name = f"all_{name}"
    return f"{name}.csv"


def make_lists_of_splits(hparams: dict, test_only: bool) -> None:
    """Make lists of splits that were given as one name.

    Raises:
        UserError: there is nothing to train or to validate on.
    """
    for key in ("train_splits", "dev_splits", "test_splits"):
        if isinstance(hparams[key], str):
            hparams[key] = [hparams[key]]
        if not hparams[key] and key != "test_splits" and not test_only:
            raise UserError(f"{key} is empty. Name at least one split, such as '[dev-clean]'.")


def prepare_manifests(hparams: Mapping[str, Any], folder: str | Path, test_only: bool) -> None:
    """Write the manifests that a run reads; of a test-only run, those of the test splits.

    Raises:
        UserError: see ``prepare_librispeech``.
    """
    train = [] if test_only else list(hparams["train_splits"])
    dev = [] if test_only else list(hparams["dev_splits"])
    # A split may be validated on and tested on: its manifest is one.
    test = [split for split in hparams["test_splits"] if split not in [*train, *dev]]
    merged = train_manifest(hparams) if train else None
    parts_a_split = train or any(split.endswith(HELD_OUT_SUFFIX) for split in test)
    options = {
        "merge_lst": train,
        "merge_name": merged,
        "held_out_speakers": hparams["held_out_speakers"] if parts_a_split else (),
        "sample_rate": hparams["sample_rate"],
        "resample": hparams["resample"],
        "skip_bad": hparams["skip_bad"],
        "noprogressbar": hparams.get("noprogressbar", False),
    }
    tables = tables_of(hparams["data_folder"], [*train, *dev, *test])
    try:
        if hparams["skip_prep"]:
            if merged:
                _merge_found([Path(folder) / f"{split}.csv" for split in train], folder, merged)
        elif tables:
            if Path(hparams["output_folder"]).resolve() == Path(hparams["data_folder"]).resolve():
                raise ValueError("The manifests would replace the tables: give an --output_folder.")
            prepare_tables(tables, folder, **options)
        else:
            prepare_librispeech(
                hparams["data_folder"],
                folder,
                tr_splits=train,
                dev_splits=dev,
                te_splits=test,
                **options,
            )
    except ValueError as error:
        raise UserError(str(error)) from error


def _merge_found(parts: Sequence[Path], folder: str | Path, merged: str) -> None:
    """Makes the manifest of all training splits from theirs, where they were made elsewhere.

    Raises:
        ValueError: there is a manifest of that name which holds something else.
    """
    whole = Path(folder) / merged
    if whole in parts or not all(path.is_file() for path in parts):
        return
    if not whole.is_file():
        merge_manifests(parts, whole)
        return
    found, wanted = set(read_manifest(whole)), {row for p in parts for row in read_manifest(p)}
    if found != wanted:
        raise ValueError(
            f"{whole} ({len(found)} utterances) is not what "
            f"{' and '.join(path.name for path in parts)} "
            f"{'hold' if len(parts) > 1 else 'holds'} ({len(wanted)}). Delete it, and it is made "
            f"from them; or train on it as it is with --train_splits '[{whole.stem}]'."
        )


def tables_of(data_folder: str | Path, splits: Iterable[str]) -> dict[str, Path]:
    """The table of every split where the corpus is tables, else nothing."""
    tables = {}
    for split in splits:
        table = find_table(data_folder, split)
        # Manifests of other recipes may lie beside the folders of LibriSpeech's layout.
        if table is None or (Path(data_folder) / split).is_dir():
            return {}
        tables[split] = table
    return tables


def audio_root(hparams: Mapping[str, Any], splits: Sequence[str]) -> Path:
    """What ``$data_root`` in the manifests of these splits stands for.

    Raises:
        UserError: there is no such corpus.
    """
    folder = hparams["data_folder"]
    if tables_of(folder, splits):
        return Path(folder)
    try:
        return find_data_root(folder, splits)
    except ValueError as error:
        if hparams["skip_prep"] and Path(folder).is_dir():
            # Manifests made elsewhere.
            return Path(folder)
        raise UserError(str(error)) from None


@contextmanager
def beside(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """A folder that holds these manifests of the run's, until the end of the block."""
    place = folder if os.access(folder, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix=".manifests.", dir=place) as scratch:
        for name in (*names, RECORD_NAME):
            if (folder / name).is_file():
                shutil.copy2(folder / name, scratch)
        yield Path(scratch)


def move_manifests(scratch: Path, folder: Path) -> None:
    """Put what was made beside in its place; the record of it comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(scratch.iterdir(), key=lambda path: path.name == RECORD_NAME):
        shutil.move(path, folder / path.name)


def manifest_rows(path: Path) -> list[ManifestRow]:
    """Rows of a manifest.

    Raises:
        UserError: no such file, not a manifest, no rows, or an id that is there twice.
    """
    if not path.is_file():
        raise UserError(f"No manifest {path}. Run without --skip_prep to make it.")
    try:
        rows = read_manifest(path)
    except ValueError as error:
        raise UserError(str(error)) from None
    if not rows:
        raise UserError(f"{path} has no utterances.")
    check_distinct([(path.name, [row.ID for row in rows])])
    return rows


def check_distinct(named_ids: Iterable[tuple[str, Iterable[str]]]) -> None:
    """Refuse ids that come twice: a dataset would keep one of their recordings.

    Args:
        named_ids: ids, and what holds them.

    Raises:
        UserError: names the first ids and where they are.
    """
    first: dict[str, str] = {}
    twice = []
    for name, ids in named_ids:
        for key in ids:
            if key in first:
                twice.append((key, first[key], name))
            first.setdefault(key, name)
    if twice:
        shown = "; ".join(f"{key} in {one} and {other}" for key, one, other in twice[:5])
        more = f"; and {len(twice) - 5} more" if len(twice) > 5 else ""
        raise UserError(
            f"{len(twice)} utterance ids come more than once: {shown}{more}. An id names one "
            "recording: rename them, or leave one of the two out."
        )
