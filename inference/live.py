"""Recognition while one listens: a recording played in real time, or the microphone."""

from __future__ import annotations

import queue
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np

from common.errors import UserError
from inference.streaming import StreamingRecognizer
from inference.transcript import Transcript

_PIECE_S = 0.1


def listen(
    recognizer: StreamingRecognizer,
    pieces: Iterator[np.ndarray],
    sample_rate: int,
    shows_partial: bool,
) -> tuple[Transcript, bool]:
    """The text of what comes, until nothing more comes or Ctrl-C, and whether it was Ctrl-C.

    Args:
        pieces: of samples at ``sample_rate``; it takes its time.
        shows_partial: the text so far stands on one line of standard error meanwhile.
    """
    stream = recognizer.open(sample_rate)
    shown, interrupted = "", False

    def hear(piece_S: np.ndarray) -> None:
        nonlocal shown
        recognizer.accept(stream, piece_S)
        if not shows_partial:
            while recognizer.step():
                pass
            return
        text = recognizer.result(stream).text
        if text != shown:
            shown = text
            _show(text)

    try:
        for piece_S in pieces:
            _uninterrupted(hear, piece_S)
    except KeyboardInterrupt:
        interrupted = True
    if shows_partial:
        _show("")
    return recognizer.finish(stream), interrupted


def played(wav_S: np.ndarray, sample_rate: int, speed: float) -> Iterator[np.ndarray]:
    """Pieces of a recording at the time at which they are heard.

    Args:
        speed: 1 is that of the recording; infinity does not wait.
    """
    step, started = max(1, round(_PIECE_S * sample_rate)), time.monotonic()
    for start in range(0, len(wav_S), step):
        piece_S = wav_S[start : start + step]
        heard_s = started + (start + len(piece_S)) / sample_rate / speed
        time.sleep(max(0.0, heard_s - time.monotonic()))
        yield piece_S


def microphone(sample_rate: int) -> Iterator[np.ndarray]:
    """Pieces of what the default input hears, without end.

    Raises:
        UserError: sounddevice is not installed, or there is no input.
    """
    try:
        import sounddevice
    except (ImportError, OSError) as error:
        raise UserError(
            f"--microphone needs the package sounddevice and PortAudio ({error}): pip install "
            "sounddevice."
        ) from None
    heard: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()

    def callback(samples_SC: np.ndarray, *_: object) -> None:
        heard.put(samples_SC[:, 0].copy())

    try:
        with sounddevice.InputStream(sample_rate, channels=1, dtype="float32", callback=callback):
            while True:
                yield heard.get()
    except sounddevice.PortAudioError as error:
        raise UserError(f"--microphone: the default input cannot be used: {error}") from None


def _uninterrupted(work: Callable[[np.ndarray], None], piece_S: np.ndarray) -> None:
    """Does the work; a Ctrl-C meanwhile comes when it is done.

    A stream that is interrupted between its samples and their text would lose some.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        work(piece_S)
        return
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        work(piece_S)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if came:
        raise KeyboardInterrupt


def _show(text: str) -> None:
    """In the place of what was shown before; of a text too long for the line, its end."""
    width = shutil.get_terminal_size().columns - 1
    sys.stderr.write(f"\r\x1b[K{text[-width:]}")
    sys.stderr.flush()
