"""A corpus as a table: CSV, TSV or JSON lines with a recording, its words and its speaker."""

import csv
import hashlib
import io
import itertools
import json
import logging
import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from common.files import file_digest
from common.record import PreparationRecord
from corpora.checking import (
    PreparationError,
    check_rate,
    check_utterances,
    default_num_workers,
    kinds_of_check,
    lines_of,
)
from corpora.librispeech import (
    HELD_OUT_SUFFIX,
    SAMPLE_RATE,
    TABLE_SUFFIXES,
    Problem,
    Utterance,
    printable,
    unusable_name,
    unusable_words,
)
from corpora.manifest import RECORD_NAME, merge_manifests, write_manifest

logger = logging.getLogger(__name__)

COLUMNS = {
    "path": ("path", "audio", "wav", "file", "filename", "file_name", "audio_filepath"),
    "text": ("text", "sentence", "transcript", "transcription", "words", "wrd"),
    "speaker": ("speaker", "speaker_id", "spk_id", "client_id"),
    "id": ("id", "ID", "utterance_id", "utt_id"),
    "split": ("split", "subset", "partition"),
}
"""What columns may be called; only path and text have to be there."""


@dataclass
class TableSplit:
    """The utterances of a table that belong to one split; paths are relative to its folder.

    Attributes:
        has_speakers: the table has a column of speakers; else each utterance is one.
    """

    name: str
    utterances: list[Utterance] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    has_speakers: bool = False


def find_table(folder: str | Path, split: str) -> Path | None:
    """The table ``<split>.csv``, ``.tsv`` or ``.jsonl`` in a folder, if there is one.

    The table of ``<split>-held-out`` is that of ``<split>``, unless it has one of its own.
    """
    if split.endswith(HELD_OUT_SUFFIX):
        return _table(folder, split) or _table(folder, split.removesuffix(HELD_OUT_SUFFIX))
    return _table(folder, split)


def _table(folder: str | Path, split: str) -> Path | None:
    paths = [Path(folder) / f"{split}{suffix}" for suffix in TABLE_SUFFIXES]
    return next((path for path in paths if path.is_file()), None)


def read_table(
    path: str | Path,
    split: str | None = None,
    audio_folder: str | Path | None = None,
    root: str | Path | None = None,
) -> list[TableSplit]:
    """The splits of a table; recordings are looked for, not opened.

    Args:
        path: the table.
        split: the one to read: the rows that the column of splits calls so, or all where it says
            nothing; by default every split of that column, else all under the file's name. For
            ``<split>-held-out`` the table of ``<split>`` is read as that one.
        audio_folder: what the paths are relative to, itself relative to ``root``; by default that
            folder.
        root: by default the table's folder.

    Raises:
        ValueError: it cannot be read, lacks a column, has none of the split, or has an id twice.
    """
    path = Path(path)
    root = path.parent if root is None else Path(root)
    splits: dict[str, TableSplit] = {}
    rows = _rows(path)
    columns = _column_names(path, dict.fromkeys(name for _, row in rows for name in row))
    filled = []
    for place, row in rows:
        values = {key: _first_filled(row, names) for key, names in columns.items()}
        if path.suffix.lower() != ".jsonl" and any("\n" in value for value in values.values()):
            raise ValueError(
                f"{path}, {place}: a cell has several lines. Is a quotation mark not closed?"
            )
        filled.append((place, values))
    numbers: Counter[str] = Counter()
    for place, values in _rows_of_split(path, split, filled) if split else filled:
        name = split or values.get("split") or path.stem
        part = splits.setdefault(name, TableSplit(name, has_speakers="speaker" in columns))
        audio = os.path.join(audio_folder or "", values["path"])
        key = values.get("id") or os.path.splitext(values["path"])[0].strip("./").replace("/", "-")
        key = unicodedata.normalize("NFC", key)
        if key:
            numbers[key] += 1
        # macOS writes accents apart from their letters, others do not.
        said = unicodedata.normalize("NFC", " ".join(values["text"].split()))
        size, reason = _size_of(root / audio)
        if not values["path"]:
            reason = "missing audio: the cell is empty"
        elif not said:
            reason = "missing transcript: the cell is empty"
        speaker = values.get("speaker") or key
        names = (key, audio, speaker)
        reason = next(filter(None, map(unusable_name, names)), unusable_words(said) or reason)
        if reason:
            shown = printable(audio) or place
            part.problems.append(Problem(shown, printable(key), reason, speaker))
            continue
        part.utterances.append(Utterance(key, speaker, audio, size, said))
    if repeated := [key for key, count in numbers.items() if count > 1]:
        hint = "" if "id" in columns else " Give them a column id."
        raise ValueError(f"{path} names utterances twice: {', '.join(repeated[:8])}.{hint}")
    if not splits:
        raise ValueError(f"{path} has no rows.")
    return list(splits.values())


