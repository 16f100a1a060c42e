"""Reading recordings: formats, rates, channels, and what is said of each that is bad."""

import gzip
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
    flac_with_total,
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


def encoded(samples: np.ndarray, suffix: str, rate: int = SAMPLE_RATE) -> bytes:
    """A file of one of ``FORMATS``."""
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, **{"format": suffix, **FORMATS[suffix]})
    return stream.getvalue()


def need_or_hide_pyav(monkeypatch: pytest.MonkeyPatch, with_pyav: bool) -> None:
    if with_pyav:
        pytest.importorskip("av", reason="needs pip install -e '.[media]'")
    else:
        monkeypatch.setitem(sys.modules, "av", None)


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


@pytest.mark.parametrize("peak", [1.2, 1e4])
def test_a_wild_sample_that_makes_all_quieter_is_told(tmp_path, caplog, peak):
    samples = WAVE.copy()
    samples[100] = peak
    soundfile.write(tmp_path / "a.wav", samples, SAMPLE_RATE, subtype="FLOAT")
    load_audio(tmp_path / "a.wav", SAMPLE_RATE)
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ([] if peak < 4 else [messages[0]])
    assert all("a.wav: made quieter by a factor of 1e+04" in message for message in messages)


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


@pytest.mark.parametrize("with_pyav", [False, True])
@pytest.mark.parametrize("total_samples", [10 * 44100, 0])
@pytest.mark.parametrize("damaged_bytes", [3, 30_000])
def test_of_a_flac_damaged_in_the_middle_the_rest_is_read(
    monkeypatch, caplog, with_pyav, total_samples, damaged_bytes
):
    need_or_hide_pyav(monkeypatch, with_pyav)
    content = bytearray(flac_with_total(encoded(tone(10.0, 44100), "flac", 44100), total_samples))
    middle = len(content) // 2
    content[middle : middle + damaged_bytes] = np.random.default_rng(0).bytes(damaged_bytes)
    wav_S = load_audio(bytes(content), 44100)
    wanted = tone(10.0, 44100)
    np.testing.assert_allclose(wav_S[:200_000], wanted[:200_000], atol=1e-4)
    (record,) = caplog.records
    if with_pyav:
        assert len(wav_S) == len(wanted)
        np.testing.assert_allclose(wav_S[300_000:], wanted[300_000:], atol=1e-4)
        # What was damaged is not noise either.
        assert np.abs(wav_S).max() < 0.5
        blocks_s = {3: "0.09", 30_000: "0.56"}[damaged_bytes]
        assert f"damaged: {blocks_s} s could not be read" in record.getMessage()
    else:
        assert len(wav_S) < 250_000
        assert "4.9 s could be read" in record.getMessage()
        assert "pip install -e '.[media]'" in record.getMessage()


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_behind_a_damaged_packet_of_a_video_it_is_read_on(tmp_path, caplog, suffix):
    av = pytest.importorskip("av", reason="needs pip install -e '.[media]'")
    path = tmp_path / f"a.{suffix}"
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=44100, layout="mono")
        block = av.AudioFrame.from_ndarray(tone(6.0, 44100)[None], format="flt", layout="mono")
        block.sample_rate, block.pts = 44100, 0
        container.mux(sound.encode(block))
        container.mux(sound.encode(None))
    whole_S = load_audio(path, 44100)
    assert not caplog.records
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 500] = np.random.default_rng(0).bytes(500)
    wav_S = load_audio(bytes(content), 44100)
    assert len(wav_S) == pytest.approx(len(whole_S), abs=2000)
    assert np.corrcoef(wav_S[-44100:], whole_S[-44100:])[0, 1] > 0.9
    (record,) = caplog.records
    assert "s could not be read" in record.getMessage()


@pytest.mark.parametrize("suffix", ["ogg", "opus", "mp3", "flac", "wav"])
def test_joined_recordings_are_all_read(tmp_path, monkeypatch, caplog, suffix):
    need_or_hide_pyav(monkeypatch, with_pyav=False)
    # The bytes that tell of it are cut apart.
    monkeypatch.setattr(audio, "_SCANNED_BYTES", 7)
    # What follows the first fills many blocks, which no zeros may stand for.
    parts = [tone(3.1), tone(2.0)[::-1].copy(), tone(66.0)]
    (tmp_path / "a").write_bytes(b"".join(encoded(part, suffix) for part in parts))
    wav_S = load_audio(tmp_path / "a", SAMPLE_RATE)
    wanted = np.concatenate(parts)
    assert wav_S.shape == wanted.shape
    assert np.corrcoef(wav_S, wanted)[0, 1] > 0.97
    np.testing.assert_array_equal(load_audio((tmp_path / "a").read_bytes(), SAMPLE_RATE), wav_S)
    assert not caplog.records


