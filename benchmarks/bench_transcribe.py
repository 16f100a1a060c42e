"""How fast and in how much memory recordings become text, held against targets.

    python -m benchmarks.bench_transcribe --check --report
    python -m benchmarks.bench_transcribe MODEL --audio recordings --report
    python -m benchmarks.bench_transcribe --parts speed lengths

Without MODEL it is conmamba_small (CTC) with random weights; without --audio, noise in the rhythm
of speech. The searches are then timed on log probabilities that look like a trained model's. Times
are CPU time of one thread, medians of rounds in which all take turns; ``many`` is timed by the
clock, on two threads. All parts take seven minutes on two idle cores.
"""

import argparse
import itertools
import logging
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from benchmarks.bench_ctc_search import FRAMES, cpu_medians_ms, generated_outputs, searches
from benchmarks.bench_encoder import conformer, limit_memory, peak_gib
from benchmarks.ctc_outputs import CHARACTERS
from benchmarks.random_model import make_run
from benchmarks.report import add_options, command_line, origin, write_report
from benchmarks.targets import Target, table, verdict
from benchmarks.timing import memory_bytes
from common.tables import format_duration, markdown_table
from corpora.audio import AUDIO_SUFFIXES
from inference import Recognizer
from inference.bundle import write_bundle

REPOSITORY = Path(__file__).resolve().parent.parent
UTTERANCE_S = 16.0
LENGTHS_S = (10, 60, 600, 3600)
NUM_MIXED = 200
D_MODEL = 144
STEREO_RATE = 44100
SEARCH = ("beam 16", (16, -12.0, -1.2, False))
"""Name; beam size, thresholds of beams and tokens in nats, whether history is pruned."""


@dataclass
class Bench:
    """What the parts measure with.

    Attributes:
        model: folder of a bundle or a run.
        audio: recordings of speech; may be empty.
        folder: for files.
        rounds: how often each is timed.
        memory_gib: what the Conformer may take.
        long_s: of the long file, seconds.
    """

    model: str
    audio: list[Path]
    folder: Path
    rounds: int
    memory_gib: float
    long_s: float


@dataclass
class Part:
    """What a part found: a table, and what of it has a target."""

    title: str
    header: list[str]
    rows: list[list[Any]]
    targets: list[Target]