def prepare_tables(
    tables: Mapping[str, str | Path],
    save_folder: str | Path,
    *,
    audio_folder: str | Path | None = None,
    root: str | Path | None = None,
    merge_lst: Sequence[str] = (),
    merge_name: str | None = None,
    sample_rate: int = SAMPLE_RATE,
    resample: bool = False,
    held_out_speakers: Sequence[str | int] = (),
    skip_bad: bool = False,
    verify: bool = False,
    num_workers: int | None = None,
    noprogressbar: bool = False,
) -> dict[str, int]:
    """Write ``<save_folder>/<split>.csv`` for every split, unless it is current.

    Audio stays where it is: ``$data_root`` in a manifest stands for ``root``.

    Args:
        tables: by split; with the key "" a table that names the splits itself.
        save_folder: gets the manifests; created if need be.
        audio_folder, root: see `read_table`.
        merge_lst: splits whose manifests are also written as one.
        merge_name: file name of that one.
        sample_rate, resample, verify: see `corpora.audio.check_audio`.
        held_out_speakers: speakers that the splits of ``merge_lst`` leave out, and that alone are
            in the split ``<split>-held-out`` of a table ``<split>``.
        skip_bad: leave unusable utterances out instead of failing.
        num_workers: threads that read audio.
        noprogressbar: no progress bar.

    Returns:
        The number of utterances by split.

    Raises:
        PreparationError: recordings or transcripts are missing, empty, unreadable or wrongly
            sampled.
        ValueError: see `read_table`; speakers that cannot be held out; or two tables have one
            split. No manifest is left for a split
            that could not be prepared.
    """
    check_rate(sample_rate)
    folder = Path(save_folder)
    parts: dict[str, tuple[Path, TableSplit]] = {}
    held_out = set(map(str, held_out_speakers))
    for name, table in tables.items():
        for part in read_table(table, name or None, audio_folder, root):
            if part.name in parts:
                raise ValueError(f"{parts[part.name][0]} and {table} both have {part.name}.")
            if unusable_name(part.name) or Path(part.name).name != part.name:
                raise ValueError(f"{table}: {part.name!r} cannot be the name of a split.")
            target = folder / f"{part.name}.csv"
            if target.resolve() == Path(table).resolve():
                raise ValueError(f"{target} is the table itself: choose another --save_folder.")
            parts[part.name] = Path(table), part
    # What a table's own name or column calls so is a split like others.
    new = {name for name, path in tables.items() if name == f"{Path(path).stem}{HELD_OUT_SUFFIX}"}
    _hold_out(parts, set(merge_lst), held_out, new)
    folder.mkdir(parents=True, exist_ok=True)
    record = PreparationRecord(folder, RECORD_NAME)
    options = [str(audio_folder or ""), sample_rate, resample, skip_bad]
    kinds = kinds_of_check(verify)
    counts, problems = {}, []
    made = {}
    with ThreadPoolExecutor(num_workers or default_num_workers()) as pool:
        for name, (table, part) in parts.items():
            data_root = table.parent if root is None else Path(root)
            made_from = {
                "table": file_digest(table),
                "audio": _digest_of(data_root, part.utterances),
                "options": [*options, kinds[0]],
                **({"held_out": sorted(held_out)} if held_out else {}),
            }
            if any(
                record.is_current(f"{name}.csv", made_from | {"options": [*options, kind]})
                for kind in kinds
            ):
                counts[name] = record.note(f"{name}.csv", "utterances")
                continue
            rows, bad = check_utterances(
                part.utterances,
                data_root,
                name,
                pool,
                sample_rate=sample_rate,
                resample=resample,
                verify=verify,
                noprogressbar=noprogressbar,
            )
            problems += [*part.problems, *bad]
            made[name] = rows, [*part.problems, *bad], made_from
    wrong = bool(problems) and not skip_bad
    for name, (rows, bad, _) in made.items():
        if wrong or not rows:
            record.remove(f"{name}.csv")
        if not rows and not wrong:
            raise ValueError(
                f"{parts[name][0]}: no utterance of {name} can be used:\n"
                + "\n".join(lines_of(bad))
            )
    if wrong:
        raise PreparationError(
            ", ".join(sorted({str(table) for table, _ in parts.values()})), problems
        )
    for name, (rows, bad, made_from) in made.items():
        write_manifest(folder / f"{name}.csv", rows)
        record.add(f"{name}.csv", made_from, utterances=len(rows), left_out=len(bad))
        counts[name] = len(rows)
        hours = sum(row.duration for row in rows) / 3600
        logger.info("%s: %d utterances, %.2f hours", f"{name}.csv", len(rows), hours)
        if bad:
            logger.warning("%s: %d unusable utterances were left out (skip_bad)", name, len(bad))
            for line in lines_of(bad):
                logger.warning("%s", line)
    if merge_name and list(merge_lst) != [Path(merge_name).stem]:
        merge_manifests([folder / f"{name}.csv" for name in merge_lst], folder / merge_name)
    return counts


