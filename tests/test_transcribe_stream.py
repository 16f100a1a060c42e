"""transcribe.py --stream: text while the recording is played, or while one speaks."""

import json
import signal
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

import transcribe
from common.errors import EXIT_USER_ERROR
from inference import Recognizer, StreamingRecognizer, live
from tests.inference.runs import make_run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("model") / "run", "CTC/demo_streaming")


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    samples = np.random.default_rng(1).normal(0, 0.1, 24_000).clip(-1, 1)
    path = tmp_path_factory.mktemp("audio") / "noise.wav"
    soundfile.write(path, samples, 16_000)
    return path


@pytest.fixture(scope="module")
def wanted(model, recording) -> str:
    recognizer = Recognizer.from_run(model, device="cpu")
    return recognizer.transcribe(recording, chunk_ms=640, search="greedy").text


@pytest.fixture
def run(model, capsys):
    """Runs the command; returns (status, standard output, error)."""

    def run_command(*arguments):
        capsys.readouterr()
        options = ["--device", "cpu", "--search", "greedy", str(model)]
        status = transcribe.main([*options, *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run_command


def test_the_text_is_that_of_the_whole_in_chunks(run, recording, wanted):
    assert wanted
    for options in (["--stream", "--speed", "max"], ["--chunk_ms", "640"]):
        status, out, _ = run(recording, *options)
        assert (status, out) == (0, f"{wanted}\n")
    _, out, _ = run(recording, recording, "--stream", "--speed", "max")
    assert out == f"{recording}\t{wanted}\n" * 2


def test_short_chunks_do_not_pile_up(model):
    search = {"search": "greedy"}
    asr = StreamingRecognizer.from_run(model, device="cpu", chunk_ms=40, search=search)
    wav_S, waiting = np.zeros(16_000, np.float32), []

    def pieces():
        for piece_S in live.played(wav_S, 16_000, float("inf")):
            yield piece_S
            waiting.append(asr._streams[0]._num_waiting)

    live.listen(asr, pieces(), 16_000, shows_partial=False)
    assert max(waiting) < 640


def test_options_that_do_nothing_together_are_refused(run, recording):
    for options, message in (
        (["--stream", "--whole"], "exclude each other"),
        (["--speed", "2"], "--speed is of --stream"),
        (["--stream", "--max_segment_s", "0"], "max_segment_s is 0"),
        (["--lookahead", "0.5"], "--lookahead is of chunks"),
        (["--stream", "--lookahead", "1"], "lookahead is 1"),
    ):
        status, out, err = run(recording, *options)
        assert (status, out) == (EXIT_USER_ERROR, "")
        assert message in err


def test_the_length_of_segments_can_be_given(run, recording):
    status, out, _ = run(
        recording, "--stream", "--speed", "max", "--format", "json", "--max_segment_s", "0.5"
    )
    assert status == 0
    assert len(json.loads(out)["segments"]) > 1


def test_a_recording_in_chunks_is_cut_like_its_stream(run, recording):
    found = []
    for how in (["--stream", "--speed", "max"], ["--chunk_ms", "640"]):
        options = ["--format", "json", "--max_segment_s", "0.5", "--lookahead", "0.25"]
        status, out, _ = run(recording, *how, *options)
        assert status == 0
        found.append(json.loads(out)["segments"])
    assert found[0] == found[1]


def test_a_recording_is_played_in_real_time(run, recording, monkeypatch):
    started, slept = time.monotonic(), []
    monkeypatch.setattr(live.time, "sleep", slept.append)
    assert run(recording, "--stream")[0] == 0
    assert len(slept) == 15
    # Nothing really sleeps here: each wait is that from the beginning.
    assert slept[-1] == pytest.approx(1.5, abs=time.monotonic() - started)


def test_a_terminal_shows_what_was_understood_so_far(run, recording, wanted, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    status, out, err = run(recording, "--stream", "--speed", "max")
    assert (status, out) == (0, f"{wanted}\n")
    shown = [line for line in err.split("\r\x1b[K") if line and "bundle" not in line]
    assert shown
    assert all(wanted.startswith(line) for line in shown)
    assert err.endswith("\r\x1b[K")


def test_ctrl_c_ends_with_the_text_so_far(run, recording, model, monkeypatch):
    def interrupted(wav_S, sample_rate, speed):
        yield wav_S[:20_000]
        raise KeyboardInterrupt

    monkeypatch.setattr(live, "played", interrupted)
    status, out, _ = run(recording, recording, "--stream")
    samples, _ = soundfile.read(recording, dtype="float32")
    recognizer = Recognizer.from_run(model, device="cpu")
    so_far = recognizer.transcribe(samples[:20_000], chunk_ms=640, search="greedy").text
    assert (status, out) == (0, f"{recording}\t{so_far}\n")


def test_ctrl_c_while_a_chunk_is_recognised_loses_nothing(run, recording, model, monkeypatch):
    forward, heard = live.StreamingRecognizer._forward, []

    def interrupted(self, wav_BS, *arguments):
        heard.append(len(wav_BS))
        if len(heard) == 2:
            signal.raise_signal(signal.SIGINT)
        return forward(self, wav_BS, *arguments)

    monkeypatch.setattr(live.StreamingRecognizer, "_forward", interrupted)
    status, out, _ = run(recording, recording, "--stream", "--speed", "max")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    # The second chunk, of 640 ms like the first, was full after 1.3 s.
    samples, _ = soundfile.read(recording, dtype="float32")
    recognizer = Recognizer.from_run(model, device="cpu")
    so_far = recognizer.transcribe(samples[:20_800], chunk_ms=640, search="greedy").text
    assert (status, out) == (0, f"{recording}\t{so_far}\n")


def test_the_microphone_is_heard(run, recording, wanted, monkeypatch):
    samples, _ = soundfile.read(recording, dtype="float32")

    class InputStream:
        def __init__(self, rate, channels, dtype, callback):
            assert (rate, channels, dtype) == (16_000, 1, "float32")
            self.callback = callback

        def __enter__(self):
            for piece_S in np.array_split(samples, 7):
                self.callback(piece_S[:, None], len(piece_S), None, None)

        def __exit__(self, *_):
            pass

    class Heard(live.queue.SimpleQueue):
        def get(self):
            if self.empty():
                raise KeyboardInterrupt
            return super().get()

    fake = SimpleNamespace(InputStream=InputStream, PortAudioError=OSError)
    monkeypatch.setitem(sys.modules, "sounddevice", fake)
    monkeypatch.setattr(live.queue, "SimpleQueue", Heard)
    status, out, _ = run("--stream", "--microphone")
    assert (status, out) == (0, f"{wanted}\n")

    def no_device(*_, **__):
        raise OSError("no default input device")

    fake.InputStream = no_device
    status, _, err = run("--stream", "--microphone")
    assert status == EXIT_USER_ERROR
    assert "no default input device" in err


def test_without_sounddevice_the_microphone_names_it(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    status, _, err = run("--stream", "--microphone")
    assert status == EXIT_USER_ERROR
    assert "pip install sounddevice" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to transcribe"),
        (["--microphone"], "--stream"),
        (["a.wav", "--stream", "--microphone"], "without recordings"),
    ],
)
def test_contradictions_are_one_message(run, arguments, message):
    status, _, err = run(*arguments)
    assert status == EXIT_USER_ERROR
    assert message in err


def test_a_recording_that_cannot_be_read_leaves_the_others(run, recording, wanted, tmp_path):
    (tmp_path / "bad.wav").write_bytes(b"RIFF nothing")
    status, out, err = run(tmp_path / "bad.wav", recording, "--stream", "--speed", "max")
    assert status == 1
    assert out == f"{recording}\t{wanted}\n"
    assert "bad.wav" in err


def test_other_models_say_what_can_be_done(capsys, tiny_run, recording):
    status = transcribe.main(["--device", "cpu", str(tiny_run), str(recording), "--stream"])
    assert status == EXIT_USER_ERROR
    assert "_streaming.yaml" in capsys.readouterr().err
