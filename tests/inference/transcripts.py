"""What makes two transcripts the same."""

import numpy as np

from inference import Transcript

CONFIDENCE = 1e-4


def assert_same(found: Transcript, wanted: Transcript) -> None:
    """The same text and times; confidences that differ by rounding."""
    assert found.text == wanted.text
    assert found.alternatives == wanted.alternatives
    for name in ("words", "tokens"):
        ours, theirs = getattr(found, name), getattr(wanted, name)
        assert [(w.text, w.start_s, w.end_s) for w in ours] == [
            (w.text, w.start_s, w.end_s) for w in theirs
        ]
        np.testing.assert_allclose(
            [w.confidence for w in ours], [w.confidence for w in theirs], rtol=0, atol=CONFIDENCE
        )
