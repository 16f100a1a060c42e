"""Signals become requests; loader workers stay at work."""

import logging
import os
import signal
import threading
import time

import pytest
import torch

from training.launch.interrupts import StopRequest, UndisturbedWorker


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_remembered_and_says_what_happens(caplog, number):
    before = signal.getsignal(number)
    request = StopRequest()
    with request, caplog.at_level(logging.WARNING):
        assert request.signal_number == 0
        signal.raise_signal(number)
        assert request.signal_number == number
    assert number.name in caplog.text
    assert "saving a checkpoint" in caplog.text
    assert signal.getsignal(number) is before
    assert request.signal_number == number


def test_a_second_signal_has_its_usual_effect():
    with StopRequest():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequest() as request:
            signal.raise_signal(signal.SIGINT)
        assert request.signal_number == 0
    finally:
        signal.signal(signal.SIGINT, before)


def test_handlers_come_back_after_an_exception():
    before = [signal.getsignal(number) for number in StopRequest.SIGNALS]
    with pytest.raises(RuntimeError, match="from inside"), StopRequest():
        raise RuntimeError("from inside")
    assert [signal.getsignal(number) for number in StopRequest.SIGNALS] == before


def test_one_request_can_guard_several_stages():
    request = StopRequest()
    for _ in range(2):
        with request:
            assert signal.getsignal(signal.SIGTERM) == request._remember
    assert signal.getsignal(signal.SIGTERM) != request._remember


def test_another_thread_than_the_main_one_leaves_signals_alone():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def run():
        with StopRequest():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]


class WorkerIds(torch.utils.data.Dataset):
    """Ids of the processes that read, slowly enough to be hit by a signal."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        time.sleep(0.02)
        return os.getpid()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_worker_outlives_a_signal_and_goes_on(number):
    loader = torch.utils.data.DataLoader(
        WorkerIds(), batch_size=1, num_workers=1, worker_init_fn=UndisturbedWorker()
    )
    batches = iter(loader)
    worker = int(next(batches))
    assert worker != os.getpid()
    os.kill(worker, number)
    assert [int(batch) for batch in batches] == [worker] * 5


def test_a_worker_ends_when_the_main_process_exits():
    undisturbed = UndisturbedWorker()
    loader = torch.utils.data.DataLoader(
        WorkerIds(), batch_size=1, num_workers=1, worker_init_fn=undisturbed
    )
    batches = iter(loader)
    next(batches)
    (process,) = batches._workers
    undisturbed._set_exiting()
    process.terminate()
    process.join(timeout=5)
    assert process.exitcode == 0


def test_a_worker_that_cannot_send_a_batch_ends_instead_of_being_waited_for(capfd):
    loader = torch.utils.data.DataLoader(
        [0],
        num_workers=1,
        collate_fn=lambda items: lambda: items,
        worker_init_fn=UndisturbedWorker(),
        multiprocessing_context="fork",
    )
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        list(loader)
    assert "A loader worker cannot send its batch" in capfd.readouterr().err
