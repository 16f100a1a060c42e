"""A corpus in LibriSpeech layout made of tones: each letter has its own pitch."""

from pathlib import Path

import numpy as np
import soundfile

SAMPLE_RATE = 16000
WORDS = ["ONE", "TWO", "THREE", "FOUR", "FIVE", "SIX", "SEVEN", "EIGHT", "NINE", "ZERO"]
SPLITS = {"train-clean-100": 10, "dev-clean": 3, "test-clean": 3, "test-other": 2}


def tone_of(letter: str, rng: np.random.Generator) -> np.ndarray:
    """0.1 s of the letter's pitch; a pause for a space."""
    t = np.arange(int(0.1 * SAMPLE_RATE)) / SAMPLE_RATE
    pitch_hz = 0.0 if letter == " " else 200.0 * 1.1 ** (ord(letter) - ord("A"))
    return 0.3 * np.sin(2 * np.pi * pitch_hz * t) + 0.01 * rng.standard_normal(t.size)


def make_corpus(folder: Path, splits: dict[str, int] = SPLITS, num_words: int = 2) -> Path:
    """Write ``folder/<split>/<speaker>/<chapter>/...``; returns ``folder``."""
    rng = np.random.default_rng(1)
    for speaker, (split, utterances) in enumerate(splits.items(), start=101):
        chapter = folder / split / str(speaker) / "1"
        chapter.mkdir(parents=True)
        lines = []
        for number in range(utterances):
            text = " ".join(rng.choice(WORDS, num_words + number % 3))
            audio = np.concatenate([tone_of(letter, rng) for letter in text])
            name = f"{speaker}-1-{number:04d}"
            soundfile.write(chapter / f"{name}.flac", audio, SAMPLE_RATE)
            lines.append(f"{name} {text}\n")
        (chapter / f"{speaker}-1.trans.txt").write_text("".join(lines), encoding="utf-8")
    return folder
