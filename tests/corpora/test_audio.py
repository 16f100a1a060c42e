import io
import os

import numpy as np
import pytest
import soundfile

from common.errors import UserError
from corpora.audio import AUDIO_SUFFIXES, AudioFileError, check_audio, read_audio


def flac_bytes(samples: int = 4000, rate: int = 16000, channels: int = 1, subtype="PCM_16"):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (samples, channels))
    buffer = io.BytesIO()
    soundfile.write(buffer, noise, rate, format="FLAC", subtype=subtype)
    return buffer.getvalue()


def check(path, content: bytes, verify: bool = False) -> int:
    path.write_bytes(content)
    return check_audio(str(path), os.path.getsize(path), 16000, verify)


@pytest.mark.parametrize("suffix", sorted(AUDIO_SUFFIXES - {".sph", ".au", ".w64"}))
def test_every_format_is_read(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 16000)
    kind = {".opus": ("OGG", "OPUS"), ".oga": ("OGG", "VORBIS"), ".aif": ("AIFF", "PCM_16")}
    file_format, subtype = kind.get(suffix, (suffix[1:].upper(), None))
    soundfile.write(path, noise, 16000, format=file_format, subtype=subtype)
    num_samples = check_audio(str(path), os.path.getsize(path), 16000, verify=True)
    samples_S = read_audio(str(path), "a", 16000)
    assert samples_S.dtype == np.float32
    # MP3 is made of blocks.
    assert len(samples_S) == num_samples
    assert 16000 <= num_samples < 16000 + (2400 if suffix == ".mp3" else 1)


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"RIFF" + bytes(100), "unreadable: "),
        (flac_bytes()[:30], "unreadable: "),
        (b"fLaC" + bytes(100), "unreadable: "),
        (flac_bytes(rate=8000), "wrongly sampled: 8000 Hz instead of 16000 Hz"),
        (flac_bytes(channels=2), "2 channels instead of one"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_reason(tmp_path, content, reason, verify):
    with pytest.raises(AudioFileError, match=reason):
        check(tmp_path / "a.flac", content, verify)


def test_a_file_that_cannot_be_opened_is_refused_with_the_reason(tmp_path):
    with pytest.raises(AudioFileError, match="unreadable: No such file"):
        check_audio(str(tmp_path / "missing.flac"), 1, 16000)


@pytest.mark.parametrize("kept", [0.3, 0.95])
def test_only_decoding_finds_audio_that_was_cut_short(tmp_path, kept):
    content = flac_bytes(samples=20000)
    content = content[: int(kept * len(content))]
    assert check(tmp_path / "a.flac", content) == 20000
    with pytest.raises(AudioFileError, match=r"cut short|damaged"):
        check(tmp_path / "a.flac", content, verify=True)


def test_decoding_finds_damage(tmp_path):
    content = bytearray(flac_bytes(samples=20000))
    content[len(content) // 2] ^= 0xFF
    assert check(tmp_path / "a.flac", bytes(content)) == 20000
    with pytest.raises(AudioFileError, match="damaged"):
        check(tmp_path / "a.flac", bytes(content), verify=True)


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24"])
def test_whole_audio_is_verified(tmp_path, subtype):
    content = flac_bytes(samples=300_001, subtype=subtype)
    assert check(tmp_path / "a.flac", content, verify=True) == 300_001


@pytest.mark.parametrize("verify", [False, True])
def test_a_header_without_a_length_is_refused_as_training_could_not_load_it(tmp_path, verify):
    content = bytearray(flac_bytes())
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    with pytest.raises(AudioFileError, match="unknown length"):
        check(tmp_path / "a.flac", bytes(content), verify)


@pytest.mark.parametrize("rate", [8000, 22050, 44100])
def test_audio_of_another_rate_is_resampled_on_request_alone(tmp_path, rate):
    path = str(tmp_path / "a.wav")
    tone_S = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    soundfile.write(path, tone_S, rate, subtype="FLOAT")
    size = os.path.getsize(path)
    with pytest.raises(AudioFileError, match="--resample True"):
        check_audio(path, size, 16000)
    with pytest.raises(UserError, match=f"--resample True, .*--sample_rate {rate}"):
        read_audio(path, "a", 16000)
    assert check_audio(path, size, 16000, resample=True) == 16000
    samples_S = read_audio(path, "a", 16000, resample=True)
    wanted_S = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert samples_S.dtype == np.float32
    assert len(samples_S) == 16000
    np.testing.assert_allclose(samples_S[500:-500], wanted_S[500:-500], atol=2e-3)
    part_S = read_audio(path, "a", 16000, 4000, 9000, resample=True)
    np.testing.assert_array_equal(part_S, samples_S[4000:9000])
    np.testing.assert_array_equal(read_audio(path, "a", rate), tone_S.astype(np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
def test_samples_that_are_not_finite_are_refused(tmp_path, subtype, value):
    path = str(tmp_path / "a.wav")
    samples_S = np.zeros(8000)
    samples_S[5000] = value
    soundfile.write(path, samples_S, 16000, subtype=subtype)
    size = os.path.getsize(path)
    assert check_audio(path, size, 16000) == 8000
    with pytest.raises(AudioFileError, match="not finite"):
        check_audio(path, size, 16000, verify=True)
    with pytest.raises(UserError, match=rf"u7: {path}: some samples are not finite"):
        read_audio(path, "u7", 16000)
    with pytest.raises(UserError, match="not finite"):
        read_audio(path, "u7", 8000, resample=True)
    assert len(read_audio(path, "u7", 16000, 0, 5000)) == 5000
