"""Utterances put together from others: cut at pauses, aligned rightly, drawn by the seed alone."""

import itertools

import numpy as np
import pytest
import soundfile
import torch

from decoding.ctc_alignment import align_words
from training.splicing.segments import Segment, cut_at_pauses, read_segments, write_segments
from training.splicing.splice import Splicing

RATE = 16000


def tone(seconds, pitch_hz=300.0):
    return 0.3 * np.sin(2 * np.pi * pitch_hz * np.arange(round(seconds * RATE)) / RATE)


def quiet(seconds, seed=0):
    return 0.001 * np.random.default_rng(seed).standard_normal(round(seconds * RATE))


def likeliest_path(log_probs_TV, tokens, blank):
    """The best of all paths, by trying each."""
    frames, size = log_probs_TV.shape

    def says(path):
        return [t for t, _ in itertools.groupby(path) if t != blank]

    paths = [p for p in itertools.product(range(size), repeat=frames) if says(p) == tokens]
    return max(paths, key=lambda path: sum(log_probs_TV[t, v].item() for t, v in enumerate(path)))


@pytest.mark.parametrize("tokens", [[1, 2], [1, 1], [2, 1, 2], [2]])
def test_words_are_where_the_likeliest_path_has_their_tokens(tokens):
    log_probs_TV = torch.randn(6, 3, generator=torch.Generator().manual_seed(3)).log_softmax(-1)
    path = likeliest_path(log_probs_TV, tokens, blank=0)
    runs, first = [], 0
    for token, group in itertools.groupby(path):
        stop = first + len(list(group))
        if token:
            runs.append((first, stop))
        first = stop
    each_a_word = align_words(log_probs_TV, tokens, ["▁A"] * len(tokens))
    assert each_a_word.spans == runs
    score = sum(log_probs_TV[t, v].item() for t, v in enumerate(path))
    assert each_a_word.log_prob_per_token == pytest.approx(score / len(tokens), rel=1e-5)
    # One word of several tokens reaches from its first to its last.
    as_one = align_words(log_probs_TV, tokens, ["▁A"] + ["B"] * (len(tokens) - 1))
    assert as_one.spans == [(runs[0][0], runs[-1][1])]
    # A space alone belongs to no word.
    if len(tokens) > 1:
        with_space = align_words(log_probs_TV, tokens, ["▁"] + ["B"] * (len(tokens) - 1))
        assert with_space.spans == [(runs[1][0], runs[-1][1])]


@pytest.mark.parametrize("tokens", [[], [1, 1, 1], [1, 2, 1, 2]])
def test_what_cannot_be_aligned_is_none(tokens):
    log_probs_TV = torch.zeros(3, 3).log_softmax(-1)
    assert align_words(log_probs_TV, tokens, ["▁A"] * len(tokens)) is None


def test_neither_words_without_tokens_nor_broken_posteriors_are_aligned():
    log_probs_TV = torch.zeros(5, 3).log_softmax(-1)
    assert align_words(log_probs_TV, [1, 2], ["▁", "A"]) is not None
    assert align_words(log_probs_TV, [1, 2, 1], ["▁", "A", "▁"]) is None
    for value in (torch.nan, torch.inf):
        log_probs_TV[2, 1] = value
        assert align_words(log_probs_TV, [1, 2], ["▁A", "▁B"]) is None


def test_a_recording_is_cut_in_its_pauses_and_nowhere_else():
    # A and B run into each other; a pause; C; a long silence.
    wav_S = np.concatenate([quiet(0.5), tone(0.6), quiet(0.4, 1), tone(0.3, 500), quiet(1.0, 2)])
    spans = [(9000, 10000), (14000, 15000), (25000, 26000)]
    first, second = cut_at_pauses(wav_S, RATE, ["A", "B", "C"], spans, "u")
    assert (first.words, second.words) == ("A B", "C")
    for segment, begin_s, end_s in ((first, 0.5, 1.1), (second, 1.5, 1.8)):
        assert 0.1 < begin_s - segment.start / RATE < 0.2 + 1e-3
        assert 0.1 < segment.stop / RATE - end_s < 0.2 + 1e-3
    assert first.stop <= second.start


def test_zeros_before_a_recording_hide_no_pause():
    wav_S = np.concatenate([np.zeros(8000), tone(0.5), quiet(0.5), tone(0.5), np.zeros(4000)])
    spans = [(9000, 10000), (26000, 27000)]
    assert [c.words for c in cut_at_pauses(wav_S, RATE, ["A", "B"], spans, "u")] == ["A", "B"]


