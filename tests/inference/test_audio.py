"""Reading recordings: formats, rates, channels, and what is said of each that is bad."""

import io
import os
import sys
import threading
import tracemalloc

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from inference import audio
from inference.audio import AudioError, as_waveform, load_audio
from tests.inference.recordings import (
    SAMPLE_RATE,
    cut,
    flac_claiming,
    make_video,
    tone,
    wav_bytes,
)

WAVE = tone()
PCM = (WAVE * 32767).astype("<i2").tobytes()
FORMATS = {
    "wav": {},
    "flac": {},
    "mp3": {},
    "ogg": {},
    "opus": {"format": "OGG", "subtype": "OPUS"},
    "aiff": {},
    "au": {},
    "caf": {},
    "w64": {},
    "sph": {"format": "NIST"},
    "rf64": {"format": "RF64"},
    "voc": {"subtype": "PCM_16"},
}


def fill(pipe: int, content: bytes) -> None:
    with open(pipe, "wb") as stream:
        stream.write(content)


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_is_read_from_a_path_bytes_and_a_pipe(tmp_path, suffix, caplog):
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, WAVE, SAMPLE_RATE, **FORMATS[suffix])
    wav_S = load_audio(path, SAMPLE_RATE)
    assert wav_S.dtype == np.float32
    assert wav_S.shape == WAVE.shape
    assert np.corrcoef(wav_S, WAVE)[0, 1] > 0.97
    np.testing.assert_array_equal(load_audio(path.read_bytes(), SAMPLE_RATE), wav_S)
    with open(path, "rb") as stream:
        np.testing.assert_array_equal(load_audio(stream, SAMPLE_RATE), wav_S)
    read, write = os.pipe()
    writer = threading.Thread(target=fill, args=(write, path.read_bytes()))
    writer.start()
    with open(read, "rb") as stream:
        np.testing.assert_array_equal(load_audio(stream, SAMPLE_RATE), wav_S)
    writer.join()
    assert not caplog.records


@pytest.mark.skipif(sys.platform != "linux", reason="names are any bytes on Linux alone")
@pytest.mark.parametrize("suffix", ["wav", "mp4"])
def test_a_name_that_is_no_text(tmp_path, suffix):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9." + suffix.encode())
    if suffix == "wav":
        soundfile.write(path.encode("utf-8", "surrogateescape"), WAVE, SAMPLE_RATE)
    else:
        pytest.importorskip("av", reason="needs pip install -e '.[media]'")
        make_video(tmp_path / "a.mp4").rename(path)
    assert len(load_audio(path, SAMPLE_RATE)) > 4000
    os.truncate(path, 0)
    with pytest.raises(AudioError, match="the file is empty"):
        load_audio(path, SAMPLE_RATE)


@pytest.mark.parametrize("content", ["wav", "noise"])
def test_a_file_called_raw_is_read_or_refused(tmp_path, content):
    # libsndfile's binding asks for a sampling rate, whatever is in it.
    path = tmp_path / "a.raw"
    path.write_bytes(wav_bytes(PCM) if content == "wav" else bytes(range(256)) * 9)
    if content == "wav":
        pytest.importorskip("av", reason="needs pip install -e '.[media]'")
        assert len(load_audio(path, SAMPLE_RATE)) == len(WAVE)
    else:
        with pytest.raises(AudioError, match=r"a\.raw: cannot be read"):
            load_audio(path, SAMPLE_RATE)


