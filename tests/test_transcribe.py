"""The command transcribe.py: what it reads, writes and says, and with which exit status it ends."""

import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

import transcribe
from common.errors import EXIT_SIGINT, EXIT_USER_ERROR
from inference import Recognizer
from inference.command_line import DEFAULT_BOOST, exit_status, read_hotwords
from inference.formats import FORMATS
from tests.inference.command_lines import answer_of, assert_answers_without_torch
from tests.inference.recordings import SAMPLE_RATE, cut, flac_claiming, tone, wav_bytes
from tools.make_ngram import main as make_ngram

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def recognizer(tiny_bundle):
    return Recognizer.from_bundle(tiny_bundle, device="cpu")


@pytest.fixture(scope="module")
def recordings(tone_corpus):
    """Three recordings of different lengths."""
    return sorted((tone_corpus / "test-clean").rglob("*.flac"))


@pytest.fixture
def run(tiny_bundle, capsys):
    """Runs the command with the tiny model; returns (status, standard output, error)."""

    def run_command(*arguments, model=tiny_bundle):
        return answer_of(transcribe.main, [model, *arguments], capsys)

    return run_command


def test_help_and_mistakes_do_not_wait_for_torch(tmp_path):
    (tmp_path / "a.wav").write_bytes(wav_bytes(bytes(2000)))
    (tmp_path / "hotwords").write_text("ONE\tmuch\n", encoding="utf-8")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    model, audio = str(tmp_path / "model"), str(tmp_path / "a.wav")
    cases = [
        (["--help"], 0, ""),
        ([], 2, "required: MODEL"),
        ([model], 2, "There is nothing to transcribe"),
        ([model, audio, "--format", "txt,doc"], 2, "'doc' is none of the formats txt, json"),
        ([model, audio, "--beam_size", "0"], 2, "0 is not above zero"),
        ([model, audio, "--batch_seconds", "inf"], 2, "inf is not above zero"),
        ([model, audio, "--precision", "int3"], 2, "invalid choice"),
        ([model, audio, "--alternatives", "3", "--format", "txt,srt"], 2, "give --format json"),
        ([model, audio, "--channel", "-1"], 2, "channels are counted from 0"),
        ([model, audio, "--search", "greedy", "--beam_size", "4"], 2, "belongs to --search beam"),
        ([model, audio, "--search", "greedy", "--alpha", "1"], 2, "alpha belongs to --search beam"),
        ([model, audio, "--hotwords", str(tmp_path / "hotwords")], 2, "line 1: 'much' is no boost"),
        ([model, audio, "--hotwords", str(tmp_path / "none")], 2, "none: there is no such file"),
        ([model, audio, "--kenlm_model_path", "none.arpa"], 2, "none.arpa: there is no such file"),
        ([model, audio, "--output_dir", audio], 2, "cannot be made: File exists"),
        (["nowhere", audio], 2, "there is no folder nowhere. Train one (make demo"),
        ([str(tmp_path), audio], 2, "holds no model: a bundle has a config.json"),
        ([audio, audio], 2, "is a file; a model is a folder. Train one"),
    ]
    assert_answers_without_torch("transcribe", cases)


def test_one_recording_gives_its_text(run, recognizer, recordings):
    status, out, error = run(recordings[0])
    expected = recognizer.transcribe(recordings[0]).text
    assert expected
    assert (status, out, error) == (0, f"{expected}\n", "")


def test_a_run_is_a_model_too(run, tiny_run, recognizer, recordings):
    status, out, _ = run(recordings[0], model=tiny_run)
    assert (status, out) == (0, f"{recognizer.transcribe(recordings[0]).text}\n")


def test_several_recordings_give_lines_in_their_order(run, recognizer, recordings):
    status, out, _ = run(*recordings[::-1], "--batch_seconds", "2")
    assert status == 0
    expected = [f"{path}\t{recognizer.transcribe(path).text}" for path in recordings[::-1]]
    assert out.splitlines() == expected
    assert len(set(expected)) == 3


