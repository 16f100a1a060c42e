"""Raw LibriSpeech, or any corpus in its layout, to manifests ``<split>.csv``.

    python librispeech_prepare.py --data_folder LibriSpeech --save_folder results/manifests \\
        --tr_splits train-clean-100 --dev_splits dev-clean --te_splits test-clean test-other

A manifest has the columns ``ID,duration,wav,spk_id,wrd``. Its audio paths begin with
``$data_root``, which stands for the folder that holds the splits (`find_data_root`), so corpus and
manifest can be moved. Manifests appear only when complete; a second run finds them current and
does nothing.
"""

import argparse
import logging
import os
import sys
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import in_words
from common.files import file_digest, require_file
from common.record import PreparationRecord
from corpora import download, lexicon
from corpora.audio import AUDIO_SUFFIXES
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
    OFFICIAL_NUM_UTTERANCES,
    SAMPLE_RATE,
    Problem,
    SplitListing,
    Utterance,
    find_data_root,
    find_splits,
    hold_out,
    list_split,
    unread_suffixes,
)
from corpora.manifest import RECORD_NAME, ManifestRow, merge_manifests, write_manifest

__all__ = ["PreparationError", "find_data_root", "prepare_librispeech"]

logger = logging.getLogger(__name__)

LEXICON_NAME = "librispeech-lexicon.txt"


def prepare_librispeech(
    data_folder: str | Path,
    save_folder: str | Path,
    tr_splits: Sequence[str] = (),
    dev_splits: Sequence[str] = (),
    te_splits: Sequence[str] = (),
    select_n_sentences: Sequence[int] | int | None = None,
    merge_lst: Sequence[str] = (),
    merge_name: str | None = None,
    create_lexicon: bool = False,
    skip_prep: bool = False,
    *,
    held_out_speakers: Sequence[str] = (),
    sample_rate: int = SAMPLE_RATE,
    resample: bool = False,
    skip_bad: bool = False,
    verify: bool = False,
    num_workers: int | None = None,
    lexicon_file: str | Path | None = None,
    seed: int = 1234,
    noprogressbar: bool = False,
) -> None:
    """Write ``<save_folder>/<split>.csv`` for every split, unless it is current.

    A manifest is current if the split's file names, sizes, times and transcripts, the options and
    the manifest's own digest are those of the run that wrote it.

    Args:
        data_folder: the folder that holds the splits, or the one above its ``LibriSpeech``.
        save_folder: gets the manifests; created if need be.
        tr_splits: names of the training splits.
        dev_splits: names of the validation splits.
        te_splits: names of the test splits.
        select_n_sentences: keep only the first so many utterances of each split; one number for
            all, or one for each in the order training, validation, test.
        merge_lst: splits, of those above, whose manifests are also written as one.
        merge_name: file name of the merged manifest.
        create_lexicon: also write ``lexicon.csv`` and its parts ``lexicon_{tr,dev,test}.csv``.
        skip_prep: do nothing at all.
        held_out_speakers: speakers of the training splits that these leave out. Validated or
            tested on they are as the split ``<training split>-held-out``.
        sample_rate: of the recordings, in Hz.
        resample: recordings of other rates are taken as well; training resamples them.
        skip_bad: leave unusable utterances out instead of failing.
        verify: decode every file whole, which also finds audio cut short, instead of reading
            headers only.
        num_workers: threads that read audio; by default four per core, at most 16.
        lexicon_file: lines ``WORD PH1 PH2 ...``; by default ``librispeech-lexicon.txt`` in
            ``save_folder`` or beside the splits, and else the official one, downloaded.
        seed: decides which words of the lexicon fall into which part.
        noprogressbar: no progress bar.

    Raises:
        PreparationError: audio or transcripts are missing, empty, unreadable or wrongly sampled.
        ValueError: no LibriSpeech in ``data_folder``, a split or a held-out speaker is missing, or
            options contradict each other. No manifest is left for a split that could not be
            prepared.
    """
    if skip_prep:
        return
    limits = _split_limits(tr_splits, dev_splits, te_splits, select_n_sentences)
    merge_lst, merge_name = _merge_options(merge_lst, merge_name, limits)
    if num_workers is None:
        num_workers = default_num_workers()
    if num_workers < 1:
        raise ValueError(f"num_workers is {num_workers}; at least one thread must read")
    check_rate(sample_rate)
    parted = _parted(limits, tr_splits) if held_out_speakers else set()
    folders = list(dict.fromkeys(_folder_of(split, parted) for split in limits))
    data_root = find_data_root(data_folder, folders)
    _require_splits(data_root, folders)

    save_folder = Path(save_folder)
    save_folder.mkdir(parents=True, exist_ok=True)
    record = PreparationRecord(save_folder, RECORD_NAME)
    rates: dict[str, Any] = {"resample": True} if resample else {}
    if sample_rate != SAMPLE_RATE:
        rates["sample_rate"] = sample_rate
    with ThreadPoolExecutor(num_workers) as pool:
        listings = {folder: list_split(data_root, folder, pool.map) for folder in folders}
        if held_out_speakers:
            _hold_out(listings, parted, set(map(str, held_out_speakers)), tr_splits)
        plans = [
            _plan(record, listings[split], limit, skip_bad, verify, rates)
            for split, limit in limits.items()
        ]
        stale = [plan for plan in plans if not plan.is_current]
        problems: list[Problem] = []
        for plan in stale:
            utterances, found = plan.listing.utterances, plan.listing.problems
            if not skip_bad:
                utterances, found = _first(plan.listing, plan.limit)
            plan.rows, bad = check_utterances(
                utterances,
                data_root,
                plan.listing.split,
                pool,
                sample_rate=sample_rate,
                resample=resample,
                verify=verify,
                noprogressbar=noprogressbar,
            )
            plan.problems = [*found, *bad]
            problems += plan.problems
    try:
        if problems and not skip_bad:
            raise PreparationError(data_root, problems)
        for plan in stale:
            _require_rows(plan, data_root)
    except ValueError:
        for name in [plan.name for plan in stale] + ([merge_name] if merge_name else []):
            record.remove(name)
        raise
    for plan in stale:
        _write_split(plan, record)
    for plan in plans:
        _report(plan, record)
    if merge_name:
        _merge(record, merge_lst, merge_name)
    if create_lexicon:
        _prepare_lexicon(record, data_root, lexicon_file, seed, noprogressbar)


