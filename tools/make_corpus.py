"""The corpora of docs/results.md in LibriSpeech's layout, from what their makers distribute.

    python -m tools.make_corpus an4 an4_sphere.tar.gz an4
    python -m tools.make_corpus mini_librispeech data/LibriSpeech mini_librispeech

CMU AN4 is an archive of http://www.speech.cs.cmu.edu/databases/an4/. mini-LibriSpeech is five hours
of LibriSpeech's train-clean-100, and utterances of eight other speakers of it for development and
test; tools/mini_librispeech.txt lists them.
"""

import argparse
import gzip
import io
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import soundfile
from tqdm import tqdm

from common.errors import EXIT_USER_ERROR, UserError, in_words
from common.files import atomic_folder, atomic_write
from corpora.audio import AUDIO_SUFFIXES
from corpora.download import DownloadError, extract
from corpora.librispeech import TRANSCRIPT_SUFFIX, Utterance, find_data_root, list_split

AN4_NUM_SPEAKERS = 84
AN4_DEV_SPEAKERS = (5, 12, 18, 29, 40, 52, 64, 75)
"""Of the 74 that AN4 trains on; numbers in the order of the names of all 84."""

_AN4_LINE = re.compile(r"(?:<s>)?\s*(?P<words>.*?)\s*(?:</s>)?\s*\((?P<name>\S+)\)\s*")
_AN4_NAME = re.compile(r"(?P<kind>an|cen)(?P<number>\d+)-(?P<speaker>\w+)-\w+")
_CHAPTERS = {"an": 1, "cen": 2}

MINI_LIST = Path(__file__).with_name("mini_librispeech.txt")
MINI_SOURCE = "train-clean-100"


def make_an4(archive: str | Path, folder: str | Path, noprogressbar: bool = False) -> Path:
    """CMU AN4: 948 utterances in ``train-clean-100`` and ``dev-clean``, 130 in ``test-clean``.

    Speakers are numbered in the order of their names, from 90001. Chapter 1 of a speaker has the
    commands, chapter 2 what was asked of the person; an utterance keeps its number.

    Args:
        archive: ``an4_sphere.tar.gz``.
        folder: gets the folder ``LibriSpeech``.
        noprogressbar: no progress bar.

    Returns:
        The folder that holds the splits, a recipe's ``data_folder``.

    Raises:
        UserError: the archive is not AN4's, or the corpus is there already.
        DownloadError: the archive is damaged.
    """

    def make(scratch: Path) -> None:
        unpacked = scratch.with_name(f"{scratch.name}-archive")
        unpacked.mkdir()
        try:
            extract(archive, unpacked, noprogressbar=noprogressbar)
            _convert_an4(unpacked, scratch, Path(archive), noprogressbar)
        finally:
            shutil.rmtree(unpacked)

    return _make(Path(folder), make)


def make_mini_librispeech(
    data_folder: str | Path, folder: str | Path, noprogressbar: bool = False
) -> Path:
    """mini-LibriSpeech: ``train-clean-5``, ``dev-clean-5``, ``test-clean-5``, text for an n-gram.

    ``lm_text.txt.gz`` beside the folder ``LibriSpeech`` has train-clean-100's transcripts without
    the speakers of dev and test.

    Args:
        data_folder: LibriSpeech with ``train-clean-100``.
        folder: gets the folder ``LibriSpeech`` and the text.
        noprogressbar: no progress bar.

    Returns:
        The folder that holds the splits, a recipe's ``data_folder``.

    Raises:
        UserError: LibriSpeech lacks utterances of the list, or the corpus is there already.
    """
    try:
        root = find_data_root(data_folder, [MINI_SOURCE])
    except ValueError as error:
        raise UserError(str(error)) from error
    if not (root / MINI_SOURCE).is_dir():
        raise UserError(
            f"{root} has no {MINI_SOURCE}, which mini-LibriSpeech is a part of. Fetch it: python"
            f" librispeech_prepare.py --data_folder {data_folder} --download {MINI_SOURCE}"
        )
    split_of = mini_librispeech_ids()
    found = {utterance.id: utterance for utterance in list_split(root, MINI_SOURCE).utterances}
    if missing := sorted(split_of.keys() - found.keys()):
        raise UserError(
            f"{root / MINI_SOURCE} lacks {len(missing)} of the {len(split_of)} utterances of"
            f" {MINI_LIST.name}, {missing[0]} for instance: it is not the whole split."
        )
    unheard = {found[name].speaker for name, split in split_of.items() if split != "train-clean-5"}

    def make(scratch: Path) -> None:
        chosen = [(found[name], split) for name, split in split_of.items()]
        for utterance, split in _with_progress("copying", chosen, noprogressbar):
            source = root / utterance.path
            target = scratch / split / Path(utterance.path).relative_to(MINI_SOURCE)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        for split in sorted(set(split_of.values())):
            of_split = {u.id: u.words for u, its_split in chosen if its_split == split}
            _write_transcripts(scratch / split, of_split)
        # Before the corpus is there: who has it has both.
        _write_text(Path(folder) / "lm_text.txt.gz", found.values(), unheard)

    return _make(Path(folder), make)


def mini_librispeech_ids() -> dict[str, str]:
    """The split of each utterance of mini-LibriSpeech."""
    split_of = {}
    for line in MINI_LIST.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        place, numbers = line.split(": ")
        split, chapter = place.split()
        split_of |= {f"{chapter}-{int(number):04d}": split for number in numbers.split()}
    return split_of


