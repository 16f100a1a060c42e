"""Numbers and tables in words."""

import pytest

from common.tables import format_duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (294, "4 min 54 s"),
        (3599.6, "1 h 00 min"),
    ],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text
