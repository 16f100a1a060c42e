"""A small synthetic corpus in LibriSpeech's layout, for trying the recipes without a download.

    python -m tools.make_demo_corpus --folder data/demo

52 espeak-ng voices, each in one split only, say sentences of a small grammar; ``test-other`` is
spoken in echoing rooms with noise. The same options give the same bytes on one platform.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from tqdm import tqdm

from common.errors import in_words
from common.files import atomic_folder, atomic_write
from corpora.librispeech import SAMPLE_RATE, list_split
from corpora.synthetic import room, speech
from corpora.synthetic.sentences import SentenceMaker
from corpora.synthetic.voices import SPLITS, Voice, voices_of

RECORD_NAME = "demo_corpus.json"
# Raise it when the same options come to give another corpus.
_FORMAT = 2

TRAIN_SPLIT = "train-clean-100"
SIZES = {
    "demo": {"num_utterances": 1200, "num_eval_utterances": 100, "max_voices": 40},
    "tiny": {"num_utterances": 12, "num_eval_utterances": 4, "max_voices": 4},
}


def make_demo_corpus(
    folder: str | Path,
    size: str = "demo",
    num_utterances: int | None = None,
    num_eval_utterances: int | None = None,
    seed: int = 1234,
    num_workers: int | None = None,
    noprogressbar: bool = False,
) -> Path:
    """Make the corpus, unless it is there already with the same options.

    Args:
        folder: gets the folder ``LibriSpeech`` with the splits ``train-clean-100``, ``dev-clean``,
            ``test-clean`` and ``test-other``.
        size: ``demo`` (about 55 minutes of training speech, 40 voices) or ``tiny`` (half a minute,
            4 voices).
        num_utterances: of ``train-clean-100``, instead of the size's; 2.8 seconds each on average.
        num_eval_utterances: of each of the other splits, instead of the size's.
        seed: decides sentences, prosody, rooms and noise; the voices are always the same.
        num_workers: voices that speak at a time; by default the number of cores.
        noprogressbar: no progress bar.

    Returns:
        The folder that holds the splits, a recipe's ``data_folder``.

    Raises:
        RuntimeError: espeak-ng is not installed; the message names the command.
        ValueError: an unknown size, a number below 1, or a ``LibriSpeech`` folder that this
            function did not make.
    """
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; known are {', '.join(SIZES)}")
    options = {**SIZES[size], "seed": seed, "format": _FORMAT}
    given = {"num_utterances": num_utterances, "num_eval_utterances": num_eval_utterances}
    for name, number in given.items():
        if number is not None:
            if number < 1:
                raise ValueError(f"{name} is {number}; every split needs an utterance")
            options[name] = number
    speech.require_espeak()

    folder = Path(folder)
    root = folder / "LibriSpeech"
    if _is_current(folder, root, options):
        return root
    if root.exists() and not (folder / RECORD_NAME).is_file():
        raise ValueError(
            f"{root} was not made by this tool and will not be overwritten: give another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_folder(root) as scratch:
        _make_splits(scratch, options, num_workers or os.cpu_count() or 1, noprogressbar)
        if root.exists():
            shutil.rmtree(root)
        # Written first: should the process die before the rename, the record names other contents
        # than there are, and the corpus is made again.
        _write_record(folder, scratch, options)
    return root


def _write_record(folder: Path, root: Path, options: dict[str, Any]) -> None:
    with atomic_write(folder / RECORD_NAME) as stream:
        json.dump({"options": options, "contents": _contents(root)}, stream, indent=1)
        stream.write("\n")


def _is_current(folder: Path, root: Path, options: dict[str, Any]) -> bool:
    try:
        record = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
        return record == {"options": options, "contents": _contents(root)}
    except (OSError, ValueError):
        return False


def _contents(root: Path) -> dict[str, str]:
    return {split: list_split(root, split).fingerprint for split in SPLITS}


def _make_splits(
    root: Path, options: dict[str, Any], num_workers: int, noprogressbar: bool
) -> None:
    maker = SentenceMaker(options["seed"])
    jobs: list[tuple[str, Voice, list[str]]] = []
    # The training split comes last: its size then leaves the sentences of the others alone.
    for split in sorted(SPLITS, key=lambda split: split == TRAIN_SPLIT):
        train = split == TRAIN_SPLIT
        count = options["num_utterances" if train else "num_eval_utterances"]
        voices = voices_of(split)[: min(options["max_voices"], count)]
        sentences: dict[Voice, list[str]] = {voice: [] for voice in voices}
        for number in range(count):
            sentences[voices[number % len(voices)]].append(next(maker))
        jobs += [(split, voice, texts) for voice, texts in sentences.items()]

    total = sum(len(texts) for _, _, texts in jobs)
    with (
        tqdm(desc="speaking", total=total, unit=" utterances", disable=noprogressbar) as bar,
        ThreadPoolExecutor(num_workers) as pool,
    ):
        pending = [pool.submit(_speak_chapter, root, *job, options["seed"]) for job in jobs]
        try:
            for job in as_completed(pending):
                bar.update(job.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    _write_speakers(root, [(split, voice) for split, voice, _ in jobs])


def _speak_chapter(root: Path, split: str, voice: Voice, texts: list[str], seed: int) -> int:
    generator = np.random.default_rng([seed, int(voice.speaker)])
    prompts = [
        speech.Prompt(
            text,
            voice.pitch + int(generator.integers(-10, 11)),
            voice.words_per_minute + int(generator.integers(-8, 9)),
        )
        for text in texts
    ]
    chapter = root / split / voice.speaker / "1"
    chapter.mkdir(parents=True)
    name = f"{voice.speaker}-1"
    lines = []
    for number, samples in enumerate(speech.speak(voice.name, prompts)):
        audio = _record(samples, voice.played_at_hz, split, generator)
        utterance_id = f"{name}-{number:04d}"
        soundfile.write(chapter / f"{utterance_id}.flac", audio, SAMPLE_RATE, subtype="PCM_16")
        lines.append(f"{utterance_id} {texts[number].upper()}\n")
    (chapter / f"{name}.trans.txt").write_text("".join(lines), encoding="utf-8")
    return len(texts)


def _record(
    samples: np.ndarray, rate: int, split: str, generator: np.random.Generator
) -> np.ndarray:
    """What a microphone makes of it: close and quiet, or far away in a noisy room."""
    audio = room.resample(samples, rate, SAMPLE_RATE)
    lead, trail = (round(generator.uniform(0.05, 0.25) * SAMPLE_RATE) for _ in range(2))
    audio = np.pad(audio, (lead, trail))
    slope = generator.uniform(0.0, 2.0)
    if split == "test-other":
        rt60_s = generator.uniform(0.15, 0.3)
        direct_db = generator.uniform(6.0, 12.0)
        audio = room.reverberate(audio, SAMPLE_RATE, rt60_s, direct_db, generator)
        audio = room.add_noise(audio, generator.uniform(18.0, 28.0), slope, generator)
    else:
        # Synthetic speech between perfect silences would teach a model to wait for those.
        audio = room.add_noise(audio, generator.uniform(28.0, 45.0), slope, generator)
    return room.set_level(audio, generator.uniform(-30.0, -20.0))


def _write_speakers(root: Path, speakers: Sequence[tuple[str, Voice]]) -> None:
    lines = ["; ID |SEX| SUBSET | VOICE\n"]
    for split, voice in sorted(speakers, key=lambda entry: entry[1].speaker):
        lines.append(f"{voice.speaker} | {voice.sex} | {split} | espeak-ng {voice.name}\n")
    (root / "SPEAKERS.TXT").write_text("".join(lines), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.make_demo_corpus",
        description="Make a small synthetic corpus in LibriSpeech's layout.",
    )
    add = parser.add_argument
    add("--folder", default="data/demo", help="gets LibriSpeech/ (default: %(default)s)")
    add("--size", choices=SIZES, default="demo", help="default: %(default)s")
    add("--num_utterances", type=int, help="training utterances, instead of the size's")
    add("--num_eval_utterances", type=int, help="utterances of each other split, likewise")
    add("--seed", type=int, default=1234, help="default: %(default)s")
    add("--num_workers", type=int, help="voices that speak at a time (default: one per core)")
    add("--noprogressbar", action="store_true", help="no progress bar")
    try:
        root = make_demo_corpus(**vars(parser.parse_args(arguments)))
    except (RuntimeError, ValueError, OSError) as error:
        print(f"{parser.prog}: error: {in_words(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
    print(f"data folder: {root}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