def test_every_format_at_once_into_a_folder(run, recognizer, recordings, tmp_path):
    status, out, _ = run(
        recordings[0].parent, "--format", ",".join(FORMATS), "--output_dir", tmp_path
    )
    assert (status, out) == (0, "")
    assert len(list(tmp_path.iterdir())) == len(recordings) * len(FORMATS)
    for path in recordings:
        transcript = recognizer.transcribe(path)
        for name, render in FORMATS.items():
            content = (tmp_path / f"{path.stem}.{name}").read_text(encoding="utf-8")
            if name == "json":
                found = json.loads(content)
                expected = json.loads(json.dumps({"file": str(path)} | transcript.as_dict()))
                # A batch rounds a confidence otherwise than a recording alone.
                assert found.keys() == expected.keys()
                assert found["text"] == expected["text"]
                for one, other in zip(found["words"], expected["words"], strict=True):
                    assert one["start_s"] == other["start_s"]
                    assert one["confidence"] == pytest.approx(other["confidence"], abs=1e-4)
            elif name == "ctm":
                assert content.startswith(f"{path.stem} 1 ")
            else:
                assert content == render(transcript, path.stem)


def test_folders_keep_their_subfolders_and_names_do_not_collide(run, tmp_path):
    for name in ("in/a.wav", "in/a.flac", "in/sub/a.wav"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / name, tone(0.3), SAMPLE_RATE)
    assert run(tmp_path / "in", "--output_dir", tmp_path / "out")[0] == 0
    written = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")}
    assert written == {"a.wav.txt", "a.flac.txt", "sub/a.txt"}


def test_bad_recordings_are_listed_and_the_others_transcribed(run, recordings, tmp_path):
    def put(name, content):
        (tmp_path / name).write_bytes(content)

    pcm = (tone() * 32767).astype("<i2").tobytes()
    put("empty.wav", b"")
    put("text.wav", b"Dear Sir or Madam\n" * 100)
    for name, value in (("nan", np.nan), ("infinite", np.inf)):
        samples = tone()
        samples[7] = value
        put(f"{name}.wav", wav_bytes(samples.tobytes(), is_float=True))
    soundfile.write(tmp_path / "fast.wav", tone(), 2_000_000)
    bad = {"empty.wav", "text.wav", "nan.wav", "infinite.wav", "fast.wav"}
    bad |= {"missing.wav", "nothing", "*.none"}

    soundfile.write(tmp_path / "silence.wav", np.zeros(SAMPLE_RATE), SAMPLE_RATE)
    soundfile.write(tmp_path / "brief.wav", tone(0.05), SAMPLE_RATE)
    put("no_samples.wav", wav_bytes(b""))
    put("one_sample.wav", wav_bytes(b"\1\0"))
    put("promises.wav", wav_bytes(pcm, claimed=10**6))
    soundfile.write(tmp_path / "loud.wav", 100 * tone(), SAMPLE_RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "channels.wav", np.stack([tone()] * 8, axis=1), SAMPLE_RATE)
    soundfile.write(tmp_path / "rate.flac", tone(1.0, 655_350), 655_350)
    flac_claiming(tmp_path / "claims.flac", 10**6)
    cut(tmp_path / "cut.flac", recordings[0])
    good = {path.name for path in tmp_path.iterdir()} - bad

    (tmp_path / "nothing").mkdir()
    arguments = [tmp_path / "missing.wav", tmp_path / "nothing", tmp_path / "*.none"]
    arguments += sorted(tmp_path.glob("*.*"))
    status, out, error = run(*arguments, "--format", "txt,json", "--output_dir", tmp_path / "out")
    assert (status, out) == (1, "")
    assert {path.stem for path in (tmp_path / "out").glob("*.txt")} == {
        name.rpartition(".")[0] for name in good
    }
    warnings, _, failures = error.partition(f"\n{len(bad)} could not be transcribed:\n")
    assert {Path(line.strip().partition(": ")[0]).name for line in failures.splitlines()} == bad
    told = {Path(line.partition(": ")[0]).name for line in warnings.splitlines()}
    assert told == {"cut.flac", "claims.flac", "promises.wav", "loud.wav"}
    for name in ("no_samples", "one_sample"):
        assert json.loads((tmp_path / "out" / f"{name}.json").read_text())["text"] == ""