@pytest.mark.parametrize("late_s", [0.0, 2.0])
def test_sound_is_where_the_times_of_a_container_have_it(tmp_path, late_s):
    av = pytest.importorskip("av", reason="needs pip install -e '.[media]'")
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        picture = container.add_stream("mpeg4", rate=10)
        picture.width = picture.height = 32
        picture.pix_fmt = "yuv420p"
        sound = container.add_stream("pcm_s16le", rate=SAMPLE_RATE, layout="mono")
        black = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        container.mux(picture.encode(black))
        for at_s in (late_s, late_s + 3.0):
            samples = np.full((1, SAMPLE_RATE), 8192, np.int16)
            block = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
            block.sample_rate, block.pts = SAMPLE_RATE, round(at_s * SAMPLE_RATE)
            container.mux(sound.encode(block))
        container.mux(picture.encode(None))
        container.mux(sound.encode(None))
    wav_S = load_audio(tmp_path / "a.mkv", SAMPLE_RATE)
    is_loud = wav_S > 0.1
    wanted = np.zeros(round((late_s + 4) * SAMPLE_RATE), bool)
    for at_s in (late_s, late_s + 3.0):
        wanted[round(at_s * SAMPLE_RATE) :][:SAMPLE_RATE] = True
    assert len(wav_S) == len(wanted)
    assert (is_loud != wanted).mean() < 0.01


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_named_pipe_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(wav_bytes(PCM)))
    writer.start()
    assert len(load_audio(tmp_path / "pipe", SAMPLE_RATE)) == len(WAVE)
    writer.join()


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "ogg", "opus"])
def test_blocks_do_not_show(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, tone(5.0), SAMPLE_RATE, **FORMATS[suffix])
    whole, _ = soundfile.read(path, dtype="float32")
    monkeypatch.setattr(audio, "_BLOCK_VALUES", 20_000)
    np.testing.assert_allclose(load_audio(path, SAMPLE_RATE), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rate", [8000, 44100])
def test_blocks_of_another_rate_are_resampled_as_one(tmp_path, monkeypatch, rate):
    stereo_SC = np.stack([tone(3.0, rate), 0.5 * tone(3.0, rate)], axis=1)
    soundfile.write(tmp_path / "a.wav", stereo_SC, rate, subtype="FLOAT")
    whole = soxr.resample(stereo_SC.mean(1), rate, SAMPLE_RATE, quality="VHQ")
    monkeypatch.setattr(audio, "_BLOCK_VALUES", 2_002)
    np.testing.assert_allclose(load_audio(tmp_path / "a.wav", SAMPLE_RATE), whole, atol=1e-6)
    np.testing.assert_allclose(as_waveform(stereo_SC, rate, SAMPLE_RATE), whole, atol=1e-6)


def test_of_a_long_file_what_is_kept_is_the_result(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.tile(tone(1.0, 44100)[:, None], (240, 2)), 44100)
    tracemalloc.start()
    wav_S = load_audio(tmp_path / "a.wav", SAMPLE_RATE)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # The result, an eighth of room to grow, and some blocks; decoded, the file has 85 MB.
    assert peak_bytes < 1.125 * wav_S.nbytes + 20e6


@pytest.mark.parametrize("rate", [100, 8000, 11025, 44100, 48000, 192_000, 655_350])
def test_any_rate_is_resampled(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", tone(1.0, rate), rate)
    wav_S = load_audio(tmp_path / "a.wav", SAMPLE_RATE)
    assert len(wav_S) == pytest.approx(SAMPLE_RATE, abs=2)
    if rate >= 8000:
        # The tone is where it was: 220 whole periods.
        assert np.abs(np.fft.rfft(wav_S[:SAMPLE_RATE])).argmax() == 220


def test_channels_are_mixed_or_chosen(tmp_path):
    samples_SC = np.stack([WAVE * (c + 1) / 10 for c in range(8)], axis=1)
    soundfile.write(tmp_path / "a.wav", samples_SC, SAMPLE_RATE, subtype="FLOAT")
    np.testing.assert_allclose(load_audio(tmp_path / "a.wav", SAMPLE_RATE), 0.45 * WAVE, atol=1e-6)
    third = load_audio(tmp_path / "a.wav", SAMPLE_RATE, channel=2)
    np.testing.assert_allclose(third, 0.3 * WAVE, atol=1e-6)
    with pytest.raises(AudioError, match="no channel 8; it has 8, counted from 0"):
        load_audio(tmp_path / "a.wav", SAMPLE_RATE, channel=8)


@pytest.mark.parametrize("factor", [3.0, 32768.0, 1e37])
def test_float_samples_beyond_full_scale_are_made_quieter_not_clipped(tmp_path, factor):
    stereo_SC = np.stack([WAVE, WAVE], axis=1) * np.float32(factor)
    soundfile.write(tmp_path / "a.wav", stereo_SC, SAMPLE_RATE, subtype="FLOAT")
    wav_S = load_audio(tmp_path / "a.wav", SAMPLE_RATE)
    np.testing.assert_allclose(wav_S, WAVE / np.abs(WAVE).max(), atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "scale", "offset", "step"),
    [
        ("int16", 2**15, 0, 2**-15),
        ("int32", 2**31, 0, 1e-6),
        ("uint8", 128, 128, 2**-7),
        ("float16", 1, 0, 2**-11),
        ("float64", 1, 0, 0),
    ],
)
def test_samples_of_any_type(dtype, scale, offset, step):
    samples = (WAVE.astype(np.float64) * scale + offset).astype(dtype)
    np.testing.assert_allclose(as_waveform(samples, SAMPLE_RATE, SAMPLE_RATE), WAVE, atol=step)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_no_numbers_are_refused(tmp_path, value):
    samples = WAVE.copy()
    samples[100] = value
    path = tmp_path / "a.wav"
    path.write_bytes(wav_bytes(samples.tobytes(), is_float=True))
    with pytest.raises(AudioError, match=r"a\.wav: some samples are not finite"):
        load_audio(path, SAMPLE_RATE)
    stereo_SC = np.stack([samples, WAVE], axis=1)
    np.testing.assert_array_equal(as_waveform(stereo_SC, SAMPLE_RATE, SAMPLE_RATE, channel=1), WAVE)


@pytest.mark.parametrize(
    "samples",
    [
        np.zeros((2, 2, 2)),
        np.zeros((2, 0)),
        np.zeros(3, dtype=bool),
        np.array(["a"]),
        np.float32(1),
    ],
)
def test_arrays_that_are_no_samples_are_refused(samples):
    with pytest.raises(AudioError, match="wanted numbers of shape"):
        as_waveform(samples, SAMPLE_RATE, SAMPLE_RATE)


def test_samples_with_their_axes_the_other_way_round_are_refused():
    with pytest.raises(AudioError, match=r"16000 channels.*transpose"):
        as_waveform(np.zeros((2, 16000)), SAMPLE_RATE, SAMPLE_RATE)


@pytest.mark.parametrize("source", [[0.1, 0.2], None, io.StringIO("text"), 3])
def test_what_no_recording_can_be_is_refused(source):
    with pytest.raises(AudioError, match=f"audio is {type(source).__name__}; wanted a file's path"):
        load_audio(source, SAMPLE_RATE)


@pytest.mark.parametrize("rate", [0, 1, -16000, 655_351, 2_000_000])
def test_impossible_rates_are_refused(rate):
    with pytest.raises(AudioError, match="is impossible"):
        as_waveform(WAVE, rate, SAMPLE_RATE)


@pytest.mark.parametrize("num_samples", [0, 1, 2, 399, 800])
@pytest.mark.parametrize("rate", [8000, SAMPLE_RATE, 44100])
def test_short_recordings_are_read(tmp_path, num_samples, rate):
    soundfile.write(tmp_path / "a.wav", WAVE[:num_samples], rate)
    wav_S = load_audio(tmp_path / "a.wav", SAMPLE_RATE)
    assert len(wav_S) == pytest.approx(num_samples * SAMPLE_RATE / rate, abs=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"Just some text, no sound at all.\n" * 100, "cannot be read"),
        (wav_bytes(PCM)[:30], "cannot be read"),
        (wav_bytes(PCM)[44:], "cannot be read"),
        (bytes(1000), "cannot be read"),
    ],
)
def test_what_is_no_audio_is_refused_with_its_name(tmp_path, content, message):
    path = tmp_path / "a.wav"
    path.write_bytes(content)
    with pytest.raises(AudioError, match=rf"a\.wav: {message}"):
        load_audio(path, SAMPLE_RATE)
    with pytest.raises(AudioError, match=message):
        load_audio(io.BytesIO(content), SAMPLE_RATE)


