"""Where the time of training steps goes, without waiting for the device."""

import time
from collections import defaultdict

import torch


class StepClock:
    """Seconds by part of the work: every mark ends the part that it names.

    On a GPU the marks are events in its queue: what counts is when the GPU gets there, and a pause
    of it counts for the part whose work it waits for.

    Args:
        device: that computes.

    Example:
        >>> clock = StepClock("cpu")
        >>> clock.start()
        >>> clock.end_of("forward")
        >>> list(clock.read())
        ['forward']
    """

    def __init__(self, device: torch.device | str):
        self._on_gpu = torch.device(device).type == "cuda"
        self._marks: list[tuple[str | None, float | torch.cuda.Event]] = []

    def start(self) -> None:
        """What comes before has no part in what follows."""
        self._marks.append((None, self._now()))

    def end_of(self, part: str) -> None:
        """The time since the last mark belongs to ``part``."""
        self._marks.append((part, self._now()))

    def read(self) -> dict[str, float]:
        """Seconds of each part since the last reading; the device has to be done with them."""
        seconds: dict[str, float] = defaultdict(float)
        for (_, begin), (part, end) in zip(self._marks, self._marks[1:], strict=False):
            if part is not None:
                passed = begin.elapsed_time(end) / 1e3 if self._on_gpu else end - begin
                seconds[part] += passed
        del self._marks[:-1]
        return dict(seconds)

    def _now(self) -> "float | torch.cuda.Event":
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
