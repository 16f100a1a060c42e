"""Transcripts as files, and subtitles that can be read."""

import itertools
import json
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.formats import (
    FORMATS,
    LINGER_S,
    MAX_LINE_CHARACTERS,
    MAX_SUBTITLE_S,
    subtitles_of,
)
from inference.transcript import Segment, Token, Transcript, Word


def transcript_of(*words: tuple[str, float, float], duration_s: float = 60.0) -> Transcript:
    placed = tuple(Word(text, start_s, end_s, 0.5) for text, start_s, end_s in words)
    text = " ".join(word.text for word in placed)
    tokens = tuple(Token(w.text, w.start_s, w.end_s, w.confidence) for w in placed)
    return Transcript(text, placed, tokens, (Segment(text, 0.0, duration_s),), duration_s)


HELLO = transcript_of(("HELLO", 0.2, 0.5), ("R&B", 3661.0, 3661.25), duration_s=3700.0)
EMPTY = Transcript("", duration_s=0.05)


@pytest.mark.parametrize(
    ("name", "hello", "empty"),
    [
        ("txt", "HELLO R&B\n", "\n"),
        (
            "srt",
            "1\n00:00:00,200 --> 00:00:01,500\nHELLO\n\n2\n01:01:01,000 --> 01:01:02,250\nR&B\n\n",
            "",
        ),
        (
            "vtt",
            "WEBVTT\n\n00:00:00.200 --> 00:00:01.500\nHELLO\n"
            "\n01:01:01.000 --> 01:01:02.250\nR&amp;B\n",
            "WEBVTT\n",
        ),
        (
            "ctm",
            "my_file 1 0.200 0.300 HELLO 0.5000\nmy_file 1 3661.000 0.250 R&B 0.5000\n",
            "",
        ),
        ("tsv", "start\tend\ttext\n0.000\t3700.000\tHELLO R&B\n", "start\tend\ttext\n"),
    ],
)
def test_format(name, hello, empty):
    assert FORMATS[name](HELLO, "my file") == hello
    assert FORMATS[name](EMPTY, "my file") == empty


def test_json_has_everything_in_one_line():
    text = FORMATS["json"](HELLO, "my file")
    assert text.count("\n") == 1
    expected = json.loads(json.dumps({"file": "my file"} | HELLO.as_dict()))
    assert json.loads(text) == expected
    assert [word["text"] for word in expected["words"]] == ["HELLO", "R&B"]


def test_subtitles_break_where_a_line_is_full_long_or_followed_by_a_pause():
    words = [("TWENTYTWOCHARACTERSHERE", 0.0, 0.5), ("EIGHTEENCHARACTERS", 0.5, 1.0)]
    full = transcript_of(*words, ("X", 1.0, 1.1))
    assert [s.text for s in subtitles_of(full)] == [" ".join(w[0] for w in words), "X"]
    slow = transcript_of(*((str(i), 0.9 * i, 0.9 * i + 0.5) for i in range(10)))
    assert [s.text for s in subtitles_of(slow)] == ["0 1 2 3 4 5 6", "7 8 9"]
    pause = transcript_of(("A", 0.0, 0.1), ("B", 1.05, 1.1), ("C", 2.2, 2.3))
    assert [s.text for s in subtitles_of(pause)] == ["A B", "C"]


def test_a_subtitle_stays_a_second_where_the_next_one_or_the_end_leaves_it():
    close = transcript_of(("A" * 42, 0.0, 0.2), ("B", 0.5, 0.6), duration_s=1.0)
    assert [(s.start_s, s.end_s) for s in subtitles_of(close)] == [(0.0, 0.5), (0.5, 1.0)]
    alone = transcript_of(("A", 0.0, 2.0), ("B", 2.5, 3.0), duration_s=60.0)
    assert [s.end_s for s in subtitles_of(alone)] == [3.0 + LINGER_S]
    long = transcript_of(("A", 0.0, 3.0), ("B", 3.5, 5.5), duration_s=60.0)
    assert [s.end_s for s in subtitles_of(long)] == [MAX_SUBTITLE_S]


@given(
    st.lists(
        st.tuples(st.text("ABC", min_size=1, max_size=50), st.floats(0, 2), st.floats(0, 9)),
        max_size=40,
    )
)
def test_subtitles_hold_every_word_once_and_never_overlap(steps):
    words, time_s = [], 0.0
    for text, gap_s, length_s in steps:
        words.append((text, time_s + gap_s, time_s + gap_s + length_s))
        time_s = words[-1][2]
    subtitles = subtitles_of(transcript_of(*words, duration_s=time_s))
    assert " ".join(s.text for s in subtitles).split() == [word[0] for word in words]
    for subtitle in subtitles:
        alone = " " not in subtitle.text
        assert subtitle.start_s < subtitle.end_s
        assert alone or len(subtitle.text) <= MAX_LINE_CHARACTERS
        assert subtitle.end_s - subtitle.start_s <= MAX_SUBTITLE_S + 1e-6
        assert subtitle.end_s <= time_s + 0.001
    for earlier, later in itertools.pairwise(subtitles):
        assert earlier.end_s <= later.start_s + 0.002


def test_times_are_rounded_as_a_whole():
    late = transcript_of(("A", 59.9996, 61.0), duration_s=61.0)
    assert re.search(r"00:01:00,000 --> 00:01:01,000", FORMATS["srt"](late, ""))


def test_formats_need_no_torch():
    code = "import sys, inference.formats; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
