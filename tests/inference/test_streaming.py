"""Streams give what the whole gives in the same chunks, however they are cut and mixed."""

import hashlib
import itertools
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from inference import AudioError, Recognizer, StreamingRecognizer
from inference.bundle import main as bundle
from inference.chunks import chunks_of
from inference.streaming_text import Endpoints
from tests.inference import transcripts
from tests.inference.runs import make_run
from tools.make_ngram import estimate, write_arpa

CAUSAL = {"causal": True, "mamba_config": {"bidirectional": False}}
MODELS = {
    # With these random weights it hears many words in noise.
    "conmamba": {"seed": 62},
    "conformer": {"encoder_module": "conformer"},
    "mamba": {"encoder_module": "mamba"},
    "no lookahead": {"stream_lookahead": 0.0},
    "causal": CAUSAL,
}
SPEECH = Path(__file__).parents[3] / "shared" / "speech"
GREEDY = {"search": "greedy"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("streaming")
    return {
        name: make_run(folder / name, "CTC/demo_streaming", **options)
        for name, options in MODELS.items()
    }


@pytest.fixture(scope="module")
def offline(runs) -> dict[str, Recognizer]:
    return {name: Recognizer.from_run(run, device="cpu") for name, run in runs.items()}


@pytest.fixture(scope="module")
def streaming(runs) -> dict[str, StreamingRecognizer]:
    return {
        name: StreamingRecognizer.from_run(run, device="cpu", search=GREEDY)
        for name, run in runs.items()
    }


def noise(seconds: float, rate: int = 16000, seed: int = 0) -> np.ndarray:
    """Sound that changes all the time, so that texts are long."""
    generator = np.random.default_rng(seed)
    samples = int(seconds * rate)
    loudness = np.repeat(generator.uniform(0, 0.3, samples // 500 + 1), 500)[:samples]
    return (generator.standard_normal(samples) * loudness).astype(np.float32).clip(-1, 1)


def streamed(asr, wav_S, pieces, rate=16000):
    stream, start = asr.open(rate), 0
    for piece in itertools.cycle(pieces):
        asr.accept(stream, wav_S[start : start + piece])
        start += piece
        if start >= len(wav_S):
            return asr.finish(stream)


def assert_same(found, wanted):
    transcripts.assert_same(found, wanted)
    assert found.duration_s == pytest.approx(wanted.duration_s)
    assert [s.text for s in found.segments] == [s.text for s in wanted.segments]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("rate", [8000, 16000, 44100])
@settings(max_examples=6, deadline=None)
@given(
    seconds=st.floats(0, 4),
    pieces=st.lists(st.integers(1, 40_000), min_size=1, max_size=5),
)
def test_any_cutting_gives_what_the_whole_gives(offline, streaming, model, rate, seconds, pieces):
    wav_S = noise(seconds, rate)
    found = streamed(streaming[model], wav_S, pieces, rate)
    assert_same(found, offline[model].transcribe(wav_S, rate, chunk_ms=640, **GREEDY))


def test_samples_one_by_one(offline, streaming):
    wav_S = noise(0.9)
    found = streamed(streaming["conmamba"], wav_S, [1])
    assert found.text
    assert_same(found, offline["conmamba"].transcribe(wav_S, chunk_ms=640, **GREEDY))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("chunk_ms", [1280, 320, 160, 40])
def test_every_size_of_chunks_and_the_beam_search(runs, offline, model, chunk_ms):
    asr = StreamingRecognizer.from_run(runs[model], device="cpu", chunk_ms=chunk_ms)
    wav_S = noise(3.3)
    found = streamed(asr, wav_S, [5000, 100])
    assert found.words or model != "conmamba"
    assert_same(found, offline[model].transcribe(wav_S, chunk_ms=chunk_ms))


@pytest.mark.parametrize("model", ["conmamba", "mamba", "no lookahead"])
def test_chunks_overlap_as_asked(runs, model):
    wav_S, steps = noise(3.3), []
    for share in (None, 0.0, 0.25, 0.75):
        options = {"device": "cpu", "lookahead": share}
        asr = StreamingRecognizer.from_run(runs[model], search=GREEDY, **options)
        steps.append(asr._chunks.step)
        wanted = Recognizer.from_run(runs[model], **options).transcribe(
            wav_S, chunk_ms=640, **GREEDY
        )
        assert_same(streamed(asr, wav_S, [5000, 100]), wanted)
    assert steps == [16 if model == "no lookahead" else 8, 16, 12, 4]


def test_ngram_and_hotwords_go_on_from_chunk_to_chunk(runs, offline, tmp_path):
    wav_S = noise(12)
    plain = offline["conmamba"].transcribe(wav_S, chunk_ms=640, beam_size=8)
    words = sorted({word.text for word in plain.words})
    make_ngram_of(tmp_path / "words.arpa", words)
    search = {
        "beam_size": 8,
        "ngram": tmp_path / "words.arpa",
        "alpha": 0.7,
        "hotwords": {words[0]: 8.0, f"{words[-1]} {words[0]}": 5.0},
    }
    wanted = offline["conmamba"].transcribe(wav_S, chunk_ms=640, **search)
    assert wanted.text != plain.text
    asr = StreamingRecognizer.from_run(runs["conmamba"], device="cpu", search=search)
    assert_same(streamed(asr, wav_S, [1, 9000]), wanted)
    stream = asr.open()
    asr.accept(stream, wav_S[:30_000])
    stream = asr.restore(asr.save(stream))
    asr.accept(stream, wav_S[30_000:])
    assert_same(asr.finish(stream), wanted)


def make_ngram_of(path, words):
    """A bigram of these words, in every order equally likely."""
    with path.open("w", encoding="utf-8") as stream:
        write_arpa(estimate([[a, b] for a in words for b in words], 2), stream)


@pytest.mark.parametrize("model", MODELS)
def test_log_probabilities_are_those_of_the_whole(streaming, monkeypatch, model):
    asr, found = streaming[model], []
    advance = asr._texts.advance

    def recorded(texts, frames):
        found.extend(frames)
        advance(texts, frames)

    monkeypatch.setattr(asr._texts, "advance", recorded)
    wav_S = noise(5.1)
    stream = asr.open()
    others = [asr.open() for _ in range(2)]
    for start in range(0, len(wav_S), 7000):
        asr.accept(stream, wav_S[start : start + 7000])
        asr.result(stream)
        asr.accept(others[0], noise(0.04, seed=start))
    # The others have no full chunk yet: all that was found is the stream's.
    asr.flush(stream)
    _, log_probs_1TV, _ = asr.encode([wav_S], asr._chunks)
    np.testing.assert_allclose(np.concatenate(found), log_probs_1TV[0], rtol=0, atol=1e-4)
    for each in (stream, *others):
        asr.finish(each)


@pytest.mark.parametrize("model", MODELS)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 999))
def test_streams_start_pause_move_and_end_as_they_like(offline, runs, model, seed):
    draw = random.Random(seed)
    asr = StreamingRecognizer.from_run(runs[model], device="cpu", search=GREEDY, max_batch=3)
    waiting = [noise(draw.uniform(0, 4), seed=i) for i in range(5)]
    wanted = [offline[model].transcribe(wav_S, chunk_ms=640, **GREEDY) for wav_S in waiting]
    open_streams, found = {}, {}
    while len(found) < len(waiting):
        i = draw.randrange(len(waiting))
        if i in found:
            continue
        if i not in open_streams:
            open_streams[i] = asr.open(), 0
        stream, start = open_streams[i]
        if start >= len(waiting[i]):
            found[i] = asr.finish(stream)
            continue
        piece = draw.choice([1, 700, 11_000, 30_000])
        asr.accept(stream, waiting[i][start : start + piece])
        act = draw.choice([asr.result, asr.flush, lambda _: asr.step(), asr.save, lambda _: None])
        act(stream)
        if draw.random() < 0.3:
            data = asr.save(stream)
            asr.finish(stream)
            stream = asr.restore(data)
        open_streams[i] = stream, start + piece
    for i, transcript in found.items():
        assert_same(transcript, wanted[i])
    assert asr.num_streams == 0


def test_ready_streams_are_encoded_in_one_batch_in_turns(runs):
    asr = StreamingRecognizer.from_run(runs["conmamba"], device="cpu", search=GREEDY, max_batch=2)
    streams = [asr.open() for _ in range(3)]
    for stream in streams:
        asr.accept(stream, noise(1.0))
    asr.accept(asr.open(), noise(0.1))
    assert [asr.step() for _ in range(4)] == [2, 2, 2, 0]


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_a_stream_goes_on_in_another_process(runs, offline, rate):
    options = {"device": "cpu", "search": GREEDY, "endpoints": Endpoints(max_segment_s=1.5)}
    wav_S = noise(6, rate)
    one, other = (StreamingRecognizer.from_run(runs["conmamba"], **options) for _ in range(2))
    wanted = streamed(one, wav_S, [len(wav_S)], rate)
    assert len(wanted.segments) > 1
    stream = one.open(rate)
    for i, piece in enumerate(np.array_split(wav_S, 9)):
        one.accept(stream, piece)
        if i == 2:
            assert one.flush(stream).words
        stream = other.restore(one.save(stream))
        one, other = other, one
    assert_same(one.finish(stream), wanted)


def test_results_come_bit_by_bit_and_flush_gives_the_last_word(streaming, offline):
    asr, wav_S = streaming["conmamba"], noise(3)
    stream, texts = asr.open(), []
    for piece in np.array_split(wav_S, 10):
        asr.accept(stream, piece)
        result = asr.result(stream)
        assert not texts or result.text.startswith(texts[-1])
        texts.append(result.stable)
    assert result.duration_s == 3
    flushed = asr.flush(stream)
    assert_same(flushed, offline["conmamba"].transcribe(wav_S, chunk_ms=640, **GREEDY))
    assert len(flushed.text) > len(result.text)
    asr.accept(stream, wav_S)
    twice = np.concatenate([wav_S, wav_S])
    assert_same(asr.finish(stream), offline["conmamba"].transcribe(twice, chunk_ms=640, **GREEDY))


@pytest.mark.parametrize("model", ["conmamba", "conformer"])
def test_a_long_recording_in_chunks_is_encoded_as_a_stream(offline, model):
    wav_S = noise(4.2)
    at_once = offline[model].transcribe(wav_S, chunk_ms=320, **GREEDY)
    as_stream = offline[model].transcribe(wav_S, chunk_ms=320, batch_seconds=1.0, **GREEDY)
    assert_same(as_stream, at_once)


@settings(max_examples=30, deadline=None)
@given(num_samples=st.integers(0, 50_000))
def test_the_samples_that_are_needed_follow_from_the_model(streaming, num_samples):
    asr = streaming["conmamba"]
    frames = asr.model.encoder.num_frames(num_samples)

    def encoded(samples):
        behind = samples + asr._lead_samples - asr._chunk_samples
        return (behind // asr._step_samples + 1) * asr._chunks.step if behind >= 0 else 0

    needed = asr.samples_needed(num_samples)
    assert needed <= asr._chunk_samples
    assert encoded(num_samples + needed) >= frames
    assert needed == 0 or encoded(num_samples + needed - 1) < frames


def test_ten_minutes_of_silence_are_empty_and_cost_nothing(runs):
    asr = StreamingRecognizer.from_run(runs["causal"], device="cpu")
    # What random weights say of silence is not the blank.
    asr.model.ctc_lin.w.weight.zero_()
    asr.model.ctc_lin.w.bias.zero_()[0] = 9.0
    stream, sizes = asr.open(), []
    for _ in range(10):
        for _ in range(60):
            asr.accept(stream, np.zeros(16000, np.float32))
        assert asr.result(stream).text == ""
        sizes.append(len(asr.save(stream)))
        assert sum(len(part.counts_T) for part in stream._text.heard) * asr.model.frame_s <= 2.4
    # Of three seconds at most; ten minutes of samples would be 38 MB.
    assert max(sizes) - min(sizes) < 3 * 4 * 16000
    transcript = asr.finish(stream)
    assert (transcript.text, transcript.duration_s) == ("", 600)


def test_an_empty_stream_has_no_text(streaming):
    for num_samples in (0, 1, 300):
        transcript = streamed(streaming["conmamba"], np.zeros(num_samples, np.float32), [100])
        assert transcript.text == ""
        assert transcript.words == ()
        assert transcript.duration_s == num_samples / 16000


def test_one_bad_stream_leaves_the_others_alone(streaming, offline):
    asr, wav_S = streaming["conmamba"], noise(2)
    good, bad = asr.open(), asr.open(8000)
    for piece in np.array_split(wav_S, 5):
        asr.accept(good, piece)
        asr.accept(bad, noise(0.4, 8000))
        for samples in ([float("nan")], [1e30], np.zeros((2, 2, 2)), ["x"]):
            with pytest.raises(AudioError, match="stream"):
                asr.accept(bad, np.asarray(samples))
    wanted = offline["conmamba"].transcribe(wav_S, chunk_ms=640, **GREEDY)
    assert_same(asr.finish(good), wanted)
    for use in (asr.result, asr.flush, asr.finish, asr.save, lambda s: asr.accept(s, wav_S)):
        with pytest.raises(UserError, match="finished"):
            use(good)
    with pytest.raises(UserError, match="another recogniser"):
        streaming["mamba"].result(bad)
    asr.finish(bad)
    for rate in (0, -8000, 1_000_000, "16000", 16000.5):
        with pytest.raises(AudioError, match="sampling rate"):
            asr.open(rate)


def test_a_stream_of_another_model_or_version_is_refused(streaming, runs):
    asr = streaming["conmamba"]
    stream = asr.open()
    asr.accept(stream, noise(1))
    data = asr.save(stream)
    asr.finish(stream)
    with pytest.raises(UserError, match="model is another"):
        streaming["mamba"].restore(data)
    for options, named in (
        ({"chunk_ms": 320, "search": GREEDY}, "chunks"),
        ({"lookahead": 0, "search": GREEDY}, "chunks"),
        ({"search": {}}, "search"),
        ({"endpoints": None, "search": GREEDY}, "endpoints"),
    ):
        other = StreamingRecognizer.from_run(runs["conmamba"], device="cpu", **options)
        with pytest.raises(UserError, match=f"{named} is another"):
            other.restore(data)
    # Of 16 frames, half of them.
    same = StreamingRecognizer.from_run(
        runs["conmamba"], device="cpu", lookahead=0.52, search=GREEDY
    )
    same.finish(same.restore(data))
    hotwords = {"OWN": 1.0, "TWO": 2.0}, {"TWO": 2, "OWN": np.float64(1)}
    one, other = (
        StreamingRecognizer.from_run(runs["mamba"], device="cpu", search={"hotwords": phrases})
        for phrases in hotwords
    )
    other.finish(other.restore(one.save(one.open())))
    turned = bytearray(data)
    turned[-5] ^= 1
    for damaged in (b"", b"nothing", data[:-3], bytes(turned)):
        with pytest.raises(UserError, match="hold no stream"):
            asr.restore(damaged)
    later = data[32:].replace(b'"format":"3"', b'"format":"4"', 1)
    with pytest.raises(UserError, match="format '4'"):
        asr.restore(hashlib.sha256(later).digest() + later)
    assert asr.num_streams == 0
    # Statistics of the features are no weights.
    asr = StreamingRecognizer.from_run(runs["conmamba"], device="cpu", search=GREEDY)
    asr.model.encoder.normalize.glob_mean += 1
    with pytest.raises(UserError, match="model is another"):
        asr.restore(data)
    asr = StreamingRecognizer.from_run(
        runs["conmamba"], device="cpu", search=GREEDY, precision="bf16"
    )
    with pytest.raises(UserError, match="precision is another"):
        asr.restore(data)


def test_a_model_hears_as_many_chunks_back_as_in_training(tmp_path):
    run = make_run(
        tmp_path / "run", "CTC/demo_streaming", encoder_module="conformer", left_context_chunks=1
    )
    assert bundle([str(run), str(tmp_path / "bundle")]) == 0
    wav_S = noise(4)
    asr = StreamingRecognizer.from_run(run, device="cpu", search=GREEDY)
    _, wanted, _ = asr.encode([wav_S], chunks_of(asr.model, left_context_chunks=1))
    _, others, _ = asr.encode([wav_S], chunks_of(asr.model, left_context_chunks=8))
    assert not torch.equal(wanted, others)
    for recognizer in (asr, Recognizer.from_bundle(tmp_path / "bundle", device="cpu")):
        _, found, _ = recognizer.encode([wav_S], chunks_of(recognizer.model))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    wider = StreamingRecognizer.from_run(run, device="cpu", search=GREEDY, left_context_chunks=8)
    assert_same(streamed(wider, wav_S, [9000]), wider.transcribe(wav_S, chunk_ms=640, **GREEDY))


def test_a_stream_that_is_behind_lets_others_have_their_turn(streaming):
    import threading

    asr = streaming["conmamba"]
    behind, other, turns = asr.open(), asr.open(), []
    asr.accept(behind, noise(60))
    encoding = threading.Thread(target=asr.result, args=(behind,))
    encoding.start()
    while encoding.is_alive():
        asr.accept(other, noise(0.001))
        turns.append(behind._num_waiting)
    # Seen at many fill levels: not only before and after all of it.
    assert len(set(turns)) > 10
    for stream in (behind, other):
        asr.finish(stream)


def test_models_and_options_that_cannot_stream_say_what_can(runs, ctc_run):
    with pytest.raises(UserError, match=r"top_db=80.*_streaming\.yaml"):
        StreamingRecognizer.from_run(ctc_run, device="cpu")
    for chunk_ms in (0, -640, 650, float("nan"), float("inf")):
        with pytest.raises(UserError, match="multiple of 40 ms"):
            StreamingRecognizer.from_run(runs["conmamba"], device="cpu", chunk_ms=chunk_ms)
    with pytest.raises(UserError, match="give one"):
        Recognizer.from_run(ctc_run, device="cpu").transcribe(noise(1), whole=True, chunk_ms=640)
    with pytest.raises(UserError, match="max_batch"):
        StreamingRecognizer.from_run(runs["conmamba"], device="cpu", max_batch=0)
    with pytest.raises(UserError, match="left_context_chunks"):
        StreamingRecognizer.from_run(runs["conmamba"], device="cpu", left_context_chunks=-1)
    for share in (-0.5, 1.0, float("nan")):
        with pytest.raises(UserError, match="lookahead"):
            StreamingRecognizer.from_run(runs["conmamba"], device="cpu", lookahead=share)
    for model in ("conformer", "causal"):
        with pytest.raises(UserError, match="lookahead is of ConMamba and Mamba"):
            Recognizer.from_run(runs[model], device="cpu", lookahead=0.25)
    with pytest.raises(UserError, match="less than a frame of 40 ms"):
        StreamingRecognizer.from_run(runs["conmamba"], device="cpu", lookahead=0.2, chunk_ms=160)


@pytest.mark.parametrize("model", MODELS)
def test_real_speech(offline, streaming, model):
    files = sorted((SPEECH / "librispeech" / "LibriSpeech" / "dev-clean").rglob("*.flac"))[:2]
    if not files:
        pytest.skip(f"needs real speech in {SPEECH}")
    for file in files:
        wav_S, rate = soundfile.read(file, dtype="float32")
        found = streamed(streaming[model], wav_S, [3000, 1, 20_000], rate)
        assert_same(found, offline[model].transcribe(wav_S, rate, chunk_ms=640, **GREEDY))


def test_a_stream_whose_output_is_no_number_ends_alone(streaming, offline, monkeypatch):
    asr, wav_S = streaming["conmamba"], noise(2)
    good, bad = asr.open(), asr.open()
    for stream in (good, bad):
        asr.accept(stream, wav_S)
    forward = asr._forward

    def broken(wav_BS, *others):
        log_probs_BTV, state = forward(wav_BS, *others)
        if len(log_probs_BTV) == 2:
            log_probs_BTV[1] = np.nan
        return log_probs_BTV, state

    monkeypatch.setattr(asr, "_forward", broken)
    asr.step()
    assert asr.num_streams == 1
    for use in (asr.result, asr.finish):
        with pytest.raises(UserError, match="not finite with precision fp32"):
            use(bad)
    assert_same(asr.finish(good), offline["conmamba"].transcribe(wav_S, chunk_ms=640, **GREEDY))


def test_an_interrupted_chunk_is_not_lost(streaming, offline, monkeypatch):
    asr, wav_S = streaming["conmamba"], noise(2)
    streams = [asr.open(), asr.open()]
    for stream in streams:
        asr.accept(stream, wav_S)
    asr.step()

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        for owner, name in ((asr, "_forward"), (asr._texts, "advance")):
            patch.setattr(owner, name, interrupted)
            for act in (asr.step, lambda: asr.result(streams[0]), lambda: asr.finish(streams[0])):
                with pytest.raises(KeyboardInterrupt):
                    act()
            patch.undo()
    wanted = offline["conmamba"].transcribe(wav_S, chunk_ms=640, **GREEDY)
    for stream in streams:
        assert_same(asr.finish(stream), wanted)


def test_a_recording_given_at_once_is_not_copied_for_every_chunk(streaming):
    asr = streaming["conmamba"]
    stream, chunk = asr.open(), asr._chunk_samples
    asr.accept(stream, np.zeros(20 * chunk, np.float32))
    asr.step()
    waiting_S = stream._waiting[0]
    asr.step()
    assert np.shares_memory(stream._waiting[0], waiting_S)
    asr.result(stream)
    # And at its end all but the rest is free.
    assert stream._waiting[0].base is None
    asr.finish(stream)


def test_tensors_of_any_type_are_samples(streaming):
    asr, wav = streaming["conmamba"], torch.from_numpy(noise(1.3))
    wanted = streamed(asr, wav.numpy(), [9000])
    assert wanted.text
    for samples in (wav, wav.double(), wav.unsqueeze(1).expand(-1, 2)):
        assert_same(streamed(asr, samples, [9000]), wanted)
    assert streamed(asr, wav.bfloat16(), [9000]).duration_s == pytest.approx(1.3)


def test_a_joint_model_streams_with_its_ctc_branch(tmp_path, caplog):
    run = make_run(
        tmp_path / "joint",
        "S2S/demo",
        compute_features={"top_db": None},
        CNN={"padding": "causal"},
        normalize={"norm_type": "global"},
    )
    wav_S = noise(2.1)
    asr = StreamingRecognizer.from_run(run, device="cpu", search=GREEDY)
    assert "CTC branch" in caplog.text
    found = streamed(asr, wav_S, [5000])
    assert found.text
    wanted = Recognizer.from_run(run, device="cpu").transcribe(wav_S, chunk_ms=640, **GREEDY)
    assert_same(found, wanted)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("threads", [1, 2])
def test_in_a_fork_streams_go_on_or_are_refused(runs, threads):
    script = f"""
import os, signal, threading, time
import numpy as np
from common.errors import UserError
from inference import StreamingRecognizer
asr = StreamingRecognizer.from_run({str(runs["conmamba"])!r}, device="cpu", threads={threads})
stream = asr.open()
asr.accept(stream, np.zeros(20_000, np.float32))
data = asr.save(stream)
is_held, is_done = threading.Event(), []

def commit():
    with asr._lock:
        is_held.set()
        time.sleep(1)
        is_done.append(True)

thread = threading.Thread(target=commit)
thread.start()
is_held.wait()
if os.fork() == 0:
    signal.alarm(60)
    assert is_done, "half a commit"
    asr.accept(stream, np.zeros(20_000, np.float32))
    for call in (
        asr.open,
        asr.step,
        lambda: asr.restore(data),
        lambda: asr.save(stream),
        lambda: asr.result(stream),
        lambda: asr.flush(stream),
        lambda: asr.finish(stream),
    ):
        try:
            call()
            print("done", flush=True)
        except UserError as error:
            print(str(error).partition(" in another process")[0], flush=True)
    os._exit(0)
os.wait()
"""
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    answer = "done" if threads == 1 else "This recogniser was loaded"
    assert ran.stdout.splitlines() == [answer] * 7, ran.stderr


def test_threads_share_a_recogniser(streaming, offline):
    from concurrent.futures import ThreadPoolExecutor

    asr = streaming["conmamba"]
    sounds = [noise(1.5, seed=i) for i in range(8)]
    torch.set_num_threads(1)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda wav_S: streamed(asr, wav_S, [4000]), sounds))
    for wav_S, transcript in zip(sounds, found, strict=True):
        wanted = offline["conmamba"].transcribe(wav_S, chunk_ms=640, **GREEDY)
        assert_same(transcript, wanted)
