"""Batches side by side: the same results, in order, and the process as it was."""

import threading

import pytest
import torch

from common.errors import UserError
from inference import workers
from inference.audio import AudioError
from inference.workers import side_by_side
from tests.inference.transcripts import assert_same


@pytest.fixture
def three_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small_windows(monkeypatch):
    """Several batches in a window, and several windows."""
    monkeypatch.setattr("inference.recognizer._WINDOW_BATCHES", 3)
    return {"batch_seconds": 3.0}


def test_side_by_side_is_one_after_the_other(recognizer, audio_files, three_threads, small_windows):
    paths = [*audio_files, "nowhere.wav", *audio_files[:3]]
    told = []
    found = list(
        recognizer.transcribe_many(paths, progress=lambda *done: told.append(done), **small_windows)
    )
    assert [path for path, _ in found] == paths
    for path, result in found:
        if path == "nowhere.wav":
            assert isinstance(result, AudioError)
        else:
            assert_same(result, recognizer.transcribe(path))
    assert sum(recordings for recordings, _ in told) == pytest.approx(len(paths))
    assert torch.get_num_threads() == 3


def test_segments_of_one_recording_are_done_side_by_side(recognizers, waveforms, three_threads):
    recognizer = recognizers["ctc"]
    joined = [*waveforms, *waveforms, *waveforms]
    long_S = torch.cat([torch.from_numpy(wav_S) for wav_S in joined])
    found = recognizer.transcribe(long_S, max_segment_s=12)
    assert len(found.segments) > 1
    torch.set_num_threads(1)
    assert_same(found, recognizer.transcribe(long_S, max_segment_s=12))


def test_what_a_worker_raises_comes_out(recognizers, audio_files, three_threads):
    with pytest.raises(UserError, match="alpha: the joint search"):
        list(recognizers["s2s"].transcribe_many(audio_files, alpha=0.5))


def test_who_stops_early_leaves_no_thread(recognizers, audio_files, three_threads, small_windows):
    before = threading.active_count()
    results = recognizers["ctc"].transcribe_many(audio_files, **small_windows)
    next(results)
    assert threading.active_count() > before
    results.close()
    assert threading.active_count() == before


def test_workers_have_threads_of_their_own_and_nobody_else_has():
    threads = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        with side_by_side(2, 2) as spread:
            assert list(spread(lambda _: torch.get_num_threads(), range(6))) == [2] * 6
            found = []
            later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
            later.start()
            later.join()
        assert (torch.get_num_threads(), found) == (5, [5])
    finally:
        torch.set_num_threads(threads)


def test_a_new_thread_does_not_take_the_workers_number_for_its_own(
    recognizers, waveforms, three_threads
):
    def transcribe():
        recognizers["ctc"].transcribe(waveforms[0])
        found.append(torch.get_num_threads())

    found: list[int] = []
    thread = threading.Thread(target=transcribe)
    with workers._lock:
        # As while workers are started.
        torch.set_num_threads(1)
        thread.start()
        thread.join(0.5)
        torch.set_num_threads(3)
    thread.join()
    assert found == [3]


def test_threads_that_cannot_be_started_leave_none(monkeypatch):
    before, threads = threading.active_count(), torch.get_num_threads()
    start, allowed = threading.Thread.start, iter([True])

    def start_one(thread):
        if not next(allowed, False):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_one)
    with pytest.raises(RuntimeError, match="can't start"), side_by_side(3, 1):
        pass
    assert (threading.active_count(), torch.get_num_threads()) == (before, threads)
