import os
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from corpora.librispeech import find_data_root, find_splits, list_split
from tests.generated_corpus import make_corpus

SPLITS = {"dev-clean": 3, "test-clean": 2}


@pytest.fixture
def root(tmp_path):
    return make_corpus(tmp_path / "LibriSpeech", SPLITS)


def chapter_of(root, split="dev-clean", speaker="101"):
    return root / split / speaker / "1"


def test_the_data_root_is_found_from_the_folder_and_from_its_parent(root):
    assert find_data_root(root) == root
    assert find_data_root(root.parent) == root
    assert find_data_root(str(root.parent), ["dev-clean"]) == root


def test_the_folder_that_holds_the_wanted_split_wins(root):
    outer = make_corpus(root.parent, {"train-clean-100": 1})
    assert find_data_root(outer, ["train-clean-100"]) == outer
    assert find_data_root(outer, ["test-clean"]) == root


def test_only_folders_laid_out_like_a_split_count_as_splits(root):
    (root / "notes" / "old").mkdir(parents=True)
    (root / ".hidden").mkdir()
    (root / "README.TXT").write_text("")
    assert find_splits(root) == sorted(SPLITS)


@pytest.mark.parametrize("place", ["missing", "file", "empty", "tables", "split"])
def test_a_folder_without_librispeech_is_refused_with_what_was_found(root, tmp_path, place):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "dev.tsv").write_text("")
    folder, message = {
        "missing": (tmp_path / "missing", "does not exist"),
        "file": (tmp_path / "file", "is not a folder"),
        "empty": (tmp_path / "empty", "is not LibriSpeech.*found: nothing"),
        "tables": (tmp_path / "tables", "corpora.prepare table .*dev.tsv"),
        "split": (root / "dev-clean", "found: 101.*looks like one split"),
    }[place]
    with pytest.raises(ValueError, match=message):
        find_data_root(folder)


def test_a_listing_is_ordered_and_complete(root):
    listing = list_split(root, "dev-clean")
    assert [utterance.id for utterance in listing.utterances] == [
        "101-1-0000",
        "101-1-0001",
        "101-1-0002",
    ]
    assert listing.problems == []
    first = listing.utterances[0]
    assert first.speaker == "101"
    assert first.path == "dev-clean/101/1/101-1-0000.flac"
    assert first.size_bytes == (root / first.path).stat().st_size
    assert f"101-1-0000 {first.words}\n" in (chapter_of(root) / "101-1.trans.txt").read_text()


def test_threads_list_what_one_thread_lists(root):
    for speaker in range(200, 240):
        make_corpus(root / f"more{speaker}", {"dev-clean": 1})
        (root / f"more{speaker}/dev-clean/101").rename(root / f"dev-clean/{speaker}")
    with ThreadPoolExecutor(8) as pool:
        assert list_split(root, "dev-clean", pool.map) == list_split(root, "dev-clean")


def test_the_fingerprint_stays_with_the_content_wherever_it_is(root):
    before = list_split(root, "dev-clean").fingerprint
    moved = root.rename(root.parent / "elsewhere")
    assert list_split(moved, "dev-clean").fingerprint == before
    (chapter_of(moved) / "101-1-0001.flac").touch()
    assert list_split(moved, "dev-clean").fingerprint != before


def test_hidden_files_are_no_utterances(root):
    (chapter_of(root) / "._101-1-0000.flac").write_bytes(b"resource fork")
    assert list_split(root, "dev-clean").problems == []


