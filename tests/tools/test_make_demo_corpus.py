import json
import shutil

import numpy as np
import pytest
import soundfile

from corpora.librispeech import find_splits, list_split
from corpora.synthetic import speech
from corpora.synthetic.voices import SPLITS
from librispeech_prepare import prepare_librispeech
from tools.make_demo_corpus import RECORD_NAME, main, make_demo_corpus

pytest.importorskip("espeakng_loader", reason="espeak-ng is not installed (extra 'demo')")


def make(folder, **options):
    options = {"num_utterances": 3, "num_eval_utterances": 1, "noprogressbar": True, **options}
    return make_demo_corpus(folder, **options)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_demo_corpus(tmp_path_factory.mktemp("tiny"), "tiny", noprogressbar=True)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make(tmp_path_factory.mktemp("small"))


@pytest.fixture
def copy(small, tmp_path):
    return shutil.copytree(small.parent, tmp_path / "copy") / "LibriSpeech"


def contents(root):
    return {
        str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


def test_it_has_librispeechs_layout_and_can_be_prepared(tiny, tmp_path):
    assert set(find_splits(tiny)) == set(SPLITS)
    prepare_librispeech(tiny, tmp_path, list(SPLITS), verify=True, noprogressbar=True)
    assert len(list_split(tiny, "train-clean-100").utterances) == 12
    for path in tiny.rglob("*.flac"):
        info = soundfile.info(path)
        assert (info.samplerate, info.channels, info.subtype) == (16000, 1, "PCM_16")
        assert 1.0 < info.duration < 6.0


def test_speakers_and_sentences_of_the_splits_are_disjoint(tiny):
    listings = [list_split(tiny, split).utterances for split in SPLITS]
    speakers = [{utterance.speaker for utterance in listing} for listing in listings]
    words = [utterance.words for listing in listings for utterance in listing]
    assert sum(map(len, speakers)) == len(set().union(*speakers))
    assert len(set(words)) == len(words)


def test_the_same_options_give_the_same_bytes(tiny, tmp_path):
    again = make_demo_corpus(tmp_path, "tiny", num_workers=5, noprogressbar=True)
    assert contents(again) == contents(tiny)


def test_another_seed_gives_other_sentences(small, tmp_path):
    other = make(tmp_path, seed=2)
    name = next(path.relative_to(small) for path in small.rglob("*.trans.txt"))
    assert (other / name).read_text() != (small / name).read_text()


def test_the_size_of_training_leaves_the_other_splits_alone(small, tmp_path):
    larger = contents(make(tmp_path, num_utterances=5))
    for name, content in contents(small).items():
        if not name.startswith(("train-clean-100", "SPEAKERS")):
            assert larger[name] == content
    assert sum(name.endswith(".flac") for name in larger) == 5 + 3


def test_test_other_is_noisier_than_test_clean(tiny):
    def pause_level_db(split):
        """Level of the first 50 ms, which are always silent, below that of the whole."""
        levels = []
        for path in (tiny / split).rglob("*.flac"):
            audio, _ = soundfile.read(path)
            levels.append(10 * np.log10(np.mean(audio[:800] ** 2) / np.mean(audio**2)))
        return np.median(levels)

    assert pause_level_db("test-other") > pause_level_db("test-clean") + 8


def test_a_second_call_does_nothing(copy):
    # A copy has other file times than the record knows: made once more, and then no more.
    make(copy.parent)
    before = {path: path.stat().st_mtime_ns for path in copy.parent.rglob("*")}
    assert make(copy.parent) == copy
    assert {path: path.stat().st_mtime_ns for path in copy.parent.rglob("*")} == before


@pytest.mark.parametrize("damage", ["missing", "cut", "other options", "no record of contents"])
def test_a_corpus_that_is_not_whole_or_not_the_one_is_made_again(small, copy, damage):
    victim = next(copy.rglob("*.flac"))
    record = copy.parent / RECORD_NAME
    if damage == "missing":
        victim.unlink()
    elif damage == "cut":
        victim.write_bytes(victim.read_bytes()[:1000])
    elif damage == "other options":
        shutil.rmtree(copy)
        make(copy.parent, num_utterances=1)
    else:
        record.write_text(json.dumps({"options": {}}))
    make(copy.parent)
    assert contents(copy) == contents(small)
    assert {path.name for path in copy.parent.iterdir()} == {"LibriSpeech", RECORD_NAME}


def test_a_corpus_of_somebody_else_is_not_overwritten(tmp_path):
    real = tmp_path / "LibriSpeech" / "train-clean-100"
    real.mkdir(parents=True)
    with pytest.raises(ValueError, match="will not be overwritten"):
        make(tmp_path)
    assert real.is_dir()


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of breath")

    monkeypatch.setattr(speech, "speak", fail)
    with pytest.raises(RuntimeError, match="out of breath"):
        make(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [({"size": "huge"}, "known are demo, tiny"), ({"num_utterances": 0}, "needs an utterance")],
)
def test_impossible_sizes_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **options)


def test_the_command_line_makes_the_corpus_with_a_progress_bar(tmp_path, capsys):
    arguments = ["--folder", str(tmp_path), "--num_utterances", "1", "--num_eval_utterances", "1"]
    assert main(arguments) == 0
    output = capsys.readouterr()
    assert output.out == f"data folder: {tmp_path / 'LibriSpeech'}\n"
    assert "4/4" in output.err


def test_without_espeak_the_command_line_names_the_installation(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speech.importlib.util, "find_spec", lambda name: None)
    assert main(["--folder", str(tmp_path)]) == 1
    assert "pip install -e '.[demo]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
