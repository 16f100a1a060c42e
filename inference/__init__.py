"""A trained model as an object: waveforms in, text with times and confidences out.

>>> from inference import Transcript
>>> Transcript("HELLO", duration_s=1.5).text
'HELLO'
"""

from typing import TYPE_CHECKING, Any

from inference.transcript import Segment, Token, Transcript, Word

if TYPE_CHECKING:
    from inference.recognizer import Recognizer
    from inference.streaming import StreamingRecognizer

__all__ = [
    "AudioError",
    "Recognizer",
    "Segment",
    "StreamingRecognizer",
    "Token",
    "Transcript",
    "Word",
]


def __getattr__(name: str) -> Any:
    """Imports torch only for what computes: transcripts and audio files do without."""
    if name == "Recognizer":
        from inference.recognizer import Recognizer

        return Recognizer
    if name == "StreamingRecognizer":
        from inference.streaming import StreamingRecognizer

        return StreamingRecognizer
    if name == "AudioError":
        from inference.audio import AudioError

        return AudioError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