@pytest.mark.parametrize("search", ["beam", "greedy"])
def test_what_is_shorter_than_a_frame_has_no_text_in_any_batch(recognizer, recordings, search):
    wav_S = recognizer.load(recordings[0])
    waveforms = [wav_S[:399], wav_S, wav_S[:0], wav_S[:1]]
    transcripts = recognizer.transcribe_batch(waveforms, search=search)
    assert [bool(transcript.text) for transcript in transcripts] == [False, True, False, False]
    assert [transcript.duration_s for transcript in transcripts] == [
        len(wav_S) / SAMPLE_RATE for wav_S in waveforms
    ]
    assert recognizer.transcribe_batch(waveforms[:1], search=search) == transcripts[:1]


def test_a_result_whose_name_cannot_be_leaves_the_others(run, recordings, tmp_path):
    content, folder = Path(recordings[0]).read_bytes(), tmp_path / "in"
    folder.mkdir()
    (folder / "b.txt").mkdir()
    names = ["a.flac", "b.flac", "b.txt/c.flac", f"{'n' * 251}.au", "z.flac"]
    for name in names:
        (folder / name).write_bytes(content)
    status, out, err = run(folder, "--output_dir", tmp_path / "out", "--format", "json,txt")
    assert (status, out) == (1, "")
    assert "2 could not be transcribed" in err
    assert "n.json cannot be written: File name too long." in err
    assert "b.txt cannot be made: File exists." in err
    text = (tmp_path / "out" / "a.txt").read_text(encoding="utf-8")
    assert (tmp_path / "out" / "z.txt").read_text(encoding="utf-8") == text


def test_nothing_but_bad_recordings(run, tmp_path):
    status, out, error = run(tmp_path)
    assert (status, out) == (1, "")
    assert f"{tmp_path}: no audio in this folder" in error


def test_standard_input_is_a_recording(run, recognizer, recordings, tmp_path, monkeypatch):
    expected = recognizer.transcribe(recordings[1]).text
    for destination in ([], ["--output_dir", tmp_path]):
        stream = io.BytesIO(recordings[1].read_bytes())
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=stream))
        assert run("-", *destination)[:2] == (0, "" if destination else f"{expected}\n")
    assert (tmp_path / "stdin.txt").read_text(encoding="utf-8") == f"{expected}\n"
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"")))
    status, _, error = run("-")
    assert status == 1
    assert "the file is empty" in error


def test_a_channel_is_chosen(run, recognizer, recordings, tmp_path):
    wav_S, _ = soundfile.read(recordings[0], dtype="float32")
    soundfile.write(
        tmp_path / "a.wav", np.stack([tone(len(wav_S) / SAMPLE_RATE), wav_S], 1), SAMPLE_RATE
    )
    expected = recognizer.transcribe(recordings[0]).text
    assert run(tmp_path / "a.wav", "--channel", "1")[1] == f"{expected}\n"
    assert run(tmp_path / "a.wav", "--channel", "0")[1] != f"{expected}\n"
    status, _, error = run(tmp_path / "a.wav", "--channel", "2")
    assert status == 1
    assert "there is no channel 2; it has 2, counted from 0" in error


