"""The corpora of the results, made from archives and folders built as their makers' are."""

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from corpora.librispeech import list_split
from tests.conftest import REPOSITORY
from tools import make_corpus
from tools.make_corpus import AN4_DEV_SPEAKERS, main, make_an4, mini_librispeech_ids

SPEECH = REPOSITORY / ".." / "shared" / "speech"
needs_speech = pytest.mark.skipif(not SPEECH.is_dir(), reason=f"no real speech in {SPEECH}")

NAMES = [f"{sex}{chr(97 + i)}{chr(97 + j)}x" for sex in "fm" for i in range(7) for j in range(6)]
TEST_NUMBERS = (3, 9, 23, 25, 37, 43, 47, 53, 56, 66)


def sphere(samples: np.ndarray) -> bytes:
    """A file as AN4 has it: NIST's header of 1024 bytes without a word of the coding."""
    fields = {
        "channel_count": "-i 1",
        "sample_count": f"-i {len(samples)}",
        "sample_rate": "-i 16000",
        "sample_n_bytes": "-i 2",
        "sample_byte_format": "-s2 10",
        "sample_sig_bits": "-i 16",
    }
    lines = "".join(f"{name} {value}\n" for name, value in fields.items())
    return (
        f"NIST_1A\n   1024\n{lines}end_head\n".encode().ljust(1024)
        + samples.astype(">i2").tobytes()
    )


def samples_of(name: str) -> np.ndarray:
    return np.random.default_rng(list(name.encode())).integers(-3000, 3000, 800).astype(np.int16)


def an4_archive(path: Path, names=NAMES, train: str = "", test: str = "") -> Path:
    """Every speaker says two utterances; the test speakers' lines have no marks of a sentence."""
    with tarfile.open(path, "w:gz") as tar:

        def add(name: str, content: bytes) -> None:
            entry = tarfile.TarInfo(f"an4/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))

        lines = {"train": train, "test": test}
        for number, speaker in enumerate(names, start=1):
            part = "test" if number in TEST_NUMBERS else "train"
            for kind, words in (("an251", "ENTER FOUR"), ("cen7", "A M Y")):
                name = f"{kind}-{speaker}-b"
                marked = f"<s> {words} </s>" if part == "train" else words
                lines[part] += f"{marked} ({name})\n"
                folder = "an4_clstk" if part == "train" else "an4test_clstk"
                add(f"wav/{folder}/{speaker}/{name}.sph", sphere(samples_of(name)))
        for part, text in lines.items():
            add(f"etc/an4_{part}.transcription", text.encode())
    return path


def test_an4_comes_out_with_the_splits_and_the_numbers_of_the_recipes(tmp_path, capsys):
    archive = an4_archive(tmp_path / "an4_sphere.tar.gz")
    assert main(["an4", str(archive), str(tmp_path / "an4"), "--noprogressbar"]) == 0
    root = tmp_path / "an4" / "LibriSpeech"
    assert str(root) in capsys.readouterr().out
    splits = {
        split: list_split(root, split) for split in ("train-clean-100", "dev-clean", "test-clean")
    }
    assert not any(listing.problems for listing in splits.values())
    numbers = {
        split: sorted({int(u.speaker) - 90000 for u in listing.utterances})
        for split, listing in splits.items()
    }
    assert numbers["dev-clean"] == list(AN4_DEV_SPEAKERS)
    assert numbers["test-clean"] == list(TEST_NUMBERS)
    assert len(numbers["train-clean-100"]) == 66
    words_of = {u.id: u.words for u in splits["dev-clean"].utterances}
    assert words_of["90005-1-0251"] == "ENTER FOUR"
    assert words_of["90005-2-0007"] == "A M Y"
    for utterance in splits["test-clean"].utterances:
        speaker, chapter, _ = utterance.id.split("-")
        name = ("an251", "cen7")[int(chapter) - 1] + f"-{NAMES[int(speaker) - 90001]}-b"
        samples, rate = soundfile.read(root / utterance.path, dtype="int16")
        assert rate == 16000
        assert np.array_equal(samples, samples_of(name))
    assert sorted(path.name for path in (tmp_path / "an4").iterdir()) == ["LibriSpeech"]


@needs_speech
def test_an4_has_the_speakers_that_the_results_are_of():
    root = SPEECH / "an4" / "LibriSpeech"
    dev = {int(u.speaker) - 90000 for u in list_split(root, "dev-clean").utterances}
    assert dev == set(AN4_DEV_SPEAKERS)
    train = {int(u.speaker) - 90000 for u in list_split(root, "train-clean-100").utterances}
    assert train == set(range(1, 85)) - dev - set(TEST_NUMBERS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": NAMES[:80]}, "80 speakers; AN4 has 84"),
        ({"train": "<s> YES </s>\n"}, "an4_train.transcription, line 1"),
        ({"test": "YES (hello)\n"}, "'hello' is not the name"),
        ({"test": "YES (an9-faax-b)\n"}, "no .sph or .wav file of an9-faax-b"),
    ],
)
def test_another_archive_is_refused_and_leaves_nothing(tmp_path, capsys, options, message):
    archive = an4_archive(tmp_path / "a.tar.gz", **options)
    assert main(["an4", str(archive), str(tmp_path / "an4"), "--noprogressbar"]) == 2
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "an4").iterdir())


