"""One object serves everybody: the same alone, in any batch and from many threads."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from common.errors import UserError
from decoding.ctc_beam_search import CTCBeamSearch, HotwordTree
from inference import Recognizer, Transcript
from inference.kept import Kept
from tests.inference.runs import make_run
from tests.inference.transcripts import assert_same

ARPA = """\\data\\
ngram 1=3

\\1-grams:
-1\t<s>
-1\tOWN{second}
-1\tTWO

\\end\\
"""


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
        ({"beam_size": 2, "search": "greedy"}, "beam_size belongs to search beam"),
        ({"ngram": "words.arpa", "alpha": 1.0, "search": "greedy"}, "ngram belongs to search beam"),
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
    with pytest.raises(UserError, match="hotwords belongs to search beam"):
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
    assert len(recognizer._search._ctc_searches._made) == 8


def test_searches_share_an_ngram_until_its_file_changes(recognizers, waveforms, tmp_path):
    recognizer, path = recognizers["ctc"], tmp_path / "words.arpa"

    def ngram_of(**options):
        recognizer.transcribe(waveforms[0], ngram=path, **options)
        *_, latest = recognizer._search._ctc_searches._made.values()
        return latest.ngram

    path.write_text(ARPA.format(second=""), encoding="utf-8")
    first = ngram_of()
    assert all(ngram_of(**more) is first for more in ({"alpha": 0.1}, {"beam_size": 3}, {}))
    path.write_text(ARPA.format(second=" 0.2"), encoding="utf-8")
    second = ngram_of()
    assert second is not first
    assert {search.ngram for search in recognizer._search._ctc_searches._made.values()} <= {
        *(second, None)
    }
    path.unlink()
    with pytest.raises(UserError, match="No such file"):
        ngram_of()


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("CTC/demo_streaming", {}),
        ("CTC/demo_streaming", {"chunk_ms": 640}),
        ("CTC/demo_streaming", {"whole": True}),
        ("S2S/demo", {"whole": True}),
    ],
)
def test_a_call_has_one_ngram_whatever_becomes_of_its_file(audio_files, tmp_path, recipe, options):
    run = make_run(tmp_path / "run", recipe)
    recognizer = Recognizer.from_run(run, device="cpu")
    path, ngrams = tmp_path / "words.arpa", []
    make = CTCBeamSearch.start

    def seen(self, *arguments):
        ngrams.append(self.ngram)
        return make(self, *arguments)

    def paths():
        """Changes the file, and has others use it, while recordings are read."""
        yield audio_files[0]
        path.write_text(ARPA.format(second=" 0.2"), encoding="utf-8")
        yield audio_files[1]
        recognizer.transcribe(audio_files[1], ngram=path, **options)
        yield audio_files[2]
        path.unlink()
        yield audio_files[3]

    path.write_text(ARPA.format(second=""), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CTCBeamSearch, "start", seen)
        results = recognizer.transcribe_many(paths(), ngram=path, batch_seconds=0.1, **options)
        assert all(isinstance(found, Transcript) for _, found in results)
    assert len(ngrams) >= 5
    assert sum(ngram is not ngrams[0] for ngram in ngrams) == 1


@pytest.mark.parametrize("kind", ["ctc", "s2s"])
def test_hotwords_are_made_ready_once(recognizers, waveforms, kind, monkeypatch):
    recognizer, made = recognizers[kind], []
    make = HotwordTree.__init__

    def counted(self, *arguments):
        made.append(self)
        make(self, *arguments)

    monkeypatch.setattr(HotwordTree, "__init__", counted)
    for wav_S in waveforms[:3]:
        recognizer.transcribe(wav_S, hotwords={"OWN": 1.25})
    assert len(made) == 1


def test_who_asks_meanwhile_waits_and_others_do_not():
    kept, may_go_on, begun = Kept(2), threading.Event(), threading.Event()

    def slow():
        begun.set()
        assert may_go_on.wait(30)
        return "slow"

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(kept.get, "a", slow)
        assert begun.wait(30)
        second = pool.submit(kept.get, "a", lambda: "twice")
        assert kept.get("b", lambda: "at once") == "at once"
        may_go_on.set()
        assert first.result() == second.result() == "slow"
    with pytest.raises(ValueError, match="no"):
        kept.get("c", lambda: int("no"))
    assert kept.get("c", lambda: 3) == 3
    kept.get("d", lambda: 4)
    assert kept.get("c", lambda: 0) == 3
    assert kept.get("a", lambda: "anew") == "anew"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_what_others_were_at_does_not_hold_up_a_fork():
    script = """
import os, threading
from inference import workers
from inference.kept import Kept
kept, begun, may_go_on = Kept(2), threading.Event(), threading.Event()
kept.get("made", lambda: "before")
def slow():
    with workers._lock:
        begun.set()
        may_go_on.wait()
    return "parent"
thread = threading.Thread(target=kept.get, args=("slow", slow))
thread.start()
begun.wait()
kept._lock.__enter__()
if os.fork() == 0:
    print(workers.threads_of_caller() > 0, kept.get("made", lambda: "anew"), flush=True)
    print(kept.get("slow", lambda: "child"), flush=True)
    os._exit(0)
kept._lock.__exit__(None, None, None)
os.wait()
may_go_on.set()
thread.join()
print(kept.get("slow", lambda: "anew"))
"""
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert ran.stdout.split() == ["True", "before", "child", "parent"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "call",
    [
        "asr.transcribe(path).text",
        "list(asr.transcribe_many([path]))[0][1].text",
        "asr.transcribe_batch([wav_S])[0].text",
        "asr.encode([wav_S])[0].shape[0]",
    ],
)
def test_in_a_fork_there_are_no_threads_to_wait_for(ctc_run, audio_files, threads, call):
    script = f"""
import os, sys
from inference import Recognizer
path = {str(audio_files[0])!r}
asr = Recognizer.from_run({str(ctc_run)!r}, device="cpu", threads={threads})
wav_S = asr.load(path)
if os.fork() == 0:
    try:
        print({call}, flush=True)
    except BaseException as error:
        print(type(error).__name__, error, flush=True)
    os._exit(0)
print({call}, flush=True)
os.wait()
"""
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    child = [line for line in ran.stdout.splitlines() if line.startswith("UserError")]
    assert len(ran.stdout.splitlines()) == 2, ran.stderr
    assert len(child) == (threads > 1)
    assert all("Load it in each process that uses it" in line for line in child)


def test_a_device_without_content_is_refused(ctc_run):
    with pytest.raises(UserError, match="device meta"):
        Recognizer.from_run(ctc_run, device="meta")


def test_a_recording_encoded_whole_has_one_text(recognizers, waveforms, monkeypatch):
    monkeypatch.setattr(Recognizer, "load", None)
    with pytest.raises(UserError, match="alternatives"):
        recognizers["ctc"].transcribe(waveforms[0], whole=True, alternatives=1)


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