def speech_like(duration_s: float, rate: int, seed: int = 0) -> np.ndarray:
    """Noise (S,) in bursts of syllables, with a pause of half a second after some of them."""
    rng = np.random.default_rng(seed)
    num_samples = round(duration_s * rate)
    loudness: list[np.ndarray] = []
    while sum(map(len, loudness)) < num_samples:
        syllables = rng.integers(4, 20)
        time_s = np.arange(round(0.25 * syllables * rate)) / rate
        loudness.append(np.square(np.sin(np.pi * time_s / 0.25)))
        loudness.append(np.zeros(rate // 2))
    wav_S = rng.standard_normal(num_samples) * (0.1 * np.concatenate(loudness)[:num_samples] + 1e-3)
    return wav_S.astype(np.float32)


def utterance(bench: Bench, rate: int, duration_s: float, seed: int = 0) -> np.ndarray:
    """Speech of so many seconds, put together from recordings where there are some."""
    if not bench.audio:
        return speech_like(duration_s, rate, seed)
    found: list[np.ndarray] = []
    for path in itertools.islice(itertools.cycle(bench.audio), seed % len(bench.audio), None):
        if sum(map(len, found)) >= duration_s * rate:
            break
        wav_S, file_rate = soundfile.read(path, dtype="float32")
        if file_rate != rate or wav_S.ndim > 1:
            raise SystemExit(f"{path}: --audio must be mono recordings at {rate} Hz.")
        found.append(wav_S)
    return np.concatenate(found)[: round(duration_s * rate)]


def speed(bench: Bench) -> Part:
    """From a file to text, and what the searches take of it."""
    torch.set_num_threads(1)
    asr = {p: Recognizer.from_pretrained(bench.model, precision=p) for p in ("fp32", "bf16")}
    rate = asr["fp32"].sample_rate
    path = bench.folder / "utterance.flac"
    wav_S = utterance(bench, rate, UTTERANCE_S)
    soundfile.write(path, wav_S, rate)
    vocabulary, log_probs_TV = CHARACTERS, generated_outputs()[:FRAMES]
    if bench.audio:
        vocabulary = asr["fp32"]._search.vocabulary
        log_probs_TV = asr["fp32"].encode([wav_S])[1][0].numpy()[:, : len(vocabulary)]
    ours, theirs = searches(np.ascontiguousarray(log_probs_TV), vocabulary, SEARCH[1], None)
    calls: dict[str, Callable[[], object]] = {
        "file to text, greedy, fp32": lambda: asr["fp32"].transcribe(path, search="greedy"),
        "file to text, greedy, bf16": lambda: asr["bf16"].transcribe(path, search="greedy"),
        "encoder, fp32": lambda: asr["fp32"].encode([wav_S]),
        f"CTC search, {SEARCH[0]}": ours,
        f"SpeechBrain's CTCBeamSearcher, {SEARCH[0]}": theirs,
    }
    for call in calls.values():
        call()
    ms = dict(zip(calls, cpu_medians_ms(list(calls.values()), bench.rounds), strict=True))
    rows = [
        [name, f"{value:.1f}", f"{value / 1e3 / UTTERANCE_S:.4f}"] for name, value in ms.items()
    ]
    text_ms, _, encoder_ms, ours_ms, theirs_ms = ms.values()
    return Part(
        "16 s, batch 1, one thread",
        ["", "CPU ms", "of the audio's duration"],
        rows,
        [
            Target("16 s from file to text", text_ms / 1e3 / UTTERANCE_S, 0.02, False, " of it"),
            Target("search against the encoder", ours_ms / encoder_ms, 0.4, False, " times"),
            Target("search, times as fast as SpeechBrain's", theirs_ms / ours_ms, 10, True, ""),
        ],
    )


def lengths(bench: Bench) -> Part:
    """Encoding recordings of all lengths in one go."""
    torch.set_num_threads(1)
    asr = Recognizer.from_pretrained(bench.model)
    rows, per_s = [], []
    for seconds in LENGTHS_S:
        wav_S = speech_like(seconds, asr.sample_rate)
        rounds = min(bench.rounds, max(1, 1800 // seconds))
        (ms,) = cpu_medians_ms([lambda wav_S=wav_S: asr.encode([wav_S])], rounds)
        conformer_ms = in_child(_conformer_ms, seconds, bench.memory_gib)
        per_s.append(ms / seconds)
        told = "beyond the memory" if conformer_ms is None else f"{conformer_ms / seconds:.2f}"
        rows.append([f"{seconds} s", f"{per_s[-1]:.2f}", told])
    growth = max(per_s) / per_s[0]
    return Part(
        "Encoding in one go: CPU ms per second of audio, one thread",
        ["", "from the waveform", "SpeechBrain's Conformer, from frames"],
        rows,
        [Target("encoding, 10 s to 60 min, per second", growth, 1.15, False, " times")],
    )


def _conformer_ms(seconds: int, memory_gib: float) -> float | None:
    """SpeechBrain's Conformer of conmamba_small's size; None where it does not fit."""
    torch.set_num_threads(1)
    limit_memory(memory_gib)
    network = conformer().eval()
    src_BTD = torch.randn(1, 25 * seconds, D_MODEL)
    try:
        with torch.inference_mode():
            return cpu_medians_ms([lambda: network.encode(src_BTD)], 3 if seconds <= 60 else 1)[0]
    except (RuntimeError, MemoryError):
        return None


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def memory(bench: Bench) -> Part:
    """Peak memory of a long file beyond the loaded model, cut in pauses and as a whole."""
    path = bench.folder / "long.wav"
    minute_SC = np.repeat(speech_like(60, STEREO_RATE)[:, None], 2, axis=1)
    with soundfile.SoundFile(path, "w", STEREO_RATE, 2, "PCM_16") as file:
        for start_s in range(0, round(bench.long_s), 60):
            file.write(minute_SC[: round((bench.long_s - start_s) * STEREO_RATE)])
    rows, targets = [], []
    for name, whole in (("cut in pauses", False), ("as a whole", True)):
        gib, cpu_s, model_gib = in_child(_long_file, bench.model, str(path), whole)
        rows.append([name, f"{gib:.2f}", f"{cpu_s / bench.long_s:.4f}", f"{model_gib:.2f}"])
        targets.append(Target(f"{bench.long_s / 3600:g} h {name}", gib, 1.5, False, " GiB"))
    return Part(
        f"A stereo file of {bench.long_s / 3600:g} h at 44.1 kHz, one thread",
        ["", "peak GiB beyond the loaded model", "of the audio's duration", "before, GiB"],
        rows,
        targets,
    )


def _long_file(model: str, path: str, whole: bool) -> tuple[float, float, float]:
    """Peak memory in GiB, seconds of CPU time, and the memory of the loaded model in GiB."""
    torch.set_num_threads(1)
    asr = Recognizer.from_pretrained(model)
    asr.transcribe(speech_like(10, asr.sample_rate), search="greedy")
    model_gib = memory_bytes() / 2**30
    started = time.process_time()
    gib = peak_gib(lambda: asr.transcribe(path, whole=whole, search="greedy"), "cpu")
    if gib is None:
        raise SystemExit("memory: this system does not tell how much memory a process takes.")
    return gib, time.process_time() - started, model_gib


def startup(bench: Bench) -> Part:
    """From the command to the text of a file of 10 s, against the import of SpeechBrain."""
    path = bench.folder / "10s.wav"
    soundfile.write(path, speech_like(10, 16000), 16000)
    commands = {
        "`import speechbrain`": [sys.executable, "-c", "import speechbrain"],
        "`python transcribe.py`": [
            *(sys.executable, "transcribe.py", bench.model, str(path)),
            *("--device", "cpu", "--threads", "1", "--noprogressbar"),
        ],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    # The first round fills the system's cache of files.
    for round_ in range(1 + min(bench.rounds, 7)):
        for name, command in commands.items():
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            if round_:
                user_s, system_s = (
                    after.ru_utime - before.ru_utime,
                    after.ru_stime - before.ru_stime,
                )
                times[name].append(user_s + system_s)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    imports_s, command_s = seconds.values()
    return Part(
        "Start-up: a file of 10 s, whole processes",
        ["", "CPU s"],
        [[name, f"{value:.2f}"] for name, value in seconds.items()],
        [
            Target(
                "transcribe.py beyond import speechbrain", command_s - imports_s, 1.5, False, " s"
            )
        ],
    )


def many(bench: Bench) -> Part:
    """Many recordings in batches against one by one, on two threads."""
    torch.set_num_threads(2)
    asr = Recognizer.from_pretrained(bench.model)
    rng = np.random.default_rng(0)
    paths = []
    for i, seconds in enumerate(rng.uniform(1, 16, NUM_MIXED)):
        paths.append(bench.folder / f"mixed{i}.flac")
        soundfile.write(paths[-1], utterance(bench, asr.sample_rate, seconds, i), asr.sample_rate)
    calls = {
        "one by one": lambda: [asr.transcribe(path, search="greedy") for path in paths],
        "`transcribe_many`": lambda: list(asr.transcribe_many(paths, search="greedy")),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(min(bench.rounds, 3)):
        for name, call in calls.items():
            clock_s, cpu_s = time.perf_counter(), time.process_time()
            call()
            times[name].append((time.perf_counter() - clock_s, time.process_time() - cpu_s))
    medians = {name: np.median(values, axis=0) for name, values in times.items()}
    single, batched = (clock_s for clock_s, _ in medians.values())
    return Part(
        f"{NUM_MIXED} recordings of 1 to 16 s, greedy, two threads",
        ["", "seconds by the clock", "CPU s"],
        [[name, f"{clock_s:.2f}", f"{cpu_s:.2f}"] for name, (clock_s, cpu_s) in medians.items()],
        [Target("transcribe_many, times as fast", single / batched, 1.5, True, "")],
    )


PARTS: dict[str, tuple[Callable[[Bench], Part], float]] = {
    "speed": (speed, 10),
    "lengths": (lengths, 100),
    "memory": (memory, 170),
    "startup": (startup, 45),
    "many": (many, 70),
}
"""What measures, and the seconds that it takes about, on two cores that are otherwise idle."""


def measured(bench: Bench, names: Sequence[str]) -> list[Part]:
    """Measures; says on stderr what it is at, what it has found, and what is still to come."""
    parts, started = [], time.perf_counter()
    planned_s, all_s = 0.0, sum(PARTS[name][1] for name in names)
    for number, name in enumerate(names, start=1):
        measure, part_s = PARTS[name]
        # Later parts will be as much slower, or faster, as those before were.
        pace = (time.perf_counter() - started) / planned_s if planned_s else 1.0
        left = format_duration(pace * (all_s - planned_s))
        print(f"part {number} of {len(names)}, {name}; about {left} left", file=sys.stderr)
        parts.append(measure(bench))
        for row in parts[-1].rows:
            _tell(name, row)
        planned_s += part_s
    print(f"took {format_duration(time.perf_counter() - started)}", file=sys.stderr)
    return parts


def _tell(part: str, row: Sequence[Any]) -> None:
    print(f"{part}: {', '.join(map(str, row))}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="folder of a bundle or of a run (CTC)")
    add("--audio", type=Path, metavar="FOLDER", help="recordings of speech")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    add_options(parser)
    add("--rounds", type=int, default=9, help="how often each is timed")
    add("--hours", type=float, default=2.0, help="of the long file")
    add("--max_memory_gib", type=float, default=8.0, help="for SpeechBrain's Conformer")
    arguments = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    audio: list[Path] = []
    if arguments.audio:
        found = sorted(arguments.audio.rglob("*"))
        audio = [path for path in found if path.suffix.lower() in AUDIO_SUFFIXES]
        if not audio:
            parser.error(f"--audio: there are no recordings in {arguments.audio}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = arguments.model
        if model is None:
            run = make_run(folder / "run", "CTC/conmamba_small")
            model = str(write_bundle(run, folder / "bundle"))
        long_s = 3600 * arguments.hours
        bench = Bench(model, audio, folder, arguments.rounds, arguments.max_memory_gib, long_s)
        parts = measured(bench, arguments.parts)
    targets = [target for part in parts for target in part.targets]
    if arguments.report:
        described = arguments.model or "conmamba_small (CTC), random weights"
        sections = [
            f"## {part.title}\n\n{markdown_table(part.header, part.rows)}" for part in parts
        ]
        packages = ["torch", "speechbrain", "numpy", "soxr", "soundfile"]
        some = [] if set(arguments.parts) == set(PARTS) else arguments.parts
        write_report(
            "_".join(["transcribe", *some]),
            "\n\n".join(
                [
                    "# From recordings to text",
                    origin(command_line("bench_transcribe", argv), packages),
                    f"Model: {described}. Medians; the Conformer is SpeechBrain's own, of the same "
                    f"size, its network alone, in at most {arguments.max_memory_gib:g} GiB.",
                    *sections,
                    f"## Targets\n\n{table(targets)}",
                ]
            ),
        )
    else:
        print(table(targets))
    return verdict(targets, arguments.check)


if __name__ == "__main__":
    sys.exit(main())