@pytest.mark.parametrize(
    ("damage", "utterance_id", "reason"),
    [
        (lambda c: (c / "101-1-0001.flac").unlink(), "101-1-0001", "missing audio"),
        (lambda c: (c / "101-1.trans.txt").unlink(), "101-1-0002", "missing transcript"),
        (
            lambda c: (c / "101-1-0002.flac").rename(c / "101-1-0009.flac"),
            "101-1-0009",
            "missing transcript",
        ),
        (
            lambda c: (c / "101-1.trans.txt").open("a").write("101-1-0001 AGAIN\n"),
            "101-1-0001",
            "two lines with this id",
        ),
        (
            lambda c: (c / "101-1.trans.txt").write_bytes(b"101-1-0000 \xff\xfe\n"),
            "101-1-0000",
            "missing transcript",
        ),
        (
            lambda c: (c.parent / "101-1-0007.flac").write_bytes(b""),
            "101-1-0007",
            "audio belongs into",
        ),
        (
            lambda c: (
                (c / "take" / "2").mkdir(parents=True)
                or (c / "take" / "2" / "101-1-0008.flac").write_bytes(b"")
            ),
            "101-1-0008",
            "audio belongs into",
        ),
    ],
    ids=["no audio", "no transcripts", "renamed", "twice", "not UTF-8", "misplaced", "too deep"],
)
def test_what_is_wrong_is_listed_with_its_utterance(root, damage, utterance_id, reason):
    damage(chapter_of(root))
    listing = list_split(root, "dev-clean")
    problems = {problem.utterance_id: problem for problem in listing.problems}
    assert reason in problems[utterance_id].reason
    assert problems[utterance_id].path.startswith("dev-clean/101/")
    assert utterance_id not in {utterance.id for utterance in listing.utterances}


@pytest.mark.parametrize(
    ("line", "words", "reason"),
    [
        ("101-1-0000   TWO \t WORDS  \r", "TWO WORDS", None),
        ("101-1-0000", None, "no words after the id"),
        ("101-1-0000 IT COSTS $FIVE", None, "is a variable to SpeechBrain"),
        ("101-1-0000 A PRICE OF 5 $", "A PRICE OF 5 $", None),
        ("101-1-0000 A\u2028B\x0bC", "A B C", None),
    ],
)
def test_transcript_lines(root, line, words, reason):
    (chapter_of(root) / "101-1.trans.txt").write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\n\n")
    listing = list_split(root, "dev-clean")
    if reason is None:
        assert [(u.id, u.words) for u in listing.utterances] == [("101-1-0000", words)]
    else:
        assert reason in next(p.reason for p in listing.problems if p.utterance_id == "101-1-0000")


def test_an_id_that_belongs_elsewhere_is_listed(root):
    chapter = chapter_of(root)
    (chapter / "101-1-0000.flac").rename(chapter / "999-1-0000.flac")
    (chapter / "101-1.trans.txt").write_text("999-1-0000 HELLO\n")
    reasons = {p.utterance_id: p.reason for p in list_split(root, "dev-clean").problems}
    assert "begins with 101-1-" in reasons["999-1-0000"]


def one_utterance(root, speaker, name, line, suffix=".wav", folder=None):
    """A split with one file; what it holds is not looked at."""
    chapter = root / "split" / (folder or speaker) / "1"
    chapter.mkdir(parents=True)
    (chapter / f"{name}{suffix}").write_bytes(b"audio")
    (chapter / f"{speaker}-1.trans.txt").write_text(line, encoding="utf-8")
    return list_split(root, "split")


@pytest.mark.parametrize(
    ("speaker", "name"),
    [
        ("Anna Maria", "Anna Maria-1-0000"),
        ("anna", "anna-1-take  two"),
        ("anna", "anna-1-(first), 'best' take"),
        ("Zoë Müller", "Zoë Müller-1-ä ö"),
        ("李明", "李明-1-0000"),
    ],
)
def test_speakers_and_files_may_have_spaces_and_any_letters(tmp_path, speaker, name):
    (found,) = one_utterance(tmp_path, speaker, name, f"{name} ONE TWO\n").utterances
    assert (found.id, found.speaker, found.words) == (name, speaker, "ONE TWO")