def test_what_is_there_already_is_kept(tmp_path, capsys):
    archive = an4_archive(tmp_path / "a.tar.gz")
    make_an4(archive, tmp_path / "an4", noprogressbar=True)
    assert main(["an4", str(archive), str(tmp_path / "an4")]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["an4", str(tmp_path / "none.tar.gz"), str(tmp_path / "other")]) == 2
    assert "No such file" in capsys.readouterr().err
    damaged = tmp_path / "damaged.tar.gz"
    damaged.write_bytes(archive.read_bytes()[:3000])
    assert main(["an4", str(damaged), str(tmp_path / "other"), "--noprogressbar"]) == 2
    assert "damaged" in capsys.readouterr().err


def librispeech(root: Path, ids) -> Path:
    """train-clean-100 with these utterances, whose words are their ids in letters."""
    samples = np.zeros(160, np.int16)
    for utterance_id in ids:
        speaker, chapter, _ = utterance_id.split("-")
        folder = root / "LibriSpeech" / "train-clean-100" / speaker / chapter
        folder.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / f"{utterance_id}.flac", samples, 16000)
        with open(folder / f"{speaker}-{chapter}.trans.txt", "a", encoding="utf-8") as lines:
            lines.write(f"{utterance_id} {words(utterance_id)}\n")
    return root


def words(utterance_id: str) -> str:
    return "".join(" " if c == "-" else chr(65 + int(c)) for c in utterance_id)


LISTED = {
    "103-1240-0000": "train-clean-5",
    "19-198-0007": "train-clean-5",
    "1737-146161-0004": "dev-clean-5",
    "32-21631-0001": "test-clean-5",
}
UNLISTED = ["103-1240-0001", "1737-146161-0005", "32-21625-0000"]


def test_mini_librispeech_is_copied_and_its_text_leaves_out_who_is_tested(tmp_path, monkeypatch):
    monkeypatch.setattr(make_corpus, "mini_librispeech_ids", lambda: LISTED)
    data = librispeech(tmp_path / "data", [*LISTED, *UNLISTED])
    arguments = [str(data), str(tmp_path / "mini"), "--noprogressbar"]
    assert main(["mini_librispeech", *arguments]) == 0
    root = tmp_path / "mini" / "LibriSpeech"
    for split in ("train-clean-5", "dev-clean-5", "test-clean-5"):
        listing = list_split(root, split)
        assert not listing.problems
        assert {u.id: u.words for u in listing.utterances} == {
            name: words(name) for name, its_split in LISTED.items() if its_split == split
        }
    with gzip.open(tmp_path / "mini" / "lm_text.txt.gz", "rt") as lines:
        heard = ["103-1240-0000", "103-1240-0001", "19-198-0007"]
        assert lines.read().splitlines() == [words(name) for name in heard]


def test_a_part_of_librispeech_is_refused(tmp_path, capsys):
    data = librispeech(tmp_path / "data", LISTED)
    assert main(["mini_librispeech", str(data), str(tmp_path / "mini")]) == 2
    num_missing = len(mini_librispeech_ids().keys() - LISTED.keys())
    assert f"lacks {num_missing} of the 1757 utterances" in capsys.readouterr().err
    assert main(["mini_librispeech", str(tmp_path / "data/LibriSpeech/none"), "mini"]) == 2
    assert "does not exist" in capsys.readouterr().err
    (tmp_path / "data/LibriSpeech/train-clean-100").rename(tmp_path / "data/LibriSpeech/other")
    assert main(["mini_librispeech", str(data), str(tmp_path / "mini")]) == 2
    assert "--download train-clean-100" in capsys.readouterr().err


@needs_speech
def test_the_list_is_that_of_the_corpus_that_the_results_are_of():
    root = SPEECH / "mini_librispeech" / "LibriSpeech"
    splits = ("train-clean-5", "dev-clean-5", "test-clean-5")
    in_folders = {
        utterance.id: split for split in splits for utterance in list_split(root, split).utterances
    }
    assert mini_librispeech_ids() == in_folders