def test_the_search_is_as_asked_for(run, recognizer, recordings, tmp_path):
    (tmp_path / "hotwords").write_text("ZERO\t20\n\none two\n", encoding="utf-8")
    corpus = tmp_path / "lm.txt"
    corpus.write_text("ONE TWO THREE\nZERO ONE\n" * 5, encoding="utf-8")
    make_ngram([str(corpus), "--output", str(tmp_path / "lm.arpa"), "--order", "2"])
    cases = [
        (["--search", "greedy"], {"search": "greedy"}),
        (["--beam_size", "1"], {"beam_size": 1}),
        (["--hotwords", tmp_path / "hotwords"], {"hotwords": {"ZERO": 20, "one two": 10}}),
        (
            ["--kenlm_model_path", tmp_path / "lm.arpa", "--alpha", "3", "--beta", "2"],
            {"ngram": tmp_path / "lm.arpa", "alpha": 3.0, "beta": 2.0},
        ),
    ]
    texts = set()
    for arguments, options in cases:
        status, out, _ = run(recordings[2], *arguments)
        assert (status, out) == (0, recognizer.transcribe(recordings[2], **options).text + "\n")
        texts.add(out)
    assert len(texts) > 1


def test_a_search_that_cannot_be_is_one_message(run, recordings, tmp_path):
    (tmp_path / "hotwords").write_text("ÄÖÜ\n", encoding="utf-8")
    (tmp_path / "lm.arpa").write_text("no n-gram\n", encoding="utf-8")
    for option, message in (
        (["--hotwords", tmp_path / "hotwords"], "characters that the vocabulary lacks"),
        (["--kenlm_model_path", tmp_path / "lm.arpa"], "is no ARPA file"),
        (["--device", "abacus"], "device abacus"),
    ):
        arguments = [recordings[0], *option]
        status, out, error = run(*arguments)
        assert (status, out) == (EXIT_USER_ERROR, "")
        assert error.startswith("error: ")
        assert message in error
        assert len(error.splitlines()) == 1


@pytest.mark.parametrize("missing", ["model.safetensors", "tokenizer.model"])
def test_a_half_written_model_is_one_message(run, tiny_bundle, recordings, tmp_path, missing):
    for path in tiny_bundle.iterdir():
        if path.name != missing:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    status, _, error = run(recordings[0], model=tmp_path)
    assert status == EXIT_USER_ERROR
    assert error.startswith("error: ")
    assert missing in error
    assert len(error.splitlines()) == 1