@dataclass
class _Plan:
    """One split on its way to a manifest."""

    listing: SplitListing
    limit: int | None
    made_from: dict[str, Any]
    is_current: bool
    rows: list[ManifestRow] | None = None
    problems: list[Problem] | None = None

    @property
    def name(self) -> str:
        return f"{self.listing.split}.csv"


def _split_limits(
    tr_splits: Sequence[str],
    dev_splits: Sequence[str],
    te_splits: Sequence[str],
    select_n_sentences: Sequence[int] | int | None,
) -> dict[str, int | None]:
    """Every split once, with the number of utterances to keep."""
    groups = [[group] if isinstance(group, str) else group for group in (tr_splits, dev_splits)]
    groups.append([te_splits] if isinstance(te_splits, str) else te_splits)
    splits = [split for group in groups for split in group]
    if not splits:
        raise ValueError("no split to prepare: name some in tr_splits, dev_splits or te_splits")
    for split in splits:
        if not split or split.startswith(".") or Path(split).name != split:
            raise ValueError(f"{split!r} is not the name of a split, such as 'train-clean-100'")
    if select_n_sentences is None or isinstance(select_n_sentences, int):
        numbers: Sequence[int | None] = [select_n_sentences] * len(splits)
    else:
        numbers = select_n_sentences
    if len(numbers) != len(splits):
        raise ValueError(
            f"select_n_sentences has {len(numbers)} numbers for {len(splits)} splits"
            f" ({', '.join(splits)}): give one number, or one for each"
        )
    limits: dict[str, int | None] = {}
    for split, number in zip(splits, numbers, strict=True):
        if number is not None and number < 1:
            raise ValueError(f"select_n_sentences keeps {number} utterances of {split}")
        if limits.setdefault(split, number) != number:
            raise ValueError(f"{split} is named twice, with {limits[split]} and {number} sentences")
    return limits


