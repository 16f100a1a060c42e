import hashlib
import inspect
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from speechbrain.dataio.dataset import DynamicItemDataset

import librispeech_prepare
from corpora import download
from corpora.manifest import read_manifest
from librispeech_prepare import PreparationError, find_data_root, main, prepare_librispeech
from tests.generated_corpus import make_corpus

REPOSITORY = Path(__file__).parent.parent
SPLITS = {"train-clean-100": 5, "dev-clean": 3, "test-clean": 2}


@pytest.fixture
def data(tmp_path):
    return make_corpus(tmp_path / "LibriSpeech", SPLITS)


@pytest.fixture
def save(tmp_path):
    return tmp_path / "manifests"


def prepare(data, save, **options):
    options = {"tr_splits": ["train-clean-100"], "dev_splits": ["dev-clean"], **options}
    prepare_librispeech(data, save, noprogressbar=True, **options)


def chapter_of(data, split="dev-clean"):
    speaker = {"train-clean-100": "101", "dev-clean": "102", "test-clean": "103"}[split]
    return data / split / speaker / "1"


def audio_of(data, number=0, split="dev-clean"):
    chapter = chapter_of(data, split)
    return chapter / f"{chapter.parent.name}-1-{number:04d}.flac"


def stamps(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def manifests(save):
    return sorted(path.name for path in save.glob("*.csv")) if save.exists() else []


def test_the_signature_begins_with_speechbrains():
    names = list(inspect.signature(prepare_librispeech).parameters)
    assert names[:10] == [
        "data_folder",
        "save_folder",
        "tr_splits",
        "dev_splits",
        "te_splits",
        "select_n_sentences",
        "merge_lst",
        "merge_name",
        "create_lexicon",
        "skip_prep",
    ]


def test_a_manifest_holds_every_utterance_of_its_split(data, save):
    prepare(data, save, te_splits=["test-clean"])
    assert manifests(save) == ["dev-clean.csv", "test-clean.csv", "train-clean-100.csv"]
    text = (save / "dev-clean.csv").read_text()
    assert text.splitlines()[0] == "ID,duration,wav,spk_id,wrd"
    rows = read_manifest(save / "dev-clean.csv")
    transcripts = (chapter_of(data) / "102-1.trans.txt").read_text().splitlines()
    assert [f"{row.ID} {row.wrd}" for row in rows] == transcripts
    for row in rows:
        assert row.wav == f"$data_root/dev-clean/102/1/{row.ID}.flac"
        assert row.spk_id == "102"
        info = soundfile.info(row.wav.replace("$data_root", str(data)))
        assert row.duration == info.frames / 16000


def test_speechbrain_loads_the_manifest_with_the_data_root(data, save):
    prepare(data.parent, save)
    root = find_data_root(data.parent)
    dataset = DynamicItemDataset.from_csv(
        str(save / "dev-clean.csv"), replacements={"data_root": str(root)}
    )
    dataset.set_output_keys(["wav", "duration"])
    for item in dataset:
        assert soundfile.info(item["wav"]).frames == round(item["duration"] * 16000)


def test_a_second_run_writes_nothing(data, save):
    prepare(data, save, merge_lst=["train-clean-100", "dev-clean"], merge_name="all.csv")
    before = stamps(save)
    prepare(data, save, merge_lst=["train-clean-100", "dev-clean"], merge_name="all.csv")
    assert stamps(save) == before


def test_a_moved_corpus_keeps_its_moved_manifests(data, save, tmp_path):
    prepare(data, save)
    before = stamps(save)
    data = shutil.move(data, tmp_path / "other" / "LibriSpeech")
    save = Path(shutil.move(save, tmp_path / "kept"))
    prepare(data, save)
    assert stamps(save) == before


@pytest.fixture
def three_speakers(data):
    for speaker in ("7", "8"):
        chapter = data / "train-clean-100" / speaker / "1"
        chapter.mkdir(parents=True)
        for number in range(2):
            source = audio_of(data, number, "train-clean-100")
            shutil.copy(source, chapter / f"{speaker}-1-{number:04d}.flac")
        (chapter / f"{speaker}-1.trans.txt").write_text(f"{speaker}-1-0000 A\n{speaker}-1-0001 B\n")
    return data


HELD_OUT = "train-clean-100-held-out"


def speakers_of(save, split):
    return {row.spk_id for row in read_manifest(save / f"{split}.csv")}


def test_held_out_speakers_are_a_split_of_their_own(three_speakers, save):
    options = {"held_out_speakers": [8], "merge_lst": ["train-clean-100"], "merge_name": "t.csv"}
    prepare(three_speakers, save, dev_splits=[HELD_OUT], te_splits=["dev-clean"], **options)
    assert speakers_of(save, "train-clean-100") == speakers_of(save, "t") == {"101", "7"}
    assert speakers_of(save, HELD_OUT) == {"8"}
    assert len(read_manifest(save / f"{HELD_OUT}.csv")) == 2
    before = stamps(save)
    prepare(three_speakers, save, dev_splits=[HELD_OUT], te_splits=["dev-clean"], **options)
    assert stamps(save) == before
    # Others to hold out are other manifests; scored alone, the split needs no training split.
    prepare(three_speakers, save, tr_splits=[], dev_splits=[HELD_OUT], held_out_speakers=["7"])
    assert speakers_of(save, HELD_OUT) == {"7"}
    prepare(three_speakers, save, held_out_speakers=["7"])
    assert speakers_of(save, "train-clean-100") == {"101", "8"}
    prepare(three_speakers, save)
    assert speakers_of(save, "train-clean-100") == {"101", "7", "8"}


def test_scored_alone_a_held_out_split_may_lack_some_of_the_speakers(three_speakers, save):
    alone = {"tr_splits": [], "dev_splits": [HELD_OUT]}
    prepare(three_speakers, save, **alone, held_out_speakers=[7, "of another split"])
    assert speakers_of(save, HELD_OUT) == {"7"}
    with pytest.raises(ValueError, match=f"{HELD_OUT} is empty"):
        prepare(three_speakers, save, **alone, held_out_speakers=["of another split"])


def test_utterances_of_held_out_speakers_count_in_the_size_of_a_split(
    three_speakers, save, monkeypatch, caplog
):
    monkeypatch.setitem(librispeech_prepare.OFFICIAL_NUM_UTTERANCES, "train-clean-100", 9)
    prepare(three_speakers, save, held_out_speakers=[7])
    assert "LibriSpeech's has 9" not in caplog.text


@pytest.mark.parametrize(
    ("speakers", "message"),
    [
        (["8", "102"], r"held_out_speakers names 102, no speaker of train-clean-100"),
        ([7, 8, 101], r"held_out_speakers names every speaker of train-clean-100"),
    ],
)
def test_held_out_speakers_that_cannot_be(three_speakers, save, speakers, message):
    with pytest.raises(ValueError, match=message):
        prepare(three_speakers, save, dev_splits=[HELD_OUT], held_out_speakers=speakers)
    assert manifests(save) == []


def test_a_held_out_split_needs_held_out_speakers(three_speakers, save):
    with pytest.raises(ValueError, match=rf"missing in .*: {HELD_OUT}.* --held_out_speakers"):
        prepare(three_speakers, save, dev_splits=[HELD_OUT])
    shutil.copytree(three_speakers / "dev-clean", three_speakers / "own")
    with pytest.raises(ValueError, match="own-held-out is empty"):
        prepare(
            three_speakers,
            save,
            tr_splits=["train-clean-100", "own"],
            dev_splits=["own-held-out"],
            held_out_speakers=[7],
        )


def replace_audio(data, save):
    soundfile.write(audio_of(data), np.full(777, 0.1), 16000)


def add_an_utterance(data, save):
    shutil.copy(audio_of(data), audio_of(data, 7))
    with open(chapter_of(data) / "102-1.trans.txt", "a") as stream:
        stream.write("102-1-0007 ONE MORE\n")


def edit_a_transcript_keeping_size_and_time(data, save):
    path = chapter_of(data) / "102-1.trans.txt"
    stat = path.stat()
    path.write_text(path.read_text().replace("E", "F"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def cut_the_manifest_short(data, save):
    os.truncate(save / "dev-clean.csv", (save / "dev-clean.csv").stat().st_size - 20)


def drop_the_last_row(data, save):
    lines = (save / "dev-clean.csv").read_text().splitlines(keepends=True)
    (save / "dev-clean.csv").write_text("".join(lines[:-1]))


def delete_the_manifest(data, save):
    (save / "dev-clean.csv").unlink()


def swap_manifests(data, save):
    shutil.copy(save / "train-clean-100.csv", save / "dev-clean.csv")


def break_the_record(data, save):
    (save / librispeech_prepare.RECORD_NAME).write_text('{"format": 1, "files"')
    cut_the_manifest_short(data, save)


@pytest.mark.parametrize(
    "change",
    [
        replace_audio,
        add_an_utterance,
        edit_a_transcript_keeping_size_and_time,
        cut_the_manifest_short,
        drop_the_last_row,
        delete_the_manifest,
        swap_manifests,
        break_the_record,
    ],
)
def test_a_manifest_that_no_longer_fits_is_made_again(data, save, tmp_path, change):
    prepare(data, save)
    change(data, save)
    prepare(data, save)
    prepare(data, tmp_path / "fresh")
    for name in manifests(save):
        assert (save / name).read_text() == (tmp_path / "fresh" / name).read_text()


def test_only_the_split_that_changed_is_made_again(data, save):
    prepare(data, save)
    before = stamps(save)
    replace_audio(data, save)
    prepare(data, save)
    after = stamps(save)
    assert after["train-clean-100.csv"] == before["train-clean-100.csv"]
    assert after["dev-clean.csv"] != before["dev-clean.csv"]


@pytest.mark.parametrize(
    "options", [{"select_n_sentences": 2}, {"skip_bad": True}, {"verify": True}]
)
def test_a_manifest_made_with_other_options_is_made_again(data, save, options):
    prepare(data, save)
    before = stamps(save)
    prepare(data, save, **options)
    assert stamps(save)["dev-clean.csv"] != before["dev-clean.csv"]


def test_a_verified_manifest_serves_who_did_not_ask_for_it(data, save):
    prepare(data, save, verify=True)
    before = stamps(save)
    prepare(data, save)
    assert stamps(save) == before
    # What an older version verified was not searched for samples that are not finite.
    record = save / "librispeech_prepare.json"
    record.write_text(record.read_text().replace('"verified": "finite"', '"verified": true'))
    prepare(data, save)
    assert stamps(save)["dev-clean.csv"] == before["dev-clean.csv"]
    prepare(data, save, verify=True)
    assert stamps(save)["dev-clean.csv"] != before["dev-clean.csv"]


def test_another_corpus_under_the_same_names_is_noticed(data, save, tmp_path):
    prepare(data, save)
    other = make_corpus(tmp_path / "other" / "LibriSpeech", SPLITS, num_words=4)
    prepare(other, save)
    words = [row.wrd for row in read_manifest(save / "dev-clean.csv")]
    transcripts = (chapter_of(other) / "102-1.trans.txt").read_text().splitlines()
    assert words == [line.partition(" ")[2] for line in transcripts]


BAD_AUDIO = {
    "missing audio": lambda path: path.unlink(),
    "empty file": lambda path: path.write_bytes(b""),
    "unreadable: Format not recognised": lambda path: path.write_bytes(b"RIFF" + bytes(100)),
    "wrongly sampled: 8000 Hz": lambda path: soundfile.write(path, np.zeros(800), 8000),
    "2 channels": lambda path: soundfile.write(path, np.zeros((800, 2)), 16000),
    "missing transcript": lambda path: shutil.copy(path, path.with_name("102-1-0008.flac")),
}


def test_all_problems_of_all_splits_are_in_one_error_and_no_manifest_is_left(data, save):
    data = make_corpus(data.parent / "bad", {"train-clean-100": 1, "dev-clean": 6})
    prepare(data, save)
    soundfile.write(audio_of(data, split="train-clean-100"), np.zeros(10), 22050)
    for number, damage in enumerate(BAD_AUDIO.values()):
        damage(audio_of(data, number))
    with pytest.raises(PreparationError) as caught:
        prepare(data, save)
    message = str(caught.value)
    assert message.startswith("7 utterances in ")
    assert "train-clean-100/101/1/101-1-0000.flac (101-1-0000): wrongly sampled" in message
    for number, reason in enumerate(list(BAD_AUDIO)[:-1]):
        suffix = "" if reason == "missing audio" else ".flac"
        place = f"dev-clean/102/1/102-1-{number:04d}{suffix} (102-1-{number:04d})"
        assert f"{place}: {reason}" in message
    assert "(102-1-0008): missing transcript" in message
    assert "--skip_bad" in message
    assert manifests(save) == []


def test_the_first_twenty_problems_are_shown_and_the_rest_counted(tmp_path, save):
    data = make_corpus(tmp_path / "many", {"dev-clean": 27})
    for path in (data / "dev-clean").rglob("*.flac"):
        path.write_bytes(b"")
    with pytest.raises(PreparationError) as caught:
        prepare_librispeech(data, save, dev_splits=["dev-clean"], noprogressbar=True)
    message = str(caught.value)
    assert message.count("empty file") == 20
    assert "27 utterances" in message
    assert "and 7 more" in message
    assert len(caught.value.problems) == 27


def test_skip_bad_leaves_the_bad_ones_out_and_says_how_many(data, save, caplog):
    BAD_AUDIO["empty file"](audio_of(data, 0))
    BAD_AUDIO["missing audio"](audio_of(data, 2))
    for _ in range(2):
        caplog.clear()
        prepare(data, save, skip_bad=True)
        assert "dev-clean: 2 unusable utterances were left out" in caplog.text
        assert [row.ID for row in read_manifest(save / "dev-clean.csv")] == ["102-1-0001"]
    with pytest.raises(PreparationError):
        prepare(data, save)
    assert "dev-clean.csv" not in manifests(save)


def test_skip_bad_does_not_make_an_empty_manifest(data, save):
    for number in range(3):
        BAD_AUDIO["empty file"](audio_of(data, number))
    with pytest.raises(ValueError, match="all 3 utterances are unusable"):
        prepare(data, save, skip_bad=True)
    assert manifests(save) == []


def test_verify_finds_audio_that_was_cut_short(data, save):
    prepare(data, save)
    path = audio_of(data, 1)
    os.truncate(path, path.stat().st_size // 2)
    prepare(data, save)
    with pytest.raises(PreparationError, match=r"102-1-0001.*(cut short|damaged)"):
        prepare(data, save, verify=True)
    assert "dev-clean.csv" not in manifests(save)


def test_a_missing_split_is_an_error_that_lists_the_splits_found(data, save):
    with pytest.raises(
        ValueError, match=r"missing in .*: dev-other.*dev-clean, test-clean, train-clean-100"
    ):
        prepare(data, save, te_splits=["test-clean", "dev-other"])
    assert manifests(save) == []


def test_a_split_without_readable_audio_says_what_it_holds_instead(data, save):
    folder = data / "own" / "1" / "1"
    folder.mkdir(parents=True)
    (folder / "1-1-0000.m4a").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds no utterances.*\.m4a, read are .*\.flac"):
        prepare(data, save, te_splits=["own"])


def test_formats_may_be_mixed(data, save):
    for number, suffix in enumerate([".opus", ".WAV", ".ogg"]):
        path = audio_of(data, number)
        samples, rate = soundfile.read(path)
        kind = {"format": "OGG", "subtype": "OPUS"} if suffix == ".opus" else {}
        soundfile.write(path.with_suffix(suffix), samples, rate, **kind)
        path.unlink()
    prepare(data, save)
    rows = read_manifest(save / "dev-clean.csv")
    assert [Path(row.wav).suffix for row in rows] == [".opus", ".WAV", ".ogg"]


def test_two_recordings_of_one_id_are_ambiguous(data, save):
    path = audio_of(data, 0)
    shutil.copy(path, path.with_suffix(".wav"))
    with pytest.raises(PreparationError, match=r"ambiguous audio: \.flac and \.wav of one id"):
        prepare(data, save)


def test_an_official_split_with_another_number_of_utterances_is_a_warning(data, save, caplog):
    make_corpus(data / "new", {"my-split": 1})
    (data / "new" / "my-split").rename(data / "my-split")
    prepare(data, save, te_splits=["my-split"])
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert any("dev-clean holds 3 utterances, LibriSpeech's has 2703" in w for w in warnings)
    assert not any("my-split" in w for w in warnings)


@pytest.mark.parametrize(("number", "counts"), [(2, [2, 2]), ([4, 1], [4, 1]), (9, [5, 3])])
def test_the_first_sentences_are_selected(data, save, number, counts):
    prepare(data, save, select_n_sentences=number)
    rows = [read_manifest(save / f"{split}.csv") for split in ("train-clean-100", "dev-clean")]
    assert [len(split) for split in rows] == counts
    assert rows[1][0].ID == "102-1-0000"


def test_what_is_not_selected_is_not_checked(data, save):
    audio_of(data, 2).write_bytes(b"")
    shutil.copy(audio_of(data, 0), audio_of(data, 8))
    options = {"tr_splits": [], "dev_splits": ["dev-clean"]}
    prepare(data, save, select_n_sentences=2, **options)
    assert [row.ID for row in read_manifest(save / "dev-clean.csv")] == ["102-1-0000", "102-1-0001"]
    with pytest.raises(PreparationError, match=r"(?s)1 utterance in .*102-1-0002\.flac.*empty"):
        prepare(data, save, select_n_sentences=3, **options)
    # The second would be the third, were its transcript there.
    lines = (chapter_of(data) / "102-1.trans.txt").read_text().splitlines(keepends=True)
    (chapter_of(data) / "102-1.trans.txt").write_text(lines[0] + lines[2])
    with pytest.raises(PreparationError, match=r"102-1-0001\.flac .*missing transcript"):
        prepare(data, save, select_n_sentences=2, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tr_splits": [], "dev_splits": []}, "no split to prepare"),
        ({"te_splits": ["../test-clean"]}, "is not the name of a split"),
        ({"select_n_sentences": [1]}, "1 numbers for 2 splits"),
        ({"select_n_sentences": 0}, "keeps 0 utterances"),
        ({"te_splits": ["dev-clean"], "select_n_sentences": [1, 2, 3]}, "named twice"),
        ({"merge_lst": ["dev-clean"]}, "merge_name is not given"),
        ({"merge_lst": ["test-clean"], "merge_name": "a"}, "merge_lst names test-clean"),
        ({"merge_lst": ["dev-clean"], "merge_name": "lexicon.csv"}, "another file of this run"),
        (
            {"merge_lst": ["dev-clean", "train-clean-100"], "merge_name": "dev-clean.csv"},
            "another file of this run",
        ),
        ({"merge_lst": ["dev-clean"], "merge_name": "../a.csv"}, "is not a file name"),
        ({"num_workers": 0}, "at least one thread"),
        (
            {"create_lexicon": True, "lexicon_file": "missing.txt"},
            "missing.txt: there is no such",
        ),
    ],
)
def test_contradicting_options_are_refused(data, save, options, message):
    with pytest.raises(ValueError, match=message):
        prepare(data, save, **options)


def test_one_split_may_be_given_as_a_string(data, save):
    prepare(data, save, tr_splits="train-clean-100", dev_splits="train-clean-100")
    assert manifests(save) == ["train-clean-100.csv"]


def test_merged_manifests_follow_their_sources(data, save):
    options = {"merge_lst": ["dev-clean", "train-clean-100"], "merge_name": "train"}
    prepare(data, save, **options)
    parts = [read_manifest(save / f"{split}.csv") for split in options["merge_lst"]]
    assert read_manifest(save / "train.csv") == parts[0] + parts[1]
    add_an_utterance(data, save)
    prepare(data, save, **options)
    assert len(read_manifest(save / "train.csv")) == len(parts[0]) + len(parts[1]) + 1
    audio_of(data).write_bytes(b"")
    with pytest.raises(PreparationError):
        prepare(data, save, **options)
    assert manifests(save) == ["train-clean-100.csv"]


def test_one_split_merged_into_its_own_name_is_that_split(data, save):
    prepare(data, save, merge_lst=["dev-clean"], merge_name="dev-clean.csv")
    before = stamps(save)
    assert len(read_manifest(save / "dev-clean.csv")) == 3
    prepare(data, save, merge_lst=["dev-clean"], merge_name="dev-clean.csv")
    assert stamps(save) == before


def test_the_lexicon_is_written_once_and_again_when_its_source_or_seed_changes(data, save):
    source = data / "librispeech-lexicon.txt"
    source.write_text("".join(f"W{number} AH0\n" for number in range(300)))
    prepare(data, save, create_lexicon=True)
    before = stamps(save)
    assert {"lexicon.csv", "lexicon_tr.csv", "lexicon_dev.csv", "lexicon_test.csv"} <= set(before)
    prepare(data, save, create_lexicon=True)
    assert stamps(save) == before
    test_part = (save / "lexicon_test.csv").read_text()
    prepare(data, save, create_lexicon=True, seed=7)
    assert (save / "lexicon_test.csv").read_text() != test_part
    source.write_text("ONE W AH1 N\n")
    prepare(data, save, create_lexicon=True)
    assert (save / "lexicon.csv").read_text() == "ID,duration,char,phn\n0,3,O N E,W AH N\n"


def test_skip_prep_does_nothing(save):
    prepare_librispeech("no such folder", save, ["train-clean-100"], skip_prep=True)
    assert not save.exists()


def test_a_failed_write_leaves_no_manifest_that_passes_for_whole(data, save, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        prepare(data, save)
    monkeypatch.undo()
    assert manifests(save) == []
    prepare(data, save)
    assert len(read_manifest(save / "dev-clean.csv")) == 3


def test_the_progress_bar_counts_files(data, save, capsys):
    prepare_librispeech(data, save, ["train-clean-100"])
    assert "reading train-clean-100: 100%" in capsys.readouterr().err


def command(*arguments):
    return subprocess.run(
        [sys.executable, "librispeech_prepare.py", *map(str, arguments)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_line_prepares(data, save):
    done = command(
        *("--data_folder", data, "--save_folder", save, "--tr_splits", "train-clean-100"),
        *("--dev_splits", "dev-clean", "--te_splits", "test-clean"),
        *("--select_n_sentences", 3, 2, 1, "--merge_lst", "dev-clean", "test-clean"),
        *("--merge_name", "eval.csv", "--verify", "--noprogressbar"),
    )
    assert done.returncode == 0, done.stderr
    counts = {name: len(read_manifest(save / name)) for name in manifests(save)}
    assert counts == {"train-clean-100.csv": 3, "dev-clean.csv": 2, "test-clean.csv": 1} | {
        "eval.csv": 3
    }


def test_every_argument_of_the_function_is_a_flag(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for name in inspect.signature(prepare_librispeech).parameters:
        assert f"--{name}" in text


def test_a_users_error_on_the_command_line_is_one_message(data, save):
    done = command("--data_folder", data, "--save_folder", save, "--te_splits", "test-other")
    assert done.returncode == 1
    assert done.stderr.startswith("librispeech_prepare.py: error: missing in ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--data_folder", "nowhere", "--save_folder", "s", "--tr_splits", "a"], 1, "nowhere"),
        (["--data_folder", "d", "--save_folder", "s"], 1, "no split to prepare"),
        (["--data_folder", "d", "--tr_splits", "train-clean-100"], 2, "--save_folder"),
        (["--save_folder", "s", "--tr_splits", "a"], 2, "--data_folder"),
        (["--data_folder", "d", "--download", "train-cleen"], 1, "cannot download train-cleen"),
    ],
)
def test_wrong_arguments_are_one_message_and_a_status(
    arguments, status, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    try:
        returned = main(arguments)
    except SystemExit as stopped:
        returned = stopped.code
    assert returned == status
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def mirror(data, tmp_path, monkeypatch):
    """A folder served as ``file://`` that holds dev-clean's archive, and the archive's MD5."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.add(data / "dev-clean", "LibriSpeech/dev-clean")
    folder = tmp_path / "mirror"
    folder.mkdir()
    (folder / "dev-clean.tar.gz").write_bytes(buffer.getvalue())
    digest = hashlib.md5(buffer.getvalue()).hexdigest()
    monkeypatch.setitem(download.ARCHIVE_MD5, "dev-clean", digest)
    return folder.as_uri()


@pytest.mark.parametrize("folder", ["data", "data/LibriSpeech"])
def test_download_and_prepare_in_one_command(mirror, tmp_path, save, folder):
    arguments = ["--data_folder", str(tmp_path / folder), "--download", "dev-clean"]
    arguments += ["--download_url", mirror, "--noprogressbar"]
    assert main(arguments) == 0
    assert (tmp_path / "data/LibriSpeech/dev-clean/102/1/102-1-0000.flac").is_file()
    assert main([*arguments, "--save_folder", str(save), "--dev_splits", "dev-clean"]) == 0
    assert len(read_manifest(save / "dev-clean.csv")) == 3


def test_a_bad_checksum_is_one_message(mirror, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(download.ARCHIVE_MD5, "dev-clean", "0" * 32)
    arguments = ["--data_folder", str(tmp_path / "data"), "--download", "dev-clean"]
    assert main([*arguments, "--download_url", mirror, "--noprogressbar"]) == 1
    assert "instead of " + "0" * 32 in capsys.readouterr().err
    assert not (tmp_path / "data" / "LibriSpeech").exists()


SHARED = REPOSITORY / ".." / "shared" / "speech"
SHARED_COUNTS = {
    "an4": {"train-clean-100": 846, "dev-clean": 102},
    "mini_librispeech": {"train-clean-5": 1456, "dev-clean-5": 172, "test-clean-5": 129},
    "librispeech": {"train-clean-100": 262, "dev-clean": 21, "test-clean": 23, "test-other": 31},
    "digits": {"train-clean-100": 78, "dev-clean": 38},
    "malayalam": {"train-clean-100": 80, "dev-clean": 16},
}


@pytest.mark.parametrize("name", SHARED_COUNTS)
def test_real_corpora_are_prepared_and_verified(name, save):
    if not (SHARED / name).is_dir():
        pytest.skip(f"the {name} recordings are not at ../shared/speech/{name}")
    counts = SHARED_COUNTS[name]
    verify = name != "mini_librispeech"  # six hours, of which decoding takes a minute
    prepare_librispeech(SHARED / name, save, list(counts), verify=verify, noprogressbar=True)
    for split, count in counts.items():
        assert len(read_manifest(save / f"{split}.csv")) == count
    record = json.loads((save / librispeech_prepare.RECORD_NAME).read_text())
    assert set(record["files"]) == {f"{split}.csv" for split in counts}
