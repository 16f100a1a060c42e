"""SIGINT and SIGTERM as a request to stop at the next safe point."""

import atexit
import logging
import multiprocessing.queues
import os
import signal
import sys
import threading

logger = logging.getLogger(__name__)


class StopRequest:
    """Remembers the first SIGINT or SIGTERM; a second one has its usual effect at once.

    Use as a context manager around training; outside it the signals are untouched.

    Attributes:
        signal_number: that of the signal; 0 before.
        what_follows: what the first signal is answered with.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.signal_number = 0
        self.what_follows = "saving a checkpoint after this step, then stopping"
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        # Python lets only the main thread set handlers; elsewhere nothing is to be caught.
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                # A job started with nohup or in a script's background ignores Ctrl-C on purpose.
                if signal.getsignal(number) is signal.SIG_IGN:
                    continue
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exc_info) -> None:
        self._restore()

    def _remember(self, number: int, frame: object) -> None:
        del frame
        self.signal_number = number
        self._restore()
        logger.warning(
            "%s: %s. Again to stop at once.", signal.Signals(number).name, self.what_follows
        )

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


def _end_with(error: Exception, batch: object) -> None:
    del batch
    print(f"A loader worker cannot send its batch: {error}", file=sys.stderr, flush=True)
    os._exit(1)


class UndisturbedWorker:
    """``worker_init_fn`` of a loader: signals to the whole process group leave workers at work.

    Ctrl-C, timeout(1) and batch systems signal every process of a run, but the main one still
    needs batches until its next safe point. A worker ends when the main process says so: through
    its queue, or by the SIGTERM with which multiprocessing ends what is left at exit.
    """

    def __init__(self):
        self.main_is_exiting = multiprocessing.RawValue("b", 0)
        # Runs before multiprocessing's own exit function, which was registered earlier.
        atexit.register(self._set_exiting)

    def __call__(self, worker: int) -> None:
        del worker
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._on_sigterm)
        # A batch that cannot be sent would be dropped, and be waited for without end.
        multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_with)

    def _set_exiting(self) -> None:
        self.main_is_exiting.value = 1

    def _on_sigterm(self, number: int, frame: object) -> None:
        del number, frame
        if self.main_is_exiting.value:
            os._exit(0)
