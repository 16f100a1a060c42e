"""Transcripts as files: plain text, JSON, subtitles, and tables of words and segments."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from inference.transcript import Transcript, Word

MAX_LINE_CHARACTERS = 42
MAX_SUBTITLE_S = 6.0
LINGER_S = 1.0
PAUSE_S = 1.0
"""A silence between two words after which a new subtitle begins."""


@dataclass(frozen=True)
class Subtitle:
    """A line of text and when it is shown, in seconds from the start of the audio."""

    text: str
    start_s: float
    end_s: float


def subtitles_of(transcript: Transcript) -> list[Subtitle]:
    """Lines of whole words in their order, one at a time.

    A line has up to 42 characters, unless a single word is longer, and spans up to six seconds and
    no pause. It is shown while its words are spoken and a second longer, up to six seconds in all,
    where the next one or the end of the audio leaves time for it.
    """
    lines = list(_lines_of(transcript.words))
    limits_s = [line[0].start_s for line in lines[1:]] + [transcript.duration_s]
    subtitles = []
    for line, limit_s in zip(lines, limits_s, strict=False):
        start_s = line[0].start_s
        spoken_s = line[-1].end_s
        end_s = max(spoken_s, min(spoken_s + LINGER_S, limit_s))
        # A word without a place may have all the time between its neighbours.
        end_s = min(end_s, start_s + MAX_SUBTITLE_S)
        # Words without a place may have no time at all, but players want some.
        end_s = max(end_s, start_s + 0.001)
        subtitles.append(Subtitle(" ".join(word.text for word in line), start_s, end_s))
    return subtitles


def _lines_of(words: Sequence[Word]) -> Iterator[list[Word]]:
    line: list[Word] = []
    for word in words:
        if line:
            characters = sum(len(w.text) + 1 for w in line) + len(word.text)
            is_full = characters > MAX_LINE_CHARACTERS
            is_long = word.end_s - line[0].start_s > MAX_SUBTITLE_S
            if is_full or is_long or word.start_s - line[-1].end_s >= PAUSE_S:
                yield line
                line = []
        line.append(word)
    if line:
        yield line


def as_txt(transcript: Transcript, name: str) -> str:
    """The text, one line."""
    return f"{transcript.text}\n"


def as_json(transcript: Transcript, name: str) -> str:
    """All that a transcript has, and the name of the recording as ``file``, in one line."""
    return json.dumps({"file": name} | transcript.as_dict(), ensure_ascii=False) + "\n"


def as_srt(transcript: Transcript, name: str) -> str:
    """SubRip: numbered subtitles."""
    return "".join(
        f"{number}\n{_clock(s.start_s, ',')} --> {_clock(s.end_s, ',')}\n{s.text}\n\n"
        for number, s in enumerate(subtitles_of(transcript), start=1)
    )


def as_vtt(transcript: Transcript, name: str) -> str:
    """WebVTT, https://www.w3.org/TR/webvtt1."""
    cues = "".join(
        f"\n{_clock(s.start_s, '.')} --> {_clock(s.end_s, '.')}\n{_escaped(s.text)}\n"
        for s in subtitles_of(transcript)
    )
    return f"WEBVTT\n{cues}"


def as_ctm(transcript: Transcript, name: str) -> str:
    """A line per word for NIST's sclite: name, channel, start, duration, word, confidence."""
    name = "_".join(name.split())
    return "".join(
        f"{name} 1 {w.start_s:.3f} {w.end_s - w.start_s:.3f} {w.text} {w.confidence:.4f}\n"
        for w in transcript.words
    )


def as_tsv(transcript: Transcript, name: str) -> str:
    """A line per segment: start and end in seconds, text; a header above."""
    rows = [f"{s.start_s:.3f}\t{s.end_s:.3f}\t{s.text}\n" for s in transcript.segments]
    return "start\tend\ttext\n" + "".join(rows)


FORMATS: Mapping[str, Callable[[Transcript, str], str]] = {
    "txt": as_txt,
    "json": as_json,
    "srt": as_srt,
    "vtt": as_vtt,
    "ctm": as_ctm,
    "tsv": as_tsv,
}
"""What each format makes of a transcript and the name of its recording."""


def _clock(seconds: float, point: str) -> str:
    milliseconds = round(seconds * 1000)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    whole, milliseconds = divmod(milliseconds, 1000)
    return f"{hours:02d}:{minutes:02d}:{whole:02d}{point}{milliseconds:03d}"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
