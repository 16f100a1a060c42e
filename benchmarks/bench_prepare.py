"""How many files a second the preparation reads, beside other ways to do it.

    python -m benchmarks.bench_prepare --num_files 20000

Ours lists, reads, checks and writes manifests; the others only read headers. SpeechBrain's own
preparer is not in its pip package: ``--speechbrain_preparer`` takes the file
``recipes/LibriSpeech/librispeech_prepare.py`` of a checkout, which is then run whole beside ours.
The files are in the page cache for everybody.
"""

import argparse
import importlib.util
import io
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import soundfile
from speechbrain.dataio.dataio import read_audio_info
from speechbrain.utils.parallel import parallel_map
from tqdm import tqdm

from benchmarks.report import add_options, command_line, origin, write_report
from common.tables import markdown_table
from librispeech_prepare import prepare_librispeech

_SPLIT = "train-clean-100"
_FILES_PER_CHAPTER = 50
_CHAPTERS_PER_SPEAKER = 4
GOAL_FILES_PER_S = 5000
"""Of each core."""


def make_files(root: Path, num_files: int) -> list[str]:
    """LibriSpeech layout with equal one-second files; returns the paths."""
    noise = np.random.default_rng(0).uniform(-0.1, 0.1, 16000)
    buffer = io.BytesIO()
    soundfile.write(buffer, noise, 16000, format="FLAC", subtype="PCM_16")
    paths = []
    for first in tqdm(range(0, num_files, _FILES_PER_CHAPTER), desc="generating", leave=False):
        chapter_number = first // _FILES_PER_CHAPTER
        speaker, chapter = divmod(chapter_number, _CHAPTERS_PER_SPEAKER)
        folder = root / _SPLIT / str(speaker) / str(chapter)
        folder.mkdir(parents=True)
        count = min(_FILES_PER_CHAPTER, num_files - first)
        ids = [f"{speaker}-{chapter}-{number:04d}" for number in range(count)]
        for utterance_id in ids:
            path = folder / f"{utterance_id}.flac"
            path.write_bytes(buffer.getvalue())
            paths.append(str(path))
        text = "".join(f"{utterance_id} SEVERAL WORDS ARE SAID HERE\n" for utterance_id in ids)
        (folder / f"{speaker}-{chapter}.trans.txt").write_text(text, encoding="utf-8")
    return paths


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the clock, and of processor time, that of finished child processes included."""
    wall_s, cpu_s = time.perf_counter(), sum(os.times()[:4])
    run()
    return time.perf_counter() - wall_s, sum(os.times()[:4]) - cpu_s


def load_preparer(path: str) -> Callable[..., None]:
    """``prepare_librispeech`` of another preparer's file."""
    spec = importlib.util.spec_from_file_location("other_preparer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.prepare_librispeech


def candidates(
    root: Path, scratch: Path, paths: Sequence[str], speechbrain_preparer: str | None
) -> dict[str, Callable[[], object]]:
    """What is measured, by name; each call works from nothing unless its name says otherwise."""

    def ours(**options: object) -> Callable[[], None]:
        def run() -> None:
            shutil.rmtree(scratch / "ours", ignore_errors=True)
            again(**options)

        return run

    def again(**options: object) -> None:
        prepare_librispeech(root, scratch / "ours", [_SPLIT], noprogressbar=True, **options)

    def plain() -> None:
        for path in paths:
            soundfile.info(path)

    def speechbrains_reader() -> None:
        for _ in parallel_map(read_audio_info, paths, chunk_size=8192, progress_bar=False):
            pass

    runs: dict[str, Callable[[], object]] = {
        "ours, one thread": ours(num_workers=1),
        "ours": ours(),
        "ours, again (nothing to do)": again,
        "soundfile.info in a loop (headers only)": plain,
        "SpeechBrain's reader, parallel (headers only)": speechbrains_reader,
    }
    if speechbrain_preparer:
        theirs = load_preparer(speechbrain_preparer)

        def speechbrains_preparer() -> None:
            shutil.rmtree(scratch / "theirs", ignore_errors=True)
            theirs(str(root), str(scratch / "theirs"), [_SPLIT])

        runs["SpeechBrain's preparer"] = speechbrains_preparer
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description="Files per second of the preparation.")
    parser.add_argument(
        "--num_files", type=int, default=20000, help="of the corpus; default: %(default)s"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="how often each is timed; default: %(default)s"
    )
    parser.add_argument("--speechbrain_preparer", help="its librispeech_prepare.py in a checkout")
    add_options(parser)
    options = parser.parse_args()
    logging.disable(logging.WARNING)

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "LibriSpeech"
        paths = make_files(root, options.num_files)
        runs = candidates(root, Path(folder), paths, options.speechbrain_preparer)
        # Rounds, not repetitions: whatever else the machine does then meets all of them alike.
        times = [[timed(run) for run in runs.values()] for _ in range(options.rounds)]
    rows, rates = [], {}
    for name, measured in zip(runs, zip(*times, strict=True), strict=True):
        wall_s, cpu_s = (min(seconds) for seconds in zip(*measured, strict=True))
        rates[name] = options.num_files / cpu_s
        row = [name, f"{wall_s:.2f}", f"{cpu_s:.2f}"]
        rows.append([*row, f"{options.num_files / wall_s:,.0f}", f"{rates[name]:,.0f}"])
    header = ["", "wall s", "CPU s", "files/s", "files per CPU s"]
    write_report(
        "prepare",
        "\n\n".join(
            [
                f"# Preparing {options.num_files:,} files",
                origin(command_line("bench_prepare"), ["soundfile", "speechbrain"]),
                markdown_table(header, rows),
                f"Best of {options.rounds} rounds. Goal: {GOAL_FILES_PER_S:,} files a second per"
                " core. LibriSpeech has 292,367 files.",
            ]
        ),
        options.report,
    )
    if options.check and rates["ours"] < GOAL_FILES_PER_S:
        print(f"ours: {rates['ours']:,.0f} files per CPU second", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
