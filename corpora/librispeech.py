"""LibriSpeech's layout: where its splits are, which utterances they hold, what is wrong with them.

    <split>/<speaker>/<chapter>/<speaker>-<chapter>-<number>.flac    or .opus, .wav, ...
    <split>/<speaker>/<chapter>/<speaker>-<chapter>.trans.txt    lines "<utterance id> <WORDS>"

Any corpus in this layout is read, whatever its splits are called.
"""

import hashlib
import os
import re
import stat
import unicodedata
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from corpora.audio import AUDIO_SUFFIXES

SAMPLE_RATE = 16000

OFFICIAL_NUM_UTTERANCES = {
    "train-clean-100": 28539,
    "train-clean-360": 104014,
    "train-other-500": 148688,
    "dev-clean": 2703,
    "dev-other": 2864,
    "test-clean": 2620,
    "test-other": 2939,
}

TRANSCRIPT_SUFFIX = ".trans.txt"

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")

HELD_OUT_SUFFIX = "-held-out"
"""``<split>-held-out`` is the part of ``<split>`` that training leaves to validation."""

# SpeechBrain's load_data_csv replaces these in every column and fails where it knows no value.
_VARIABLE = re.compile(r"\$[\w.]+")


class Problem(NamedTuple):
    """Something wrong with one utterance. ``path`` is relative to the data root.

    A row of a table has its ``speaker``; in LibriSpeech's layout the path tells.
    """

    path: str
    utterance_id: str
    reason: str
    speaker: str = ""


class Utterance(NamedTuple):
    """An utterance whose audio and transcript exist. ``path`` is relative to the data root."""

    id: str
    speaker: str
    path: str
    size_bytes: int
    words: str


@dataclass
class SplitListing:
    """What a split's folders hold, the audio unopened.

    Attributes:
        utterances: those with audio and transcript, ordered by speaker, chapter and id.
        problems: those with one of the two, or with a transcript that cannot be used.
        fingerprint: digest over names, sizes and times of the audio files and the contents of the
            transcripts; relative to the data root, so a moved corpus keeps it.
        num_held_out: how many more its folders hold, of held-out speakers.
    """

    split: str
    utterances: list[Utterance] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    fingerprint: str = ""
    num_held_out: int = 0

    @property
    def num_found(self) -> int:
        """Utterances that exist in the split's folders in some form, usable, held out or not."""
        return len(self.utterances) + len(self.problems) + self.num_held_out


def find_data_root(data_folder: str | Path, splits: Sequence[str] = ()) -> Path:
    """The folder that holds the splits: ``data_folder`` itself or ``LibriSpeech`` inside it.

    This folder is what ``$data_root`` in a manifest stands for.

    Args:
        data_folder: ``.../LibriSpeech``, or the folder that it was unpacked in.
        splits: names looked for first, where both folders hold splits.

    Raises:
        ValueError: neither folder holds a split in LibriSpeech's layout.
    """
    folder = Path(data_folder)
    if not folder.is_dir():
        raise ValueError(f"the data folder {folder} does not exist or is not a folder")
    candidates = [folder, folder / "LibriSpeech"]
    for candidate in candidates:
        if any((candidate / split).is_dir() for split in splits):
            return candidate
    for candidate in candidates:
        if find_splits(candidate):
            return candidate
    hint = ""
    if _has_chapters(folder):
        hint = f" {folder} looks like one split: give the folder above it."
    names = sorted(entry.name for entry in _visible(folder))
    if tables := [name for name in names if name.endswith(TABLE_SUFFIXES)]:
        hint = f" Tables are prepared by python -m corpora.prepare table {folder / tables[0]}."
    found = names[:8]
    raise ValueError(
        f"{folder} is not LibriSpeech: no <split>/<speaker>/<chapter>/ folders with"
        f" audio and {TRANSCRIPT_SUFFIX} files in it or in its LibriSpeech folder"
        f" (found: {', '.join(found) if found else 'nothing'}).{hint}"
    )


def find_splits(data_root: str | Path) -> list[str]:
    """Names of the folders under ``data_root`` that are laid out like a split, sorted."""
    if not os.path.isdir(data_root):
        return []
    return sorted(
        entry.name for entry in _visible(data_root) if entry.is_dir() and _has_chapters(entry.path)
    )


def list_split(
    data_root: str | Path,
    split: str,
    map_speakers: Callable[[Callable, Iterable], Iterable] = map,
) -> SplitListing:
    """List the utterances of a split without opening its audio.

    Args:
        data_root: the folder that holds the split.
        split: its name.
        map_speakers: ``map``, or an executor's, which keeps the order as ``map`` does.

    Returns:
        The listing; see `SplitListing`.
    """
    split_folder = Path(data_root) / split
    listing = SplitListing(split)
    digest = hashlib.sha256(split.encode())
    speakers = []
    for entry in _visible(split_folder):
        if entry.is_dir():
            speakers.append(entry.name)
        else:
            listing.problems += _stray(entry.name, split)

    def list_speaker(speaker: str) -> tuple[list[Utterance], list[Problem], bytes]:
        return _list_speaker(split_folder, split, speaker)

    for utterances, problems, speaker_digest in map_speakers(list_speaker, sorted(speakers)):
        listing.utterances += utterances
        listing.problems += problems
        digest.update(speaker_digest)
    for problem in listing.problems:
        digest.update(repr(problem).encode())
    listing.fingerprint = digest.hexdigest()
    return listing


