"""Resampled piece by piece and at once are the same, also where a stream goes on elsewhere."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.audio import AudioError, as_waveform
from inference.streaming_audio import SampleStream


@pytest.mark.parametrize("kind", ["float32", "int16", "stereo"])
@settings(max_examples=30, deadline=None)
@given(
    rate=st.sampled_from([8000, 11025, 16000, 22050, 44100, 48000]),
    pieces=st.lists(st.integers(0, 30_000), min_size=1, max_size=6),
    moves=st.sets(st.integers(0, 5)),
)
def test_pieces_are_what_the_whole_is(kind, rate, pieces, moves):
    samples = np.random.default_rng(rate).uniform(-1, 1, (sum(pieces), 2)).astype(np.float32)
    if kind == "int16":
        samples = (samples * 32767).astype(np.int16)
    if kind != "stereo":
        samples = samples[:, 0]
    stream, found = SampleStream(rate, 16000), []
    for i, piece in enumerate(np.split(samples, np.cumsum(pieces))):
        if i in moves:
            stream = SampleStream(rate, 16000, stream.state)
        found.append(stream.add(piece))
    found.append(stream.add(samples[:0], last=True))
    wanted = as_waveform(samples, rate, 16000)
    assert stream.num_in == len(samples)
    assert stream.num_out == len(wanted)
    np.testing.assert_allclose(np.concatenate(found), wanted, rtol=0, atol=1e-6)


def test_a_stream_keeps_less_than_two_seconds():
    stream = SampleStream(44100, 16000)
    for _ in range(400):
        stream.add(np.zeros(1000, np.float32))
        assert sum(map(len, stream._history)) < 2 * 44100
    assert len(stream.state.history_S) < 44100


@pytest.mark.parametrize("rate", [0, -1, 1_000_000, float("nan")])
def test_impossible_rates_are_refused(rate):
    with pytest.raises(AudioError, match="sampling rate"):
        SampleStream(rate, 16000)


@pytest.mark.parametrize(
    "samples",
    [[0.1, float("nan")], [float("inf")], [1e30], np.zeros((1, 2, 3)), ["a"], [1j]],
    ids=["nan", "inf", "huge", "shape", "text", "complex"],
)
def test_what_is_no_sound_is_refused_and_leaves_the_stream_as_it_was(samples):
    stream = SampleStream(8000, 16000)
    with pytest.raises(AudioError, match="stream"):
        stream.add(np.asarray(samples))
    assert stream.num_in == 0
    assert len(stream.add(np.zeros(8000, np.float32), last=True)) == 16000


@pytest.mark.parametrize("rate", [100, 333, 1000, 44101])
def test_a_stream_of_any_rate_goes_on_elsewhere(rate):
    samples = np.random.default_rng(rate).uniform(-1, 1, 6 * rate).astype(np.float32)
    stream, found = SampleStream(rate, 16000), []
    for piece in np.array_split(samples, 7):
        stream = stream.twin()
        found.append(stream.add(piece))
    found.append(stream.add(samples[:0], last=True))
    wanted = as_waveform(samples, rate, 16000)
    np.testing.assert_allclose(np.concatenate(found), wanted, rtol=0, atol=1e-5)


def test_rates_are_whole_numbers_of_any_kind():
    for rate in (44100.0, np.int64(44100), np.float32(44100)):
        stream = SampleStream(rate, 16000)
        stream.add(np.zeros(50_000, np.float32))
        assert (stream.rate, type(stream.rate)) == (44100, int)
    with pytest.raises(AudioError, match=r"44100\.5 Hz; it must be a whole number"):
        SampleStream(44100.5, 16000)
    for rate in ("16000", None, 16000j):
        with pytest.raises(AudioError, match="sampling rate"):
            SampleStream(rate, 16000)