def _merge_options(
    merge_lst: Sequence[str], merge_name: str | None, limits: dict[str, int | None]
) -> tuple[list[str], str | None]:
    merge_lst = [merge_lst] if isinstance(merge_lst, str) else list(dict.fromkeys(merge_lst))
    if not merge_lst:
        return [], None
    if not merge_name:
        raise ValueError(f"merge_lst names {', '.join(merge_lst)}, but merge_name is not given")
    unprepared = [split for split in merge_lst if split not in limits]
    if unprepared:
        raise ValueError(
            f"merge_lst names {', '.join(unprepared)}, but the splits prepared are"
            f" {', '.join(limits)}"
        )
    if not merge_name.endswith(".csv"):
        merge_name += ".csv"
    if Path(merge_name).name != merge_name:
        raise ValueError(f"merge_name {merge_name!r} is not a file name: it goes to save_folder")
    if merge_lst == [merge_name.removesuffix(".csv")]:
        return [], None  # that split's own manifest is the merged one
    if merge_name.removesuffix(".csv") in limits or merge_name in lexicon.FILES:
        raise ValueError(f"merge_name {merge_name!r} is the name of another file of this run")
    return merge_lst, merge_name


def _parted(splits: Iterable[str], tr_splits: Sequence[str]) -> set[str]:
    """Folders whose held-out speakers are kept apart."""
    train = [tr_splits] if isinstance(tr_splits, str) else tr_splits
    named = [split.removesuffix(HELD_OUT_SUFFIX) for split in splits if _is_held_out(split)]
    return {*train, *named}


def _is_held_out(split: str) -> bool:
    return split.endswith(HELD_OUT_SUFFIX) and split != HELD_OUT_SUFFIX


def _folder_of(split: str, parted: Collection[str]) -> str:
    whole = split.removesuffix(HELD_OUT_SUFFIX)
    return whole if whole in parted else split


def _hold_out(
    listings: dict[str, SplitListing],
    parted: Collection[str],
    speakers: Collection[str],
    tr_splits: Sequence[str],
) -> None:
    """Put the two parts of every parted folder in its place.

    Without training splits, the speakers may be those of splits that are not there.
    """
    missing = set(speakers)
    for folder in sorted(parted):
        found = {utterance.path.split("/")[1] for utterance in listings[folder].utterances}
        missing -= found
        if found and found <= speakers:
            raise ValueError(f"held_out_speakers names every speaker of {folder}: name fewer")
        for part in hold_out(listings[folder], speakers):
            listings[part.split] = part
    if missing and (tr_splits or not parted):
        raise ValueError(
            f"held_out_speakers names {', '.join(sorted(missing))}, no speaker of"
            f" {', '.join(sorted(parted)) or 'a training split, of which none is given'}: name"
            " speakers that it has, or none (--held_out_speakers '[]')"
        )


def _require_splits(data_root: Path, splits: Iterable[str]) -> None:
    missing = [split for split in splits if not (data_root / split).is_dir()]
    if missing:
        found = find_splits(data_root)
        hint = (
            "Official splits can be fetched with"
            " python librispeech_prepare.py --download SPLIT... --data_folder FOLDER"
        )
        if any(map(_is_held_out, missing)):
            hint = "A part that is held out needs --held_out_speakers"
        raise ValueError(
            f"missing in {data_root}: {', '.join(missing)}. Splits found there:"
            f" {', '.join(found) if found else 'none'}. {hint}"
        )


def _plan(
    record: PreparationRecord,
    listing: SplitListing,
    limit: int | None,
    skip_bad: bool,
    verify: bool,
    rates: dict[str, Any],
) -> _Plan:
    kinds = kinds_of_check(verify)
    made_from = {
        **rates,
        "data": listing.fingerprint,
        "select_n_sentences": limit,
        "skip_bad": skip_bad,
        "verified": kinds[0],
    }
    plan = _Plan(listing, limit, made_from, is_current=False)
    plan.is_current = any(
        record.is_current(plan.name, made_from | {"verified": kind}) for kind in kinds
    )
    return plan


