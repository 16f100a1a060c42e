import io
import os

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from corpora.flac import FlacError, check_flac, parse_stream_info, read_stream_info


def flac_bytes(samples: int = 4000, rate: int = 16000, channels: int = 1, subtype="PCM_16"):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (samples, channels))
    buffer = io.BytesIO()
    soundfile.write(buffer, noise, rate, format="FLAC", subtype=subtype)
    return buffer.getvalue()


def check(path, content: bytes, verify: bool = False) -> int:
    path.write_bytes(content)
    return check_flac(str(path), os.path.getsize(path), 16000, verify)


@settings(max_examples=15, deadline=None)
@given(
    samples=st.integers(1, 9000),
    rate=st.sampled_from([8000, 16000, 44100, 96000]),
    channels=st.integers(1, 8),
    subtype=st.sampled_from(["PCM_S8", "PCM_16", "PCM_24"]),
)
def test_the_header_is_read_as_libsndfile_reads_it(samples, rate, channels, subtype):
    content = flac_bytes(samples, rate, channels, subtype)
    info = parse_stream_info(content[:42])
    theirs = soundfile.info(io.BytesIO(content))
    assert info.num_samples == theirs.frames == samples
    assert info.sample_rate == theirs.samplerate
    assert info.channels == theirs.channels
    assert info.bits_per_sample == {"PCM_S8": 8, "PCM_16": 16, "PCM_24": 24}[subtype]


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"RIFF" + bytes(100), "not a FLAC file"),
        (flac_bytes()[:30], "ends within its header"),
        (b"fLaC" + bytes(100), "damaged FLAC header"),
        (flac_bytes()[:42], "cut short"),
        (flac_bytes(rate=8000), "wrongly sampled: 8000 Hz instead of 16000 Hz"),
        (flac_bytes(channels=2), "2 channels instead of one"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_reason(tmp_path, content, reason, verify):
    with pytest.raises(FlacError, match=reason):
        check(tmp_path / "a.flac", content, verify)


def test_a_file_that_cannot_be_opened_is_refused_with_the_reason(tmp_path):
    with pytest.raises(FlacError, match="No such file"):
        read_stream_info(str(tmp_path / "missing.flac"))


@pytest.mark.parametrize("kept", [0.3, 0.95])
def test_only_decoding_finds_audio_that_was_cut_short(tmp_path, kept):
    content = flac_bytes(samples=20000)
    content = content[: int(kept * len(content))]
    assert check(tmp_path / "a.flac", content) == 20000
    with pytest.raises(FlacError, match=r"cut short|damaged"):
        check(tmp_path / "a.flac", content, verify=True)


def test_decoding_finds_samples_that_do_not_match_the_header(tmp_path):
    content = bytearray(flac_bytes())
    content[26:42] = bytes(range(16))
    assert check(tmp_path / "a.flac", bytes(content)) == 4000
    with pytest.raises(FlacError, match="MD5"):
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
    with pytest.raises(FlacError, match="unknown length"):
        check(tmp_path / "a.flac", bytes(content), verify)
    with pytest.raises(ValueError, match="too big"):
        soundfile.read(tmp_path / "a.flac")