def test_precision_and_threads(run, recordings):
    before = torch.get_num_threads()
    try:
        assert run(recordings[0], "--precision", "bf16", "--threads", "1")[0] == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_progress_goes_to_standard_error(tiny_bundle, recordings, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    arguments = [str(tiny_bundle), *map(str, recordings), "--device", "cpu", "--format", "ctm"]
    assert transcribe.main(arguments) == 0
    captured = capsys.readouterr()
    assert "100%" in captured.err
    assert captured.err.count("audio seconds per second") >= 2
    assert {len(line.split()) for line in captured.out.splitlines()} == {6}


def test_hotwords_are_read_with_and_without_boosts(tmp_path):
    (tmp_path / "words").write_text("\ufeffNEW YORK\t8\n \nBOSTON\nZOË\t-2.5\n", encoding="utf-8")
    expected = {"NEW YORK": 8.0, "BOSTON": DEFAULT_BOOST, "ZOË": -2.5}
    assert read_hotwords(tmp_path / "words") == expected


def raising(error):
    def work(arguments):
        raise error

    return work


def test_interruptions_and_full_memory_have_a_message_and_a_status(capsys):
    arguments = SimpleNamespace(batch_seconds=120.0)
    assert exit_status(raising(KeyboardInterrupt()), arguments) == EXIT_SIGINT
    for error in (MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate ...")):
        assert exit_status(raising(error), arguments) == EXIT_USER_ERROR
    assert capsys.readouterr().err.count("less than --batch_seconds 120") == 2
    with pytest.raises(RuntimeError, match="another"):
        exit_status(raising(RuntimeError("another memory format")), arguments)
    assert exit_status(raising(OSError(28, "No space left on device")), arguments) == 2
    assert capsys.readouterr().err == "error: No space left on device\n"


def test_recordings_may_stand_behind_options(run, recordings):
    first, *others = recordings
    expected = run(*recordings, "--format", "json")
    assert expected[0] == 0
    assert run(first, "--format", "json", *others) == expected
    assert run("--format", "json", *recordings) == expected


@pytest.mark.parametrize(
    ("arguments", "recordings", "is_whole"),
    [
        ("m --whole -- -x.wav", "-x.wav", True),
        ("m a.wav --format json b.wav -- -x.wav --whole", "a.wav b.wav -x.wav --whole", False),
        ("m -- a.wav -- b.wav", "a.wav -- b.wav", False),
        ("-- m -x.wav", "-x.wav", False),
        ("--format json -- m --whole --", "--whole --", False),
        ("m --", "", False),
    ],
)
def test_behind_two_dashes_nothing_is_an_option(arguments, recordings, is_whole):
    found = transcribe.parse(arguments.split())
    assert (found.model, found.audio, found.whole) == ("m", recordings.split(), is_whole)
    assert found.format == ["json" if "json" in arguments else "txt"]


def test_two_dashes_are_no_value_and_no_model(capsys):
    for arguments, message in (
        (["m", "--output_dir", "--", "a.wav"], "--output_dir: expected one argument"),
        (["--whole", "--"], "required: MODEL"),
    ):
        with pytest.raises(SystemExit):
            transcribe.parse(arguments)
        assert message in capsys.readouterr().err


def test_a_recording_may_be_too_long(run, recordings, tmp_path):
    soundfile.write(tmp_path / "long.wav", tone(9.0), SAMPLE_RATE)
    status, out, err = run(recordings[0], tmp_path / "long.wav", "--max_duration_s", 8.5)
    assert status == 1
    assert out.count("\n") == 1
    assert "long.wav: is longer than the 8.5 s" in err
    assert run(tmp_path / "long.wav", "--max_duration_s", 9)[0] == 0


def test_names_with_line_ends_stay_in_their_line(run, recordings, tmp_path):
    odd = tmp_path / "new\nline\t\u202f.flac"
    odd.write_bytes(recordings[0].read_bytes())
    _, out, _ = run(odd, recordings[0])
    assert len(out.splitlines()) == 2
    assert out.startswith(f"{tmp_path}/new\\nline\\t\u202f.flac\t")


def test_closed_standard_streams_are_told(tiny_bundle, recordings):
    for arguments, message in (
        (f"{recordings[0]} >&-", "error: Standard output is closed: give --output_dir."),
        ("- <&-", "-: standard input is closed"),
    ):
        command = f"{sys.executable} -m transcribe {tiny_bundle} --device cpu {arguments}"
        ran = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
        assert ran.returncode
        assert message in ran.stderr
        assert "Traceback" not in ran.stderr


@pytest.mark.parametrize("options", ["", "--noprogressbar"])
def test_without_standard_error_it_is_the_same(tiny_bundle, recordings, options):
    command = f"{sys.executable} -m transcribe {tiny_bundle} --device cpu {options}"
    ran = [
        subprocess.run(
            f"{command} {recordings[0]} nowhere.wav {closed}",
            **{"shell": True, "stdout": subprocess.PIPE, "text": True, "timeout": 120},
        )
        for closed in ("2>/dev/null", "2>&-")
    ]
    assert ran[0].stdout.strip()
    assert (ran[1].stdout, ran[1].returncode) == (ran[0].stdout, 1)


def test_alternatives_are_asked_of_the_search(run, recognizer, recordings):
    status, out, _ = run(recordings[0], "--format", "json", "--alternatives", 2)
    assert status == 0
    wanted = recognizer.transcribe(recordings[0], alternatives=2).alternatives
    assert tuple(json.loads(out)["alternatives"]) == wanted
    greedy = ("--format", "json", "--alternatives", 1, "--search", "greedy")
    status, _, err = run(recordings[0], *greedy)
    assert (status, "alternatives need search beam" in err) == (EXIT_USER_ERROR, True)