def _first(listing: SplitListing, limit: int | None) -> tuple[list[Utterance], list[Problem]]:
    """So many utterances, and the problems that stand before the last of them."""

    def place(path: str) -> list[str]:
        return os.path.splitext(path)[0].split("/")

    if limit is None or limit > len(listing.utterances):
        return listing.utterances, listing.problems
    first = listing.utterances[:limit]
    last = place(first[-1].path)
    return first, [problem for problem in listing.problems if place(problem.path) < last]


def _require_rows(plan: _Plan, data_root: Path) -> None:
    if plan.rows:
        return
    split = plan.listing.split
    if _is_held_out(split) and not plan.problems and not (data_root / split).is_dir():
        raise ValueError(f"{split} is empty: none of held_out_speakers is in that training split")
    if plan.problems:
        raise ValueError(
            f"{data_root / split}: all {len(plan.problems)} utterances are unusable, the first"
            f" because of: {plan.problems[0].path}: {plan.problems[0].reason}"
        )
    hint = ""
    if suffixes := unread_suffixes(data_root, split):
        readable = ", ".join(sorted(AUDIO_SUFFIXES))
        hint = f"; there are files called {', '.join(suffixes)}, read are {readable}"
    raise ValueError(
        f"{data_root / split} holds no utterances: expected"
        f" <speaker>/<chapter>/<speaker>-<chapter>-<number>.flac{hint}"
    )


def _write_split(plan: _Plan, record: PreparationRecord) -> None:
    split, found = plan.listing.split, plan.listing.num_found
    rows = plan.rows[: plan.limit]
    write_manifest(record.folder / plan.name, rows)
    record.add(plan.name, plan.made_from, utterances=len(rows), left_out=len(plan.problems))
    official = OFFICIAL_NUM_UTTERANCES.get(split)
    if official is not None and found != official:
        logger.warning(
            "%s holds %d utterances, LibriSpeech's has %d: another corpus in its layout, or an"
            " incomplete download",
            split,
            found,
            official,
        )
    hours = sum(row.duration for row in rows) / 3600
    logger.info("%s: %d utterances, %.2f hours", plan.name, len(rows), hours)


def _report(plan: _Plan, record: PreparationRecord) -> None:
    if plan.is_current:
        logger.info("%s is current", plan.name)
    if left_out := record.note(plan.name, "left_out", 0):
        logger.warning(
            "%s: %d unusable utterances were left out (skip_bad)", plan.listing.split, left_out
        )
    for line in lines_of(plan.problems or []):
        logger.warning("%s", line)


def _merge(record: PreparationRecord, splits: Sequence[str], merge_name: str) -> None:
    sources = [f"{split}.csv" for split in splits]
    made_from = {"merged": [[name, record.digest(name)] for name in sources]}
    if record.is_current(merge_name, made_from):
        return
    try:
        count = merge_manifests(
            [record.folder / name for name in sources], record.folder / merge_name
        )
    except ValueError:
        record.remove(merge_name)
        raise
    record.add(merge_name, made_from, utterances=count)
    logger.info("%s: %d utterances", merge_name, count)


def _prepare_lexicon(
    record: PreparationRecord,
    data_root: Path,
    lexicon_file: str | Path | None,
    seed: int,
    noprogressbar: bool,
) -> None:
    source = _find_lexicon(record.folder, data_root, lexicon_file, noprogressbar)
    made_from = {"lexicon": file_digest(source), "seed": seed}
    if all(record.is_current(name, made_from) for name in lexicon.FILES):
        return
    for name in lexicon.FILES:
        record.remove(name)
    count = lexicon.write_lexicon(source, record.folder, seed)
    for name in lexicon.FILES:
        record.add(name, made_from)
    logger.info("%s: %d pronunciations", lexicon.FILES[0], count)