def test_missing_files_and_folders_are_refused(tmp_path):
    with pytest.raises(AudioError, match=r"nowhere\.wav: no such file"):
        load_audio(tmp_path / "nowhere.wav", SAMPLE_RATE)
    with pytest.raises(AudioError, match="is a folder"):
        load_audio(tmp_path, SAMPLE_RATE)
    (tmp_path / "dangling.wav").symlink_to(tmp_path / "nowhere.wav")
    with pytest.raises(AudioError, match="no such file"):
        load_audio(tmp_path / "dangling.wav", SAMPLE_RATE)
    with pytest.raises(AudioError, match="no name of a file"):
        load_audio("a\0.wav", SAMPLE_RATE)


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "ogg", "opus", "aiff", "au"])
def test_of_a_file_cut_short_the_rest_is_read_with_a_warning(tmp_path, caplog, suffix):
    soundfile.write(tmp_path / f"whole.{suffix}", tone(3.0), SAMPLE_RATE, **FORMATS[suffix])
    wav_S = load_audio(cut(tmp_path / f"cut.{suffix}", tmp_path / f"whole.{suffix}"), SAMPLE_RATE)
    assert 0.5 * SAMPLE_RATE < len(wav_S) < 2 * SAMPLE_RATE
    assert np.isfinite(wav_S).all()
    (record,) = caplog.records
    assert f"cut.{suffix}: cut short" in record.getMessage()


def test_of_a_file_damaged_in_the_middle_the_beginning_is_read(tmp_path, caplog):
    soundfile.write(tmp_path / "a.flac", tone(3.0), SAMPLE_RATE)
    content = bytearray((tmp_path / "a.flac").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 3000] = np.random.default_rng(0).bytes(3000)
    (tmp_path / "a.flac").write_bytes(content)
    wav_S = load_audio(tmp_path / "a.flac", SAMPLE_RATE)
    np.testing.assert_allclose(wav_S[:16000], tone(3.0)[:16000], atol=1e-4)
    assert len(wav_S) < 3 * SAMPLE_RATE
    assert "cut short or damaged" in caplog.text