def _hold_out(
    parts: dict[str, tuple[Path, TableSplit]],
    training: set[str],
    speakers: set[str],
    new: set[str],
) -> None:
    """Put the other speakers' utterances in the place of training splits, theirs in the new ones.

    Args:
        new: splits that are made of the held-out speakers in the table of another one.

    Raises:
        ValueError: a table does not say who speaks, or there are no such speakers, or no others.
    """
    found: set[str] = set()
    for name, (table, part) in parts.items():
        is_new = name in new
        if is_new and not speakers:
            raise ValueError(f"{name} needs held_out_speakers: there is no table of that name.")
        if not speakers or not (is_new or name in training):
            continue
        if not part.has_speakers:
            raise ValueError(
                f"held_out_speakers needs a column of speakers, and {table} has none. It may be "
                f"called {', '.join(COLUMNS['speaker'])}."
            )
        found |= {item.speaker for item in [*part.utterances, *part.problems]}
        kept = [u for u in part.utterances if (u.speaker in speakers) == is_new]
        if part.utterances and not kept:
            which = "none" if is_new else "every speaker"
            raise ValueError(f"held_out_speakers names {which} of {table}; {name} would be empty.")
        problems = [p for p in part.problems if (p.speaker in speakers) == is_new]
        parts[name] = table, replace(part, utterances=kept, problems=problems)
    missing = sorted(speakers - found)
    # What is scored alone may have some of the speakers that a training left out.
    if missing and (training or not found):
        raise ValueError(
            f"held_out_speakers names {', '.join(missing)}, no speaker of the training splits; "
            f"these have {', '.join(sorted(found)[:8])}{', ...' if len(found) > 8 else ''}. "
            "Name some of them, or none (--held_out_speakers '[]')."
        )


