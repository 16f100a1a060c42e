import itertools
from collections import Counter

import numpy as np
import pytest

from corpora.synthetic import room, speech
from corpora.synthetic.sentences import SLOTS, TEMPLATES, SentenceMaker
from corpora.synthetic.speaker_process import SAMPLE_RATE
from corpora.synthetic.voices import SPLITS, voices_of

RATE = 16000


def sentences(count: int, seed: int = 1) -> list[str]:
    return list(itertools.islice(SentenceMaker(seed), count))


def vocabulary() -> set[str]:
    """Every word that a sentence can hold."""
    phrases = [*TEMPLATES, *(choice for choices in SLOTS.values() for choice in choices)]
    words = {word for phrase in phrases for word in phrase.split()}
    return {word for word in words if not word.startswith("{")}


def test_no_sentence_comes_twice_and_the_seed_decides_them():
    made = sentences(2000)
    assert len(set(made)) == 2000
    assert sentences(50) == made[:50] != sentences(50, seed=2)


def test_a_training_corpus_teaches_every_word_several_times():
    counts = Counter(word for sentence in sentences(1200) for word in sentence.split())
    assert counts.keys() == vocabulary()
    assert 200 <= len(counts) <= 400
    assert min(counts.values()) >= 5


def test_words_are_letters_only():
    assert all(word.isalpha() and word.isascii() and word.islower() for word in vocabulary())


def test_at_least_twenty_voices_and_none_in_two_splits():
    variants = {split: {voice.variant for voice in voices_of(split)} for split in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not variants[one] & variants[other]
    speakers = [voice.speaker for split in SPLITS for voice in voices_of(split)]
    assert len(set(speakers)) == len(speakers) >= 20


def test_both_sexes_are_among_the_first_voices_of_every_split():
    for split in SPLITS:
        assert {voice.sex for voice in voices_of(split)[:4]} == {"M", "F"}


def test_resampling_keeps_pitch_and_duration():
    samples = (10000 * np.sin(2 * np.pi * 440 * np.arange(22050) / 22050)).astype(np.int16)
    audio = room.resample(samples, 22050, RATE)
    assert len(audio) == RATE
    assert np.argmax(np.abs(np.fft.rfft(audio))) == 440
    assert np.max(np.abs(audio[1000:-1000])) == pytest.approx(10000 / 32768, rel=1e-2)


@pytest.mark.parametrize("slope", [0.0, 1.0, 2.0])
def test_noise_has_unit_power_and_the_slope_asked_for(slope):
    noise = room.coloured_noise(1 << 16, slope, np.random.default_rng(0))
    assert np.mean(noise**2) == pytest.approx(1.0)
    power = np.abs(np.fft.rfft(noise)) ** 2
    low, high = power[100:200].mean(), power[10000:20000].mean()
    # A hundredfold frequency is two decades: 20 dB for each unit of the slope.
    assert 10 * np.log10(low / high) == pytest.approx(20 * slope, abs=2.0)


@pytest.mark.parametrize("snr_db", [-5.0, 12.0, 40.0])
def test_noise_is_added_at_the_ratio_asked_for(snr_db):
    speech_S = np.random.default_rng(1).standard_normal(RATE) * 0.03
    noisy_S = room.add_noise(speech_S, snr_db, 1.0, np.random.default_rng(0))
    ratio = np.sum(speech_S**2) / np.sum((noisy_S - speech_S) ** 2)
    assert 10 * np.log10(ratio) == pytest.approx(snr_db)


def test_echoes_follow_the_sound_with_the_decay_and_energy_asked_for():
    click_S = np.zeros(RATE)
    click_S[1000] = 1.0
    echo_S = room.reverberate(click_S, RATE, 0.4, 6.0, np.random.default_rng(0))
    assert np.max(np.abs(echo_S[:1000])) < 1e-12
    assert echo_S[1000] == pytest.approx(1.0)
    tail_S = echo_S[1001:]
    assert -10 * np.log10(np.sum(tail_S**2)) == pytest.approx(6.0, abs=1e-6)
    early, late = (np.mean(tail_S[start : start + 1600] ** 2) for start in (0, 3200))
    # 0.2 s at 60 dB in 0.4 s.
    assert 10 * np.log10(early / late) == pytest.approx(30.0, abs=1.5)


def test_the_level_is_reached_and_never_clips():
    audio_S = np.random.default_rng(0).standard_normal(RATE)
    quiet_S = room.set_level(audio_S, -26.0)
    assert 20 * np.log10(np.sqrt(np.mean(quiet_S**2))) == pytest.approx(-26.0)
    assert np.max(np.abs(room.set_level(audio_S, 0.0))) == pytest.approx(0.99)


PROMPTS = [speech.Prompt("open the kitchen door", 50, 150), speech.Prompt("stop", 45, 140)]


@pytest.fixture
def espeak():
    pytest.importorskip("espeakng_loader", reason="espeak-ng is not installed (extra 'demo')")


def test_a_voice_says_the_same_in_every_process(espeak):
    voice = voices_of("test-clean")[0].name
    first, second = speech.speak(voice, PROMPTS), speech.speak(voice, PROMPTS)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)
    assert 0.8 < len(first[0]) / SAMPLE_RATE < 3.0
    assert len(first[1]) < len(first[0])


def test_pitch_speed_and_voice_are_heard(espeak):
    text = "open the kitchen door"
    (plain,) = speech.speak("en-us", [speech.Prompt(text, 50, 150)])
    (slow,) = speech.speak("en-us", [speech.Prompt(text, 50, 100)])
    (high,) = speech.speak("en-us", [speech.Prompt(text, 80, 150)])
    (other,) = speech.speak("en-us+m3", [speech.Prompt(text, 50, 150)])
    assert len(slow) > 1.2 * len(plain)
    assert not np.array_equal(high, plain)
    assert not np.array_equal(other, plain)


def test_an_unknown_voice_is_an_error_that_names_it(espeak):
    with pytest.raises(RuntimeError, match=r"could not speak as xx-klingon: .*no such voice"):
        speech.speak("xx-klingon", PROMPTS)


def test_without_espeak_the_error_names_the_command(monkeypatch):
    monkeypatch.setattr(speech.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"pip install -e '\.\[demo\]'"):
        speech.speak("en", PROMPTS)
