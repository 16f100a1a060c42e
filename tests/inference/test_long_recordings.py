"""Recordings of any length through a trained model, in segments and as a whole."""

from collections import defaultdict

import numpy as np
import pytest
import torch

from common.errors import UserError
from inference.long_audio import cut_at_pauses, join
from tests.inference.transcripts import assert_same

RATE = 16000


@pytest.fixture(scope="module")
def joined(waveforms):
    """A minute of recordings, with pauses of the noise that they are recorded in."""
    rng = np.random.default_rng(0)
    quiet = [0.001 * rng.standard_normal(RATE).astype(np.float32) for _ in waveforms]
    once = np.concatenate([part for pair in zip(waveforms, quiet, strict=True) for part in pair])
    return np.tile(once, -(-60 * RATE // len(once)))


@pytest.fixture
def told():
    """A function that is told progress, and what it was told: recordings and seconds."""
    totals = defaultdict(float)

    def progress(recordings, audio_s):
        totals["recordings"] += recordings
        totals["audio_s"] += audio_s
        totals["times"] += 1

    return progress, totals


@pytest.fixture
def plain(monkeypatch):
    """Recordings are encoded plainly unless they are wanted as a whole."""
    monkeypatch.setattr("inference.recognizer._PLAIN_S", 1000.0)


def test_as_a_whole_it_is_what_the_plain_forward_gives(recognizers, joined, plain):
    recognizer = recognizers["ctc"]
    whole = recognizer.transcribe(joined, whole=True, search="greedy")
    assert_same(whole, recognizer.transcribe(joined, max_segment_s=1000, search="greedy"))
    assert len(whole.words) > 10


def test_alone_a_long_recording_goes_in_pieces(recognizers, joined, monkeypatch):
    found = [recognizers["ctc"].encode([joined])]
    monkeypatch.setattr("inference.recognizer._PLAIN_S", 1000.0)
    found.append(recognizers["ctc"].encode([joined]))
    for in_pieces, wanted in zip(*found, strict=True):
        torch.testing.assert_close(in_pieces, wanted, rtol=0, atol=1e-4)


def test_a_joint_model_gives_the_text_of_its_ctc_branch(recognizers, joined, plain):
    recognizer = recognizers["s2s"]
    plain = recognizer.transcribe(joined, max_segment_s=1000, search="greedy")
    assert_same(recognizer.transcribe(joined, whole=True, search="greedy"), plain)


def test_in_segments_it_is_what_these_are_alone(recognizers, joined):
    recognizer = recognizers["ctc"]
    pieces = cut_at_pauses(joined, RATE)
    assert len(pieces) > 10
    alone = recognizer.transcribe_batch([joined[p.start : p.stop] for p in pieces])
    found = recognizer.transcribe(joined)
    assert_same(found, join(pieces, alone, RATE))
    assert [word.text for word in found.words] == found.text.split()
    spoken = [p for p, transcript in zip(pieces, alone, strict=True) if transcript.text]
    times = [(p.start / RATE, p.stop / RATE) for p in spoken]
    assert [(s.start_s, s.end_s) for s in found.segments] == times


@pytest.mark.parametrize("whole", [False, True])
def test_each_recording_is_told_to_be_done_once(recognizers, joined, audio_files, told, whole):
    progress, totals = told
    recognizers["ctc"].transcribe(joined, whole=whole, batch_seconds=20, progress=progress)
    assert totals["recordings"] == pytest.approx(1)
    assert totals["audio_s"] == pytest.approx(len(joined) / RATE)
    # As a whole the network has one layer.
    assert totals["times"] >= (1 if whole else 3)
    paths = [*audio_files, "nowhere.wav"]
    list(recognizers["ctc"].transcribe_many(paths, whole=whole, progress=progress))
    assert totals["recordings"] == pytest.approx(1 + len(paths))


def test_segments_too_short_for_their_overlap_are_refused(recognizers, joined):
    for seconds in (5, float("nan")):
        with pytest.raises(UserError, match=f"max_segment_s is {seconds}; it must be at least 12"):
            recognizers["ctc"].transcribe(joined, max_segment_s=seconds)


def test_without_a_longest_segment_nothing_is_cut(recognizers, joined, plain):
    found = recognizers["ctc"].transcribe(joined, max_segment_s=float("inf"))
    assert_same(found, recognizers["ctc"].transcribe(joined, max_segment_s=1000))