def test_speech_in_noise_is_not_cut_where_it_only_fades():
    noise_S = 0.1 * np.random.default_rng(0).standard_normal(24000)
    noise_S[:8000] += tone(0.5)
    noise_S[16000:] += tone(0.5)
    spans = [(3000, 4000), (19000, 20000)]
    assert [c.words for c in cut_at_pauses(noise_S, RATE, ["A", "B"], spans, "u")] in ([], ["A B"])


@pytest.mark.parametrize("frames", [0, 1, 3, 800, 801])
@pytest.mark.parametrize("level", [0.0, 0.5])
def test_silence_and_single_samples_are_no_mistake(frames, level):
    wav_S = np.full(frames, level, dtype=np.float32)
    spans = [(0, 1), (frames, frames)]
    segments = cut_at_pauses(wav_S, RATE, ["A", "B"], spans, "u")
    assert all(0 <= segment.start < segment.stop <= frames for segment in segments)


def test_chunks_come_back_from_their_file(tmp_path):
    segments = [Segment("a", 0, 10, "ÄRGER ഒന്ന്"), Segment("b", 5, 6, "B")]
    write_segments(tmp_path / "segments.json", segments, {"step": 17})
    assert read_segments(tmp_path / "segments.json") == (segments, {"step": 17})


@pytest.fixture
def rows(tmp_path):
    """Two speakers; each sample of a recording tells its utterance."""
    rows = {}
    for number, (key, speaker) in enumerate([("a", "1"), ("b", "1"), ("c", "2")], start=1):
        path = tmp_path / f"{key}.wav"
        soundfile.write(path, np.full(RATE, number / 10, np.float32), RATE, subtype="FLOAT")
        rows[key] = {"wav": str(path), "spk_id": speaker, "wrd": key.upper()}
    return rows


CHUNKS = [
    Segment("a", 0, 4000, "ONE"),
    Segment("a", 4000, 9000, "TWO TWO"),
    Segment("b", 100, 6100, "THREE"),
    Segment("c", 0, 3000, "FOUR"),
    Segment("left out", 0, 10, "NOTHING"),
]
LEVELS = {"ONE": 0.1, "TWO TWO": 0.1, "THREE": 0.2, "FOUR": 0.3}


def spliced(rows, share=1.0, seed=1, epoch=1, key="a", samples=RATE):
    splicing = Splicing(share, seed, rows)
    splicing.use(CHUNKS)
    splicing.epoch = epoch
    return splicing(torch.zeros(samples), rows[key]["wrd"], key, RATE)


def test_a_spliced_utterance_says_what_its_pieces_say(rows):
    lengths = {segment.words: segment.stop - segment.start for segment in CHUNKS}
    seen = set()
    for epoch in range(20):
        wav_S, words = spliced(rows, epoch=epoch)
        seen.add(words)
        place, rest = 0, words
        while rest:
            piece = next(text for text in lengths if rest.startswith(text))
            middle = wav_S[place + 100 : place + lengths[piece] - 100]
            assert torch.allclose(middle, torch.tensor(LEVELS[piece]))
            place, rest = place + lengths[piece], rest[len(piece) :].lstrip()
        assert place == len(wav_S) <= RATE
        assert "FOUR" not in words, "another speaker's"
    assert len(seen) > 3


def test_the_outcome_depends_on_seed_epoch_and_utterance_alone(rows):
    first = spliced(rows)
    torch.manual_seed(99)
    again = spliced(rows)
    assert torch.equal(first[0], again[0])
    assert first[1] == again[1]
    variants = {spliced(rows, **change)[1] for change in [{"seed": s} for s in range(9)]}
    variants_of_epoch = {spliced(rows, epoch=epoch)[1] for epoch in range(9)}
    assert len(variants) > 1
    assert len(variants_of_epoch) > 1
    assert any(spliced(rows, epoch=e)[1] != spliced(rows, epoch=e, key="b")[1] for e in range(9))


def test_a_share_of_the_utterances_is_spliced(rows):
    given = [spliced(rows, share=0.3, epoch=epoch)[1] == "A" for epoch in range(200)]
    assert 0.6 < np.mean(given) < 0.8
    assert spliced(rows, share=0.0)[1] == "A"


@pytest.mark.parametrize(("key", "samples"), [("a", 3999), ("c", 2999)])
def test_an_utterance_without_fitting_pieces_stays(rows, key, samples):
    wav_S, words = spliced(rows, key=key, samples=samples)
    assert torch.equal(wav_S, torch.zeros(samples))
    assert words == rows[key]["wrd"]


def test_nothing_is_spliced_before_there_are_pieces(rows):
    wav_S, words = Splicing(1.0, 1, rows)(torch.zeros(RATE), "A", "a", RATE)
    assert len(wav_S) == RATE
    assert words == "A"