def _find_lexicon(
    save_folder: Path, data_root: Path, lexicon_file: str | Path | None, noprogressbar: bool
) -> Path:
    if lexicon_file is not None:
        require_file("lexicon_file", lexicon_file, "Its lines are WORD PH1 PH2 ...")
        return Path(lexicon_file)
    for path in (save_folder / LEXICON_NAME, data_root / LEXICON_NAME):
        if path.is_file():
            return path
    return download.fetch(
        download.LEXICON_URL,
        save_folder / LEXICON_NAME,
        download.LEXICON_MD5,
        noprogressbar=noprogressbar,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="librispeech_prepare.py",
        description="Raw LibriSpeech, or any corpus in its layout, to CSV manifests.",
        epilog="docs/data.md shows how a corpus of your own becomes manifests.",
    )
    add = parser.add_argument
    add("--data_folder", required=True, help="holds the splits, or LibriSpeech with the splits")
    add("--save_folder", help="gets the manifests; may be left out with --download")
    for flag, purpose in (("tr", "training"), ("dev", "validation"), ("te", "test")):
        add(f"--{flag}_splits", nargs="+", default=[], metavar="SPLIT", help=f"{purpose} splits")
    add(
        "--select_n_sentences",
        nargs="+",
        type=int,
        metavar="N",
        help="keep the first N utterances: one number, or one for each split",
    )
    add("--merge_lst", nargs="+", default=[], metavar="SPLIT", help="splits to merge into one")
    add("--merge_name", metavar="NAME.csv", help="file name of the merged manifest")
    add("--create_lexicon", action="store_true", help="also write lexicon.csv and its parts")
    add(
        "--held_out_speakers",
        nargs="+",
        default=[],
        metavar="SPEAKER",
        help=f"of the training splits: kept apart as <split>{HELD_OUT_SUFFIX}, to validate on",
    )
    add("--skip_prep", action="store_true", help="do nothing")
    add("--sample_rate", type=int, default=SAMPLE_RATE, metavar="HZ", help="default: %(default)s")
    add("--resample", action="store_true", help="take other rates: training resamples them")
    add("--skip_bad", action="store_true", help="leave unusable utterances out, do not fail")
    add("--verify", action="store_true", help="decode every file whole: also finds cut audio")
    add("--num_workers", type=int, help="threads that read audio (default: 4 per core, up to 16)")
    add("--lexicon_file", help="a local lexicon, lines WORD PH1 PH2 ... (default: the official)")
    add("--seed", type=int, default=1234, help="splits the lexicon (default: %(default)s)")
    add("--noprogressbar", action="store_true", help="no progress bars")
    add(
        "--download",
        nargs="+",
        default=[],
        metavar="SPLIT",
        help=f"fetch official splits first ({', '.join(sorted(download.ARCHIVE_MD5))})",
    )
    add("--download_url", default=download.SPEECH_URL, help="mirror (default: %(default)s)")
    return parser


def _download(splits: Sequence[str], data_folder: str, url: str, noprogressbar: bool) -> None:
    unknown = [split for split in splits if split not in download.ARCHIVE_MD5]
    if unknown:
        raise ValueError(
            f"cannot download {', '.join(unknown)}: LibriSpeech has"
            f" {', '.join(sorted(download.ARCHIVE_MD5))}"
        )
    folder = Path(data_folder)
    # The archives bring a folder LibriSpeech of their own.
    if folder.name == "LibriSpeech":
        folder = folder.parent
    for split in splits:
        download.download_split(split, folder, base_url=url, noprogressbar=noprogressbar)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = _parser()
    options = vars(parser.parse_args(arguments))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    splits_to_download, url = options.pop("download"), options.pop("download_url")
    wants_manifests = any(options[name] for name in ("tr_splits", "dev_splits", "te_splits"))
    if options["save_folder"] is None and (wants_manifests or not splits_to_download):
        parser.error("the following arguments are required: --save_folder")
    if options["select_n_sentences"] is not None and len(options["select_n_sentences"]) == 1:
        options["select_n_sentences"] = options["select_n_sentences"][0]
    try:
        _download(splits_to_download, options["data_folder"], url, options["noprogressbar"])
        if wants_manifests or not splits_to_download:
            prepare_librispeech(**options)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: error: {in_words(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