@pytest.mark.parametrize("suffix", ["ogg", "opus", "mp3", "flac", "wav"])
def test_joined_recordings_of_other_rates_and_channels(caplog, suffix):
    stereo_SC = np.stack([tone(2.0, 8000)] * 2, axis=1)
    content = encoded(stereo_SC, suffix, 8000) + encoded(tone(3.0), suffix)
    assert len(load_audio(content, SAMPLE_RATE)) == 5 * SAMPLE_RATE
    assert not caplog.records
    assert len(load_audio(content, SAMPLE_RATE, channel=1)) == 2 * SAMPLE_RATE
    (record,) = caplog.records
    assert "1 of the 2 recordings joined in it could not be read" in record.getMessage()
    assert "there is no channel 1" in record.getMessage()
    with pytest.raises(AudioError, match="there is no channel 2"):
        load_audio(content, SAMPLE_RATE, channel=2)


@pytest.mark.parametrize("suffix", ["ogg", "mp3", "flac", "wav"])
def test_of_joined_recordings_the_last_may_be_cut_short(caplog, suffix):
    content = encoded(tone(3.0), suffix) + encoded(tone(2.0), suffix)[:-4000]
    assert 3.5 * SAMPLE_RATE < len(load_audio(content, SAMPLE_RATE)) < 4.9 * SAMPLE_RATE
    (record,) = caplog.records
    assert "recording 2 of those joined in it is cut short" in record.getMessage()


def test_wav_files_of_an_odd_size_may_be_padded(caplog):
    one = wav_bytes(PCM + b"\0")
    for padding in (b"", b"\0"):
        assert len(load_audio(one + padding + one, SAMPLE_RATE)) == 2 * len(WAVE)
    # What the header counts is of the recording.
    assert audio._joints(io.BytesIO(wav_bytes(PCM + one))) == []
    assert not caplog.records