def hold_out(listing: SplitListing, speakers: Collection[str]) -> tuple[SplitListing, SplitListing]:
    """A split without these speakers, and these alone as the split ``<split>-held-out``.

    Problems that belong to no speaker stay with the first.
    """

    def part(name: str, held_out: bool) -> SplitListing:
        def belongs(path: str) -> bool:
            return (path.split("/")[1] in speakers) == held_out

        fingerprint = f"{listing.fingerprint} {held_out} {sorted(speakers)}"
        return SplitListing(
            name,
            [utterance for utterance in listing.utterances if belongs(utterance.path)],
            [problem for problem in listing.problems if belongs(problem.path)],
            hashlib.sha256(fingerprint.encode()).hexdigest(),
        )

    rest, held_out = part(listing.split, False), part(listing.split + HELD_OUT_SUFFIX, True)
    rest.num_held_out = held_out.num_found
    return rest, held_out


def unread_suffixes(data_root: str | Path, split: str) -> list[str]:
    """Suffixes of files in a split that no recording has; read to explain an empty listing."""
    files = islice((Path(data_root) / split).rglob("*.*"), 10_000)
    return sorted({path.suffix for path in files} - {".txt"})[:8]


def _list_speaker(
    split_folder: Path, split: str, speaker: str
) -> tuple[list[Utterance], list[Problem], bytes]:
    utterances: list[Utterance] = []
    problems: list[Problem] = []
    digest = hashlib.sha256(speaker.encode("utf-8", "surrogateescape"))
    chapters = []
    for entry in _visible(split_folder / speaker):
        if entry.is_dir():
            chapters.append(entry.name)
        else:
            problems += _stray(entry.name, f"{split}/{speaker}")
    for chapter in sorted(chapters):
        _list_chapter(split_folder, (split, speaker, chapter), utterances, problems, digest)
    return utterances, problems, digest.digest()


def _list_chapter(
    split_folder: Path,
    place: tuple[str, str, str],
    utterances: list[Utterance],
    problems: list[Problem],
    digest: "hashlib._Hash",
) -> None:
    _, speaker, chapter = place
    folder = "/".join(place)
    audio: dict[str, list[tuple[str, int]]] = {}
    unread: dict[str, str] = {}
    transcripts: list[os.DirEntry] = []
    lines = []
    unusable = unusable_name(speaker) or unusable_name(chapter)
    for entry in _visible(split_folder / speaker / chapter):
        stem, suffix = os.path.splitext(entry.name)
        # File systems may keep the accents of a name apart from its letters; transcripts do not.
        utterance_id = unicodedata.normalize("NFC", stem)
        if suffix.lower() in AUDIO_SUFFIXES:
            try:
                found = entry.stat()
            except OSError:  # a dangling link: left to the check of the audio
                size, time = -1, 0
            else:
                size, time = found.st_size, found.st_mtime_ns
            lines.append(f"{entry.name} {size} {time}")
            if reason := unusable or unusable_name(entry.name):
                problems.append(Problem(printable(f"{folder}/{entry.name}"), "", reason))
                unread[utterance_id] = ""
            elif size >= 0 and not stat.S_ISREG(found.st_mode):
                problems.append(
                    Problem(f"{folder}/{entry.name}", utterance_id, "not a regular file")
                )
                unread[utterance_id] = ""
            else:
                audio.setdefault(utterance_id, []).append((entry.name, size))
        elif entry.name.endswith(TRANSCRIPT_SUFFIX):
            transcripts.append(entry)
        elif entry.is_dir():
            problems += _strays_below(entry.path, f"{folder}/{entry.name}")
        else:
            unread[utterance_id] = suffix
    words: dict[str, str] = {}
    bad_words: dict[str, str] = {}
    names = audio.keys() | unread.keys()
    for entry in sorted(transcripts, key=lambda entry: entry.name):
        path = printable(f"{folder}/{entry.name}")
        try:
            if not stat.S_ISREG(os.stat(entry.path).st_mode):
                # To read from a pipe is to wait for ever.
                problems.append(Problem(path, "", "not a regular file"))
                continue
            content = Path(entry.path).read_bytes()
            digest.update(content)
            _parse_transcript(content.decode("utf-8-sig"), names, words, bad_words)
        except UnicodeDecodeError:
            problems.append(Problem(path, "", "unreadable: not UTF-8"))
        except OSError as error:
            problems.append(Problem(path, "", f"unreadable: {error.strerror}"))
    digest.update("\n".join([chapter, *sorted(lines)]).encode("utf-8", "surrogateescape"))

    prefix = unicodedata.normalize("NFC", f"{speaker}-{chapter}-")
    for utterance_id in sorted(audio.keys() | words.keys() | bad_words.keys()):
        found_files = sorted(audio.get(utterance_id, []))
        name = found_files[0][0] if found_files else utterance_id
        path = printable(f"{folder}/{name}")
        reason = None
        if len(found_files) > 1:
            suffixes = " and ".join(os.path.splitext(name)[1] for name, _ in found_files)
            reason = f"ambiguous audio: {suffixes} of one id"
        elif utterance_id in unread and not found_files:
            if not (suffix := unread[utterance_id]):
                continue  # said already
            readable = ", ".join(sorted(AUDIO_SUFFIXES))
            path += suffix
            reason = f"unreadable: a file of type {suffix}; read are {readable}"
        elif not found_files:
            reason = "missing audio: only a transcript"
        elif utterance_id in bad_words:
            reason = bad_words[utterance_id]
        elif utterance_id not in words:
            reason = "missing transcript"
        elif not utterance_id.startswith(prefix):
            reason = f"misplaced: an id in this folder begins with {prefix}"
        if reason:
            problems.append(Problem(path, printable(utterance_id), reason))
            continue
        size = found_files[0][1]
        speaker_id = unicodedata.normalize("NFC", speaker)
        utterances.append(Utterance(utterance_id, speaker_id, path, size, words[utterance_id]))