@pytest.mark.parametrize("claimed", [10**6, 2**31 - 2])
def test_a_wav_header_that_promises_more_than_there_is(tmp_path, caplog, claimed):
    (tmp_path / "a.wav").write_bytes(wav_bytes(PCM, claimed=claimed))
    assert len(load_audio(tmp_path / "a.wav", SAMPLE_RATE)) == len(WAVE)
    # The greatest sizes are what is written before the size is known: nothing is missing.
    assert ("header promises" in caplog.text) == (claimed == 10**6)


@pytest.mark.parametrize("claimed", [0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000])
def test_a_wav_written_to_a_pipe_is_whole(tmp_path, caplog, claimed):
    (tmp_path / "a.wav").write_bytes(wav_bytes(PCM, claimed=claimed))
    assert len(load_audio(tmp_path / "a.wav", SAMPLE_RATE)) == len(WAVE)
    assert not caplog.records


def test_a_recording_that_was_never_finished_is_read_or_refused(tmp_path):
    (tmp_path / "a.wav").write_bytes(wav_bytes(PCM, claimed=0))
    try:
        import av  # noqa: F401
    except ImportError:
        with pytest.raises(AudioError, match="its header says that there is no sound in it"):
            load_audio(tmp_path / "a.wav", SAMPLE_RATE)
    else:
        assert len(load_audio(tmp_path / "a.wav", SAMPLE_RATE)) == len(WAVE)


@pytest.mark.parametrize("claimed", [10**6, 2**36 - 1])
def test_a_flac_header_that_promises_more_than_there_is(tmp_path, caplog, claimed):
    wav_S = load_audio(flac_claiming(tmp_path / "a.flac", claimed), SAMPLE_RATE)
    assert len(wav_S) == len(WAVE)
    assert "header promises" in caplog.text


def test_a_flac_that_was_written_to_a_pipe_is_whole(tmp_path, caplog):
    wav_S = load_audio(flac_claiming(tmp_path / "a.flac", 0), SAMPLE_RATE)
    assert len(wav_S) == len(WAVE)
    assert not caplog.records


def test_without_pyav_the_message_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.m4a").write_bytes(b"\0\0\0\x20ftypM4A \0\0\0\0" * 10)
    with pytest.raises(AudioError, match=r"pip install -e '\.\[media\]'"):
        load_audio(tmp_path / "a.m4a", SAMPLE_RATE)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov"])
@pytest.mark.parametrize("layout", ["mono", "stereo", "7.1"])
def test_the_sound_of_a_video_is_read(tmp_path, suffix, layout):
    pytest.importorskip("av", reason="needs pip install -e '.[media]'")
    path = make_video(tmp_path / f"a.{suffix}", layout)
    wav_S = load_audio(path, SAMPLE_RATE)
    assert len(wav_S) == pytest.approx(0.5 * SAMPLE_RATE, abs=800)
    assert np.abs(np.fft.rfft(wav_S[:8000])).argmax() == 110
    np.testing.assert_array_equal(load_audio(path.read_bytes(), SAMPLE_RATE), wav_S)


def test_bad_videos_are_refused(tmp_path):
    pytest.importorskip("av", reason="needs pip install -e '.[media]'")
    silent = make_video(tmp_path / "silent.mp4", layout=None)
    with pytest.raises(AudioError, match=r"silent\.mp4: there is no sound in it"):
        load_audio(silent, SAMPLE_RATE)
    whole = make_video(tmp_path / "whole.mp4")
    with pytest.raises(AudioError, match=r"cut\.mp4: cannot be read"):
        load_audio(cut(tmp_path / "cut.mp4", whole), SAMPLE_RATE)


def test_a_playlist_does_not_open_other_files(tmp_path):
    soundfile.write(tmp_path / "secret.wav", WAVE, SAMPLE_RATE)
    (tmp_path / "a.wav").write_text("ffconcat version 1.0\nfile secret.wav\n", encoding="utf-8")
    with pytest.raises(AudioError, match=r"a\.wav: cannot be read"):
        load_audio(tmp_path / "a.wav", SAMPLE_RATE)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_bytes_bring_anything_but_samples_or_an_audio_error(data):
    content = bytearray(data.draw(st.sampled_from([wav_bytes(PCM[:4000]), *_SOURCES.values()])))
    for _ in range(data.draw(st.integers(1, 8))):
        where = data.draw(st.integers(0, min(len(content), 200) - 1))
        content[where] = data.draw(st.integers(0, 255))
    try:
        wav_S = load_audio(bytes(content[: data.draw(st.integers(1, len(content)))]), 8000)
    except AudioError:
        return
    assert wav_S.ndim == 1
    assert np.isfinite(wav_S).all()


def _encoded(kind: str) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, WAVE[:4000], SAMPLE_RATE, format=kind)
    return stream.getvalue()


_SOURCES = {kind: _encoded(kind) for kind in ("FLAC", "OGG", "AIFF", "AU", "CAF", "W64")}