@pytest.mark.parametrize("rate", [8000, 22050, 44100])
def test_a_size_in_an_mp3_that_is_a_little_too_small_is_no_joint(caplog, rate):
    content = encoded(tone(2.0, rate), "mp3", rate)
    at = audio._MP3_SIZE.match(content).start(1)
    size = int.from_bytes(content[at : at + 4], "big")
    assert audio._joints(io.BytesIO(content + content[size // 2 :])) == []
    for missing in range(1, 1000):
        smaller = content[:at] + (size - missing).to_bytes(4, "big") + content[at + 4 :]
        assert audio._joints(io.BytesIO(smaller)) == []
    assert len(load_audio(smaller, rate)) == 2 * rate
    # Without its first frame it begins with sound.
    sound = next(n for n in range(1, 2000) if audio._begins_mp3(io.BytesIO(content[n:]), 0))
    assert audio._joints(io.BytesIO(content + content[sound:])) == [size]
    assert not caplog.records


def test_tags_of_mp3_are_no_joined_recordings(caplog):
    one = b"ID3\3\0\0\0\0\1\x0a" + bytes(138) + encoded(WAVE, "mp3") + b"TAG" + bytes(125)
    assert audio._joints(io.BytesIO(one)) == []
    assert len(load_audio(one, SAMPLE_RATE)) == len(WAVE)
    assert len(load_audio(one + one + one, SAMPLE_RATE)) == 3 * len(WAVE)
    assert not caplog.records


def test_an_mp3_by_another_encoder_is_not_joined(caplog):
    av = pytest.importorskip("av", reason="needs pip install -e '.[media]'")
    file = io.BytesIO()
    with av.open(file, "w", format="mp3") as container:
        sound = container.add_stream("libmp3lame", rate=44100, layout="stereo")
        samples = np.repeat(tone(1.0, 44100), 2)[None]
        block = av.AudioFrame.from_ndarray(samples, format="flt", layout="stereo")
        block.sample_rate = 44100
        for part in av.AudioResampler(format="fltp", rate=44100).resample(block):
            container.mux(sound.encode(part))
        container.mux(sound.encode(None))
    one = file.getvalue()
    assert audio._joints(io.BytesIO(one)) == []
    assert audio._joints(io.BytesIO(one + one)) == [len(one)]
    assert len(load_audio(one, SAMPLE_RATE)) == pytest.approx(SAMPLE_RATE, abs=800)
    assert not caplog.records


@pytest.mark.parametrize("joined", [True, False])
def test_behind_the_promised_end_of_a_flac_zeros_are_no_samples(monkeypatch, joined):
    need_or_hide_pyav(monkeypatch, with_pyav=False)
    # Its header promises less than there is, and the decoder fails behind it.
    content = flac_with_total(encoded(WAVE, "flac"), len(WAVE) - 1)
    content += encoded(tone(66.0), "flac") if joined else bytes(range(256)) * 100
    wav_S = load_audio(content, SAMPLE_RATE)
    assert len(wav_S) == len(WAVE) - 1 + joined * 66 * SAMPLE_RATE
    np.testing.assert_allclose(wav_S[: len(WAVE) - 1], WAVE[:-1], atol=1e-4)


@pytest.mark.parametrize("with_pyav", [False, True])
def test_a_tag_behind_a_flac_is_nothing_missing(monkeypatch, caplog, with_pyav):
    need_or_hide_pyav(monkeypatch, with_pyav)
    content = encoded(WAVE, "flac") + b"TAG" + bytes(125)
    assert len(load_audio(content, SAMPLE_RATE)) == len(WAVE)
    assert not caplog.records


class Unplugged(io.RawIOBase):
    """A file whose source is gone."""

    name = "line"

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        raise ConnectionResetError(104, "Connection reset by peer")


def test_a_file_that_fails_while_it_is_read_is_refused_with_the_reason(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(wav_bytes(b"\xff" * 100))
    (tmp_path / "a.wav.gz").write_bytes(gzip.compress(wav_bytes(PCM))[:-2000])
    with open(path, "rb") as closed:
        pass
    with (
        open(path, "ab") as write_only,
        open(path, encoding="utf-8") as text,
        gzip.open(f"{path}.gz") as archive,
    ):
        for source, message in (
            (closed, r"a\.wav: cannot be read \(.*closed file\)"),
            (Unplugged(), r"line: cannot be read \(.*reset by peer\)"),
            (write_only, r"a\.wav: cannot be read \(read\)"),
            (text, r"a\.wav: cannot be read \('utf-8'"),
            (archive, r"cannot be read \(.*end-of-stream"),
        ):
            with pytest.raises(AudioError, match=message):
                load_audio(source, SAMPLE_RATE)


@pytest.mark.parametrize("rate", [8000, SAMPLE_RATE])
def test_recordings_beyond_the_duration_that_is_allowed_are_refused(tmp_path, rate):
    wav_S = tone(3.0, rate)
    soundfile.write(tmp_path / "a.flac", wav_S, rate)
    assert len(load_audio(tmp_path / "a.flac", SAMPLE_RATE, max_duration_s=3)) == 3 * SAMPLE_RATE
    assert len(as_waveform(wav_S, rate, SAMPLE_RATE, max_duration_s=3)) == 3 * SAMPLE_RATE
    with pytest.raises(AudioError, match=r"a\.flac: is longer than the 2\.5 s allowed"):
        load_audio(tmp_path / "a.flac", SAMPLE_RATE, max_duration_s=2.5)
    with pytest.raises(AudioError, match=r"audio: is longer than the 2\.5 s allowed"):
        as_waveform(wav_S, rate, SAMPLE_RATE, max_duration_s=2.5)


def test_a_small_file_of_much_silence_is_refused_before_it_takes_memory():
    content = encoded(np.zeros(3600 * SAMPLE_RATE, np.float32), "flac")
    tracemalloc.start()
    with pytest.raises(AudioError, match="is longer than the 60 s allowed"):
        load_audio(content, SAMPLE_RATE, max_duration_s=60)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 30e6


def test_joined_recordings_count_together_as_duration():
    content = encoded(tone(3.0), "flac") + encoded(tone(2.0), "flac")
    assert len(load_audio(content, SAMPLE_RATE, max_duration_s=5)) == 5 * SAMPLE_RATE
    with pytest.raises(AudioError, match="is longer than the 4 s allowed"):
        load_audio(content, SAMPLE_RATE, max_duration_s=4)


def test_gaps_count_as_duration():
    pytest.importorskip("av", reason="needs pip install -e '.[media]'")
    content = bytearray(encoded(tone(10.0), "flac"))
    middle = len(content) // 2
    content[middle : middle + 30_000] = bytes(30_000)
    # More than what could be read of it.
    with pytest.raises(AudioError, match=r"is longer than the 9\.9 s allowed"):
        load_audio(bytes(content), SAMPLE_RATE, max_duration_s=9.9)


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