def _rows(path: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """Every row of a table, with where it stands."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8: convert it first.") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None
    if path.suffix.lower() == ".jsonl":
        return _json_rows(path, text)
    if path.suffix.lower() not in TABLE_SUFFIXES:
        raise ValueError(f"{path} is none of {', '.join(TABLE_SUFFIXES)}.")
    header = text.partition("\n")[0]
    # Spreadsheets of many countries separate by semicolons.
    delimiter = max("\t,;", key=header.count)
    reader = csv.DictReader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        # Tables with tabs have quotation marks as they are said.
        quoting=csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL,
        strict=True,
    )
    rows: list[tuple[str, Mapping[str, Any]]] = []
    try:
        known = itertools.chain(*COLUMNS.values())
        if twice := [name for name in known if (reader.fieldnames or []).count(name) > 1]:
            raise ValueError(f"{path} has two columns {twice[0]}: rename or remove one of them.")
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"{path}, line {reader.line_num}: not as many cells as columns.")
            rows.append((f"line {reader.line_num}", row))
    except csv.Error as error:
        line = reader.reader.line_num
        raise ValueError(f"{path}, line {line}: no row of a table ({error}).") from None
    return rows


def _json_rows(path: Path, text: str) -> list[tuple[str, Mapping[str, Any]]]:
    rows: list[tuple[str, Mapping[str, Any]]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: no object of JSON.")
        if row.get("offset"):
            raise ValueError(f"{path}, line {number}: has an offset; cut recordings apart first.")
        rows.append((f"line {number}", row))
    return rows


def _column_names(path: Path, columns: Collection[str]) -> dict[str, list[str]]:
    """What a table calls each column that it has: of several names the first that a row fills."""
    found = {key: [name for name in names if name in columns] for key, names in COLUMNS.items()}
    if missing := [key for key in ("path", "text") if columns and not found[key]]:
        known = "; ".join(f"{key}: {', '.join(COLUMNS[key])}" for key in missing)
        raise ValueError(
            f"{path} has the columns {', '.join(columns)}, and none for "
            f"{' and '.join(missing)}. It may be called ({known})."
        )
    return {key: names for key, names in found.items() if names}


def _first_filled(row: Mapping[str, Any], names: Iterable[str]) -> str:
    cells = (str(row[name]).strip() for name in names if row.get(name) is not None)
    return next(filter(None, cells), "")


def _rows_of_split(
    path: Path, split: str, rows: list[tuple[str, dict[str, str]]]
) -> list[tuple[str, dict[str, str]]]:
    """Those that belong to one split, where the table says which belong to which.

    Raises:
        ValueError: all belong to others.
    """
    if not any(values.get("split") for _, values in rows):
        return rows
    # Rows that say nothing are of the split that the table is called after.
    split_of = [values["split"] or path.stem for _, values in rows]
    found = dict.fromkeys(split_of)
    whole = split.removesuffix(HELD_OUT_SUFFIX)
    wanted = whole if path.stem == whole else split
    if wanted not in found:
        raise ValueError(
            f"{path}: its column of splits has {', '.join(found)}, and no {wanted}. Rename one of "
            "them or remove the column; or prepare every split of the table with "
            f"python -m corpora.prepare table {path}"
        )
    return [row for row, its_split in zip(rows, split_of, strict=True) if its_split == wanted]


def _size_of(path: Path) -> tuple[int, str | None]:
    """Size in bytes, or why there is none."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return -1, "missing audio: no such file"
    if not stat.S_ISREG(found.st_mode):
        return -1, "not a regular file"
    return found.st_size, None


def _digest_of(root: Path, utterances: Iterable[Utterance]) -> str:
    digest = hashlib.sha256()
    for utterance in utterances:
        time = (root / utterance.path).stat().st_mtime_ns
        digest.update(f"{utterance.path} {utterance.size_bytes} {time}\n".encode())
    return digest.hexdigest()