def test_the_longest_name_that_a_line_begins_with_is_its_id(tmp_path):
    one_utterance(tmp_path, "a", "a-1-x", "a-1-x ONE\na-1-x TWO THREE\n")
    (tmp_path / "split/a/1/a-1-x TWO.wav").write_bytes(b"audio")
    words = {found.id: found.words for found in list_split(tmp_path, "split").utterances}
    assert words == {"a-1-x": "ONE", "a-1-x TWO": "THREE"}


def test_a_transcript_may_be_separated_by_a_tab(tmp_path):
    (found,) = one_utterance(tmp_path, "a", "a-1-x", "a-1-x\tONE TWO\n").utterances
    assert found.words == "ONE TWO"


@pytest.mark.parametrize("form", ["NFD", "NFC"])
def test_accents_match_however_file_system_and_transcript_write_them(tmp_path, form):
    other = {"NFD": "NFC", "NFC": "NFD"}[form]
    speaker, name = "Zoë", "Zoë-1-é"
    (found,) = one_utterance(
        tmp_path,
        speaker,
        unicodedata.normalize(form, name),
        unicodedata.normalize(other, f"{name} ÉTÉ\n"),
        folder=unicodedata.normalize(form, speaker),
    ).utterances
    assert (found.id, found.speaker, found.words) == (name, speaker, "ÉTÉ")
    assert (tmp_path / found.path).is_file()


@pytest.mark.parametrize("suffix", [".wav", ".FLAC", ".opus", ".mp3", ".Ogg", ".aiff", ".sph"])
def test_recordings_of_every_readable_type_are_listed(tmp_path, suffix):
    (found,) = one_utterance(tmp_path, "a", "a-1-x", "a-1-x ONE\n", suffix).utterances
    assert found.path == f"split/a/1/a-1-x{suffix}"


@pytest.mark.parametrize("suffix", [".m4a", ".wma", ".mp4", ".pcm"])
def test_a_type_that_is_not_read_is_named(tmp_path, suffix):
    listing = one_utterance(tmp_path, "a", "a-1-x", "a-1-x ONE\n", suffix)
    (problem,) = listing.problems
    assert problem.path == f"split/a/1/a-1-x{suffix}"
    assert f"a file of type {suffix}; read are .aif" in problem.reason
    assert not listing.utterances


@pytest.mark.parametrize("name", ["a-1-x\ty", "a-1-x\ny", "a-1-\x7f", "a-1-$x"])
def test_a_name_that_no_table_can_hold_is_refused(tmp_path, name):
    listing = one_utterance(tmp_path, "a", name, "a-1-z ONE\n")
    assert [problem.reason[:15] for problem in listing.problems] == [
        "unusable name: ",
        "missing audio: ",
    ]


@pytest.mark.parametrize("place", ["file", "speaker", "chapter"])
def test_a_name_that_is_not_utf_8_is_named_and_the_others_are_listed(root, place):
    chapter = chapter_of(root)
    bad = os.fsdecode(b"caf\xe9")
    if place == "file":
        (chapter / f"101-1-{bad}.flac").write_bytes(b"audio")
    else:
        other = root / "dev-clean" / (bad if place == "speaker" else "7")
        (other / (bad if place == "chapter" else "1")).mkdir(parents=True)
        (next(other.iterdir()) / "a.flac").write_bytes(b"audio")
    listing = list_split(root, "dev-clean")
    assert len(listing.utterances) == 3
    (problem,) = listing.problems
    assert problem.reason == "unusable name: not UTF-8"
    assert "caf\\xe9" in problem.path
    problem.path.encode("utf-8")


@pytest.mark.parametrize("name", ["101-1.trans.txt", "101-1-0000.flac", "other.trans.txt"])
def test_a_pipe_is_no_file_to_wait_for(root, name):
    path = chapter_of(root) / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    listing = list_split(root, "dev-clean")
    reasons = {Path(problem.path).name: problem.reason for problem in listing.problems}
    assert reasons[name] == "not a regular file"
    missing = {"101-1.trans.txt": 3, "101-1-0000.flac": 0, "other.trans.txt": 0}[name]
    assert len(listing.problems) == 1 + missing
