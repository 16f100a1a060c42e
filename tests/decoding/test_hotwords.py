"""Hotwords gain where they are said, and take back what they advanced where they are not."""

import re
import string

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.ctc_outputs import CHARACTERS, ctc_log_probs, spelled
from decoding.ctc_beam_search import CTCBeamSearch, HotwordTree
from decoding.ctc_beam_search.hotwords import WORD_END
from tests.decoding.ctc_searches import BACKENDS, LEXICON, found, outputs, padded, write_ngram

WORDS = st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=3).map(" ".join)


def gain(tree, text):
    """What the phrases in a text are worth at its end."""
    state, total = tree.start, 0.0
    for symbol in text.replace(" ", WORD_END) + WORD_END:
        state = tree.step(state, symbol)
        total += tree.gains[state]
    return total


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(WORDS, st.integers(1, 9), max_size=4), st.lists(WORDS, min_size=1).map(" ".join)
)
def test_a_text_gains_the_boosts_of_the_phrases_in_it(boosts, text):
    words = text.split()
    expected = sum(
        boost
        for phrase, boost in boosts.items()
        for start in range(len(words))
        if words[start : start + len(phrase.split())] == phrase.split()
    )
    assert gain(HotwordTree(boosts), text) == expected


def test_an_advance_grows_with_the_phrase_and_ends_with_it():
    tree = HotwordTree({"ab ac": 6.0, "b": 1.0})

    def advances(symbols):
        state, result = tree.start, []
        for symbol in symbols.replace(" ", WORD_END):
            state = tree.step(state, symbol)
            result.append(tree.advances[state])
        return result

    assert advances("ab ac ") == pytest.approx([1, 2, 3, 4, 5, 0])
    assert advances("ab ab ac ") == pytest.approx([1, 2, 3, 4, 2, 3, 4, 5, 0])
    assert advances("abb") == pytest.approx([1, 2, 0])
    # Not the "b" within a word.
    assert advances("b cb") == pytest.approx([0.5, 0, 0, 0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_phrase_in_doubt_is_found_and_its_boost_counted_once(backend):
    said = "KALO NIGEBABA"
    log_probs_TV = ctc_log_probs(spelled(said, CHARACTERS), len(CHARACTERS), seed=5, doubt=0)
    # The model hears KARO.
    said_L, heard_R = CHARACTERS.index("L"), CHARACTERS.index("R")
    at = log_probs_TV[:, said_L] > -1
    log_probs_TV[at, heard_R], log_probs_TV[at, said_L] = -0.1, -2.5
    searcher = CTCBeamSearch(CHARACTERS, prune_history=False, topk=100, backend=backend)

    def search(hotwords):
        (hypotheses,) = searcher(log_probs_TV[None], hotwords=hotwords)
        return hypotheses[0].text, {h.text: (h.score, h.lm_score) for h in hypotheses}

    text, plain = search({})
    assert text == "KARO NIGEBABA"
    text, boosted = search({"Kalo": 4.0})
    assert text == said
    assert boosted[said] == pytest.approx((plain[said][0], plain[said][1] + 4.0))
    assert boosted["KARO NIGEBABA"] == pytest.approx(plain["KARO NIGEBABA"])
    # Begun, but never finished: nothing remains of it.
    for unsaid in ("KALO NIGE", "NIGEBABAS", "KAL", "ALO", "NIGEBABA KALO"):
        text, unchanged = search({unsaid: 4.0})
        assert text == "KARO NIGEBABA"
        assert unchanged[text] == pytest.approx(plain[text])


def phrases_that_nobody_says(count):
    rng = np.random.default_rng(0)
    letters = list(string.ascii_uppercase)
    names = ("".join(rng.choice(letters, rng.integers(4, 9))) for _ in range(count // 2))
    spelled_out = (" ".join(rng.choice(letters, rng.integers(4, 9))) for _ in range(count // 2))
    return {phrase: float(len(phrase.replace(" ", ""))) for phrase in (*names, *spelled_out)}


@pytest.mark.parametrize("with_ngram", [False, True])
def test_names_gain_and_a_hundred_unsaid_phrases_do_little_harm(with_ngram, tmp_path):
    said, log_probs = outputs(CHARACTERS, 60, doubt=0.6)
    # Not among the words of the n-gram, which are the frequent ones.
    names = {
        word for text in said for word in text.split() if word in LEXICON[8:] and len(word) > 3
    }
    boosts = {name: float(len(name)) for name in names}
    searcher = CTCBeamSearch(
        CHARACTERS,
        beam_size=50,
        ngram=write_ngram(tmp_path / "words.arpa", num_words=8) if with_ngram else None,
    )

    def errors(hotwords):
        texts = [row[0].text for row in searcher(*padded(log_probs), hotwords=hotwords)]
        pairs = list(zip(said, texts, strict=True))
        missed = sum(
            max(0, text.split().count(name) - heard.split().count(name))
            for text, heard in pairs
            for name in names
        )
        return missed, sum(text != heard for text, heard in pairs)

    missed, wrong = errors({})
    unsaid = phrases_that_nobody_says(100)
    assert missed > 20
    assert errors(boosts)[0] < 0.5 * missed
    assert errors(boosts | unsaid)[0] < 0.5 * missed
    assert errors(unsaid)[0] <= 1.05 * missed
    assert errors(unsaid)[1] <= 1.05 * wrong


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_the_ngram_takes_for_unknown_words_is_given_back(backend, tmp_path):
    name, known = "KUZUFI", LEXICON[0]
    arpa = write_ngram(tmp_path / "words.arpa")
    tokens = spelled(f"{known} {name} {known}", CHARACTERS)
    log_probs_TV = ctc_log_probs(tokens, len(CHARACTERS), doubt=0)
    searcher = CTCBeamSearch(CHARACTERS, ngram=arpa, beta=0.0, backend=backend)
    ((plain,),) = searcher(log_probs_TV[None])
    ((boosted,),) = searcher(log_probs_TV[None], hotwords={name: 1.0, known: 2.0})
    assert plain.text == boosted.text == f"{known} {name} {known}"
    offset = 0.5 * 10 / np.log10(np.e)
    assert boosted.lm_score == pytest.approx(plain.lm_score + offset + 1.0 + 2 * 2.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_unknown_word_of_several_phrases_is_given_back_once(backend, tmp_path):
    name, known = "KUZUFI", LEXICON[0]
    tokens = spelled(f"{known} {name} {known}", CHARACTERS)
    log_probs_TV = ctc_log_probs(tokens, len(CHARACTERS), doubt=0)
    arpa = write_ngram(tmp_path / "words.arpa")
    searcher = CTCBeamSearch(CHARACTERS, ngram=arpa, beta=0.0, backend=backend)
    ((plain,),) = searcher(log_probs_TV[None])
    phrases = {name: 1.0, f"{known} {name}": 1.0, f"{name} {known}": 1.0}
    offset = 0.5 * 10 / np.log10(np.e)
    for count in (1, 2, 3):
        hotwords = dict(list(phrases.items())[:count])
        ((boosted,),) = searcher(log_probs_TV[None], hotwords=hotwords)
        assert boosted.lm_score == pytest.approx(plain.lm_score + offset + count)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_file_without_unk_takes_is_given_back(backend, tmp_path):
    name, known = "KUZUFI", LEXICON[0]
    text = write_ngram(tmp_path / "words.arpa").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if "<unk>" not in line]
    assert len(lines) < len(text.splitlines())
    count = int(re.search(r"ngram 1=(\d+)", text)[1])
    arpa = tmp_path / "without.arpa"
    without = "\n".join(lines).replace(f"ngram 1={count}", f"ngram 1={count - 1}")
    arpa.write_text(f"{without}\n", encoding="utf-8")
    tokens = spelled(f"{known} {name} {known}", CHARACTERS)
    log_probs_TV = ctc_log_probs(tokens, len(CHARACTERS), doubt=0)
    searcher = CTCBeamSearch(CHARACTERS, ngram=arpa, beta=0.0, backend=backend)
    ((plain,),) = searcher(log_probs_TV[None])
    ((boosted,),) = searcher(log_probs_TV[None], hotwords={name: 1.0})
    cost = 0.5 * (10 + 100) / np.log10(np.e)
    assert boosted.lm_score == pytest.approx(plain.lm_score + cost + 1.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_utterance_may_have_its_own(backend):
    _, log_probs = outputs(CHARACTERS, 3, doubt=0)
    searcher = CTCBeamSearch(CHARACTERS, hotwords={LEXICON[0]: 3.0}, backend=backend)
    batch = padded(log_probs)
    own = searcher.compile({LEXICON[1]: 5.0})
    together = found(searcher(*batch, hotwords=[None, {}, own]))
    for row, hotwords in enumerate([None, {}, {LEXICON[1]: 5.0}]):
        assert together[row] == found(searcher(log_probs[row][None], hotwords=hotwords))[0]
    assert searcher.start(2).hotwords == (searcher.hotwords,) * 2
    with pytest.raises(ValueError, match="2 hotwords for 3 utterances"):
        searcher(*batch, hotwords=[None, None])


def test_phrases_come_in_the_case_of_the_vocabulary():
    boosts = {"jane  Doe": 2.0, "MARY": 1.0}
    upper = CTCBeamSearch(CHARACTERS).compile(boosts)
    assert (gain(upper, "JANE DOE"), gain(upper, "MARY")) == (2, 1)
    lower = CTCBeamSearch(["-", "▁", *string.ascii_lowercase]).compile(boosts)
    assert (gain(lower, "jane doe"), gain(lower, "mary")) == (2, 1)
    both = CTCBeamSearch(["-", "▁", *string.ascii_letters]).compile(boosts)
    assert (gain(both, "jane Doe"), gain(both, "JANE DOE"), gain(both, "MARY")) == (2, 0, 1)


@pytest.mark.parametrize(
    ("hotwords", "message"),
    [
        ({"JOSÉ": 1.0}, "'JOSÉ' has characters that the vocabulary lacks: 'É'"),
        ({"R2D2": 1.0}, "'R2D2' .* '2'"),
        ({"<s>": 1.0}, "'<s>' .* '<', '>'"),
        ({"  ": 1.0}, "empty"),
        ({"JANE": float("nan")}, "'JANE' is nan"),
        ({"JANE": float("inf")}, "'JANE' is inf"),
    ],
)
def test_phrases_that_cannot_be_found_are_named(hotwords, message):
    with pytest.raises(ValueError, match=message):
        CTCBeamSearch(CHARACTERS, hotwords=hotwords)
    with pytest.raises(ValueError, match=message):
        CTCBeamSearch(CHARACTERS)(np.zeros((1, 0, len(CHARACTERS))), hotwords=hotwords)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_phrase_that_no_frame_has_changes_nothing(backend):
    # Tokens of 0.7 to 30 % are in doubt: only a phrase may be spelled with them.
    options = {"backend": backend, "beam_size": 16, "token_prune_min_logp": -1.2, "topk": 4}
    log_probs = [
        np.where(np.arange(len(CHARACTERS)) == CHARACTERS.index("Z"), -50.0, item_TV)
        for item_TV in outputs(CHARACTERS, 4, doubt=0.8)[1]
    ]
    assert sum(((item_TV > -5.0) & (item_TV < -1.2)).sum() for item_TV in log_probs) > 20
    batch = padded(log_probs)
    plain = CTCBeamSearch(CHARACTERS, **options)(*batch)
    search = CTCBeamSearch(CHARACTERS, hotwords={"ZZ": 10.0, "ZEBRA": 10.0}, **options)
    assert found(search(*batch)) == found(plain)