def unusable_name(name: str) -> str | None:
    """Why a file or a folder of this name cannot stand in a manifest; None where it can."""
    if printable(name) != name:
        return "unusable name: not UTF-8"
    if any(unicodedata.category(letter) == "Cc" for letter in name):
        return "unusable name: it holds a tab, a line break or another control character"
    if variable := _VARIABLE.search(name):
        return f"unusable name: {variable[0]!r} is a variable to SpeechBrain's CSV reader"
    return None


def unusable_words(said: str) -> str | None:
    """Why these words cannot stand in a manifest; None where they can."""
    if variable := _VARIABLE.search(said):
        return f"unusable transcript: {variable[0]!r} is a variable to SpeechBrain's CSV reader"
    return None


def printable(name: str) -> str:
    """A name of the file system, with bytes that are not UTF-8 written as such (``\\xe9``)."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _parse_transcript(
    text: str, names: Collection[str], words: dict[str, str], bad_words: dict[str, str]
) -> None:
    """Adds what is said, or what is wrong with the line, by id.

    Args:
        names: of the chapter's files. They tell where an id ends that has spaces in it.
    """
    num_parts = 1 + max((name.count(" ") for name in names), default=0)
    for line in text.split("\n"):
        utterance_id, said = _split_line(line.strip(), 1)
        if not utterance_id:
            continue
        for count in range(num_parts, 1, -1):
            longer, rest = _split_line(line.strip(), count)
            if longer in names:
                utterance_id, said = longer, rest
                break
        said = unicodedata.normalize("NFC", " ".join(said.split()))
        if utterance_id in words or utterance_id in bad_words:
            bad_words[utterance_id] = "ambiguous transcript: two lines with this id"
        elif not said:
            bad_words[utterance_id] = "missing transcript: no words after the id"
        elif reason := unusable_words(said):
            bad_words[utterance_id] = reason
        else:
            words[utterance_id] = said


def _split_line(line: str, count: int) -> tuple[str, str]:
    """The first so many words of a line as an id, and what follows."""
    pieces = re.split(r"[ \t]", line, maxsplit=count)
    return unicodedata.normalize("NFC", " ".join(pieces[:count])), "".join(pieces[count:])


def _stray(name: str, folder: str) -> list[Problem]:
    """Audio that is not in the third folder would otherwise be left out in silence."""
    utterance_id, suffix = os.path.splitext(name)
    if suffix.lower() not in AUDIO_SUFFIXES:
        return []
    reason = "misplaced: audio belongs into <split>/<speaker>/<chapter>/"
    return [Problem(printable(f"{folder}/{name}"), printable(utterance_id), reason)]


def _strays_below(path: str, folder: str) -> list[Problem]:
    problems = []
    for entry in sorted(_visible(path), key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False):
            problems += _strays_below(entry.path, f"{folder}/{entry.name}")
        else:
            problems += _stray(entry.name, folder)
    return problems


def _has_chapters(split_folder: str | Path) -> bool:
    for speaker in _visible(split_folder):
        if not speaker.is_dir():
            continue
        for chapter in _visible(speaker.path):
            if not chapter.is_dir():
                continue
            for entry in _visible(chapter.path):
                suffix = os.path.splitext(entry.name)[1].lower()
                if suffix in AUDIO_SUFFIXES or entry.name.endswith(TRANSCRIPT_SUFFIX):
                    return True
    return False


def _visible(folder: str | Path) -> list[os.DirEntry]:
    """Entries of a folder without hidden ones (macOS leaves ``._*.flac`` beside real files)."""
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".")]