def _convert_an4(unpacked: Path, root: Path, archive: Path, noprogressbar: bool) -> None:
    top = next(iter(sorted(unpacked.glob("*/etc"))), unpacked / "etc").parent
    words_of = {part: _an4_transcripts(top, part, archive) for part in ("train", "test")}
    everything = {**words_of["train"], **words_of["test"]}
    names = {name: _parsed_an4(name, archive) for name in everything}
    speakers = sorted({match["speaker"] for match in names.values()})
    if len(speakers) != AN4_NUM_SPEAKERS:
        raise UserError(
            f"{archive} has transcripts of {len(speakers)} speakers; AN4 has {AN4_NUM_SPEAKERS}."
        )
    recordings = {
        path.stem: path
        for path in sorted((top / "wav").rglob("*"))
        if path.suffix in (*AUDIO_SUFFIXES, ".sph")
    }
    if missing := [name for name in everything if name not in recordings]:
        raise UserError(
            f"{archive} has a transcript, but no .sph or .wav file of {missing[0]} and"
            f" {len(missing) - 1} others. Of AN4's archives it must be an4_sphere.tar.gz."
        )
    written: dict[str, dict[str, str]] = defaultdict(dict)
    for name, match in _with_progress("converting", names.items(), noprogressbar):
        number = speakers.index(match["speaker"]) + 1
        split = "test-clean" if name in words_of["test"] else "train-clean-100"
        if split == "train-clean-100" and number in AN4_DEV_SPEAKERS:
            split = "dev-clean"
        chapter = f"{90000 + number}-{_CHAPTERS[match['kind']]}"
        utterance_id = f"{chapter}-{int(match['number']):04d}"
        target = (root / split).joinpath(*chapter.split("-"), f"{utterance_id}.flac")
        target.parent.mkdir(parents=True, exist_ok=True)
        samples, sample_rate = soundfile.read(recordings[name], dtype="int16")
        soundfile.write(target, samples, sample_rate, subtype="PCM_16")
        written[split][utterance_id] = everything[name]
    for split, words_of_split in written.items():
        _write_transcripts(root / split, words_of_split)


def _an4_transcripts(top: Path, part: str, archive: Path) -> dict[str, str]:
    path = top / "etc" / f"an4_{part}.transcription"
    if not path.is_file():
        raise UserError(f"{archive} holds no etc/{path.name}: it is not an archive of AN4.")
    words_of = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{archive}: etc/{path.name} is not UTF-8, as AN4's is.") from None
    for number, line in enumerate(lines, start=1):
        match = _AN4_LINE.fullmatch(line)
        if match is None:
            raise UserError(
                f"{archive}, etc/{path.name}, line {number}: {line!r} is not a transcript with the"
                " name of its recording behind it in brackets."
            )
        words_of[match["name"]] = match["words"]
    return words_of


def _parsed_an4(name: str, archive: Path) -> re.Match[str]:
    match = _AN4_NAME.fullmatch(name)
    if match is None:
        raise UserError(f"{archive}: {name!r} is not the name of a recording of AN4.")
    return match


def _write_transcripts(split_folder: Path, words_of: Mapping[str, str]) -> None:
    lines_of: dict[str, list[str]] = defaultdict(list)
    for utterance_id, words in sorted(words_of.items()):
        chapter, _ = utterance_id.rsplit("-", 1)
        lines_of[chapter].append(f"{utterance_id} {words}\n")
    for chapter, lines in lines_of.items():
        folder = split_folder.joinpath(*chapter.split("-"))
        (folder / f"{chapter}{TRANSCRIPT_SUFFIX}").write_text("".join(lines), encoding="utf-8")


def _write_text(path: Path, utterances: Iterable[Utterance], unheard: set[str]) -> None:
    text = sorted((u.id, u.words) for u in utterances if u.speaker not in unheard)
    with (
        atomic_write(path, "wb") as stream,
        gzip.GzipFile(fileobj=stream, mode="wb", filename="", mtime=0) as zipped,
        io.TextIOWrapper(zipped, encoding="utf-8") as lines,
    ):
        lines.writelines(f"{words}\n" for _, words in text)


def _make(folder: Path, make: Callable[[Path], None]) -> Path:
    """``folder/LibriSpeech``, which appears when ``make`` has filled a folder of its own."""
    root = folder / "LibriSpeech"
    if root.exists():
        raise UserError(f"{root} is there already: give another folder, or delete it.")
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_folder(root) as scratch:
        make(scratch)
    return root


def _with_progress(what: str, items: Iterable, noprogressbar: bool) -> Iterable:
    return tqdm(items, desc=what, unit=" utterances", disable=noprogressbar)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.make_corpus",
        description="Put CMU AN4 or mini-LibriSpeech into LibriSpeech's layout.",
    )
    corpora = parser.add_subparsers(required=True, metavar="corpus")
    for name, make, source, what in (
        ("an4", make_an4, "archive", "an4_sphere.tar.gz"),
        ("mini_librispeech", make_mini_librispeech, "data_folder", "LibriSpeech's train-clean-100"),
    ):
        corpus = corpora.add_parser(name, help=f"from {what}")
        corpus.set_defaults(make=make)
        corpus.add_argument(source, help=what)
        corpus.add_argument("folder", help="gets LibriSpeech/")
        corpus.add_argument("--noprogressbar", action="store_true", help="no progress bar")
    options = vars(parser.parse_args(arguments))
    try:
        root = options.pop("make")(**options)
    except (UserError, DownloadError, OSError, soundfile.LibsndfileError) as error:
        print(f"{parser.prog}: error: {in_words(error)}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
    print(f"data folder: {root}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
