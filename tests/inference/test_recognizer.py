"""One object serves everybody: the same alone, in any batch and from many threads."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from common.errors import UserError
from tests.inference.transcripts import assert_same


def test_the_run_hears_something(recognizer, waveforms):
    texts = [t.text for t in recognizer.transcribe_batch(waveforms)]
    assert len(set(texts)) > 3
    assert any(" " in text for text in texts)


@pytest.mark.parametrize("search", ["beam", "greedy"])
def test_alone_and_in_a_mixed_batch_are_the_same(recognizer, waveforms, search):
    options = {"search": search, "alternatives": 1 if search == "beam" else 0}
    together = recognizer.transcribe_batch(waveforms, **options)
    for wav_S, found in zip(waveforms, together, strict=True):
        assert_same(found, recognizer.transcribe_batch([wav_S], **options)[0])
    backwards = recognizer.transcribe_batch(waveforms[::-1], **options)
    for found, wanted in zip(backwards[::-1], together, strict=True):
        assert_same(found, wanted)


@pytest.mark.parametrize("search", [{}, {"beam_size": 2, "alternatives": 1}, {"search": "greedy"}])
def test_32_threads_find_what_one_finds(recognizer, waveforms, search):
    wanted = [recognizer.transcribe_batch([wav_S], **search)[0] for wav_S in waveforms]
    all_started = threading.Barrier(32)

    def transcribe(number):
        all_started.wait()
        order = np.random.default_rng(number).permutation(len(waveforms))[:4]
        return [(i, recognizer.transcribe_batch([waveforms[i]], **search)[0]) for i in order]

    with ThreadPoolExecutor(32) as pool:
        for found in pool.map(transcribe, range(32)):
            for i, transcript in found:
                assert_same(transcript, wanted[i])


def test_one_word_per_word_with_times_in_order(recognizer, waveforms):
    for wav_S, found in zip(waveforms, recognizer.transcribe_batch(waveforms), strict=True):
        assert [word.text for word in found.words] == found.text.split()
        assert found.duration_s == len(wav_S) / 16000
        times = [t for word in found.words for t in (word.start_s, word.end_s)]
        assert times == sorted(times)
        assert all(0 <= t <= found.duration_s for t in times)
        assert all(0 <= word.confidence <= 1 for word in found.words)
        if any(word.is_placed for word in found.words):
            spelled = "".join(token.text for token in found.tokens).replace("▁", " ")
            assert spelled.split() == found.text.split()


def test_words_that_do_not_fit_into_the_frames_share_the_recording(recognizers, waveforms):
    recognizer = recognizers["s2s"]
    (whole,) = recognizer.transcribe_batch([waveforms[5]])
    assert all(word.is_placed for word in whole.words)
    tokens = recognizer.model.tokenizer.encode(whole.text * 30)
    placed = recognizer._search._placed(tokens, recognizer.encode([waveforms[5]])[1][0])
    assert {(p.start_frame, p.end_frame) for p in placed} == {(None, None)}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"search": "best"}, "search is 'best'"),
        ({"beam_size": 0}, "beam_size is 0"),
        ({"alternatives": -1}, "alternatives is -1"),
        ({"alternatives": 2, "search": "greedy"}, "alternatives need search beam"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"beta": float("inf")}, "beta is inf"),
        ({"beam": 3}, "beam"),
    ],
)
def test_an_option_that_cannot_be_is_named(recognizer, waveforms, option, message):
    with pytest.raises(UserError, match=message):
        recognizer.transcribe(waveforms[0], **option)


def test_weights_of_an_ngram_need_one(recognizers, waveforms):
    with pytest.raises(UserError, match="beta belongs to an n-gram, and there is none"):
        recognizers["ctc"].transcribe(waveforms[0], beta=0.3)


def test_a_joint_search_refuses_what_it_would_ignore(recognizers, waveforms):
    with pytest.raises(UserError, match="alpha: the joint search"):
        recognizers["s2s"].transcribe(waveforms[0], alpha=0.3)
    with pytest.raises(UserError, match="hotwords need search beam"):
        recognizers["s2s"].transcribe(waveforms[0], search="greedy", hotwords={"ONE": 1})


def test_hotwords_are_preferred(recognizer, waveforms):
    plain = recognizer.transcribe(waveforms[4]).text
    found = recognizer.transcribe(waveforms[4], beam_size=8, hotwords={"EON": 60.0})
    assert "EON" in found.text.split()
    assert "EON" not in plain.split()
    assert [word.text for word in found.words] == found.text.split()
    with pytest.raises(UserError, match="'ж'"):
        recognizer.transcribe(waveforms[4], hotwords={"ж": 1.0})


def test_samples_are_arrays_and_tensors_of_any_type(recognizers, waveforms):
    recognizer = recognizers["ctc"]
    coarse_S = torch.from_numpy(waveforms[4]).bfloat16()
    wanted = recognizer.transcribe(coarse_S.float().numpy())
    for samples in (coarse_S, coarse_S.double()[:, None], coarse_S.float().requires_grad_()):
        assert_same(recognizer.transcribe(samples), wanted)


def test_alternatives_differ_from_the_text(recognizer, waveforms):
    found = recognizer.transcribe(waveforms[4], alternatives=2)
    assert len(found.alternatives) > 0
    assert len({found.text, *found.alternatives}) == 1 + len(found.alternatives)


def test_searches_are_kept_but_not_without_end(recognizers, waveforms):
    recognizer = recognizers["ctc"]
    for beam_size in range(2, 14):
        recognizer.transcribe(waveforms[0], beam_size=beam_size)
    assert len(recognizer._search._ctc_searches) == 8


@pytest.mark.parametrize("options", [{}, {"whole": True}, {"search": "greedy"}])
def test_a_network_whose_output_is_no_number_is_refused(recognizers, waveforms, options):
    recognizer = recognizers["ctc"]
    bias = recognizer.model.ctc_lin.w.bias
    kept = bias[1].item()
    try:
        bias[1] = float("inf")
        with pytest.raises(UserError, match="not finite with precision fp32"):
            recognizer.transcribe(waveforms[0], **options)
    finally:
        bias[1] = kept
