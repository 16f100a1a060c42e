"""Seconds by part of the work."""

import time

from training.reporting.step_clock import StepClock


def test_every_part_gets_the_time_before_its_mark_and_nothing_twice():
    clock = StepClock("cpu")
    clock.start()
    for _ in range(2):
        time.sleep(0.01)
        clock.end_of("forward")
        time.sleep(0.05)
        clock.end_of("backward")
    time.sleep(0.2)
    clock.start()
    clock.end_of("data")
    seconds = clock.read()
    assert 0.02 <= seconds["forward"] < seconds["backward"]
    assert seconds["backward"] >= 0.1
    assert seconds["data"] < 0.1
    assert clock.read() == {}
    clock.end_of("forward")
    assert list(clock.read()) == ["forward"]
