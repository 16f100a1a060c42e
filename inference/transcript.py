"""What was said, when, and how sure the model is of it."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Token:
    """A token of the model's vocabulary.

    Attributes:
        text: as the tokenizer spells it; "▁" stands for the space before a word.
        start_s, end_s: seconds from the start of the audio.
        confidence: in [0, 1].
    """

    text: str
    start_s: float
    end_s: float
    confidence: float


@dataclass(frozen=True)
class Word:
    """A word.

    Attributes:
        text: the word.
        start_s, end_s: seconds from the start of the audio.
        confidence: in [0, 1].
        is_placed: False where the CTC branch could not place the word: it then shares the time
            between its neighbours.
    """

    text: str
    start_s: float
    end_s: float
    confidence: float
    is_placed: bool = True


@dataclass(frozen=True)
class Segment:
    """A stretch of audio that was recognised at once.

    Attributes:
        text: what was said in it.
        start_s, end_s: seconds from the start of the audio.
        alternatives: other texts of a part of a long recording, the likeliest first, where they
            were asked for. Where parts overlap they have what their neighbours say, too.
    """

    text: str
    start_s: float
    end_s: float
    alternatives: tuple[str, ...] = ()


@dataclass(frozen=True)
class Transcript:
    """The result of a recognition.

    Attributes:
        text: words with spaces between them.
        words: as many as ``text`` has.
        tokens: those of the words.
        segments: one for a short recording, several for a long one.
        duration_s: of the audio.
        alternatives: other texts, the likeliest first, where they were asked for. Those of a long
            recording are its segments'.
    """

    text: str
    words: tuple[Word, ...] = ()
    tokens: tuple[Token, ...] = ()
    segments: tuple[Segment, ...] = ()
    duration_s: float = 0.0
    alternatives: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as ``json`` takes it."""
        return asdict(self)
