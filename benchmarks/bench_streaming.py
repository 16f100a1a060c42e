"""What streaming costs: conmamba_small in chunks, one stream and many.

    python -m benchmarks.bench_streaming --check
    python -m benchmarks.bench_streaming --report

The network is that of hparams/CTC/conmamba_small_streaming.yaml with weights at random, the search
greedy, the audio noise at 16 kHz. Chunks overlap by the file's stream_lookahead, so that each is
paid for by the audio of its beginning alone. Times are CPU time of all threads, medians over
chunks, from the samples to the text; the real-time factor is that time over that audio's. Streams
that two threads keep in real time are those of two recognisers of one thread each, by the CPU time
of a batch.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.random_model import make_run
from benchmarks.report import add_options, command_line, machine_slug, origin, write_report
from benchmarks.targets import Target, verdict
from benchmarks.timing import memory_bytes
from common.tables import markdown_table
from inference import StreamingRecognizer
from inference.bundle import read_run
from inference.chunks import chunks_of
from inference.model import Model

BATCH = 16


def random_model() -> Model:
    """conmamba_small for streaming, never trained."""
    with tempfile.TemporaryDirectory() as folder:
        return read_run(make_run(Path(folder) / "run", "CTC/conmamba_small_streaming"))


def noise(samples: int) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, samples).astype(np.float32)


def step_ms(model: Model, chunk_ms: float) -> float:
    """Milliseconds of audio from one chunk to the next."""
    return 1000 * model.frame_s * chunks_of(model, chunk_ms).step


def chunk_times_ms(model: Model, chunk_ms: float, num_streams: int, rounds: int) -> list[float]:
    """CPU time of each chunk of so many streams in one batch."""
    asr = StreamingRecognizer(
        model, device="cpu", chunk_ms=chunk_ms, max_batch=num_streams, search={"search": "greedy"}
    )
    streams = [asr.open() for _ in range(num_streams)]
    for stream in streams:
        asr.accept(stream, noise(round(chunk_ms * 16)))
    chunk_S = noise(round(step_ms(model, chunk_ms) * 16))
    times_ms = []
    for _ in range(rounds + 5):
        started = time.process_time()
        for stream in streams:
            asr.accept(stream, chunk_S)
        asr.step()
        times_ms.append((time.process_time() - started) * 1e3)
    for stream in streams:
        asr.finish(stream)
    return times_ms[5:]


def offline_real_time_factor(model: Model) -> float:
    """Of the pass over a whole recording of 16 s in chunks of 640 ms."""
    asr = StreamingRecognizer(model, device="cpu", search={"search": "greedy"})
    seconds, times_s = 16, []
    wav_S = noise(seconds * 16000)
    for _ in range(5):
        started = time.process_time()
        asr.transcribe(wav_S, chunk_ms=640, search="greedy")
        times_s.append(time.process_time() - started)
    return statistics.median(times_s) / seconds


def memory_per_stream_mib(model: Model) -> float:
    """What each of many further streams adds, its share of a batch included."""
    asr = StreamingRecognizer(model, device="cpu", max_batch=BATCH, search={"search": "greedy"})
    chunk_S, before, further = noise(10_240), 0, 63
    for count in (1, further):
        streams = [asr.open() for _ in range(count)]
        for _ in range(4):
            for stream in streams:
                asr.accept(stream, chunk_S)
            while asr.step():
                pass
        if count == 1:
            before = memory_bytes()
    return (memory_bytes() - before) / 2**20 / further


def longest_wait_chunks(model: Model) -> float:
    """The longest audio, in chunks, that must follow a sample until all up to it is encoded."""
    asr = StreamingRecognizer(model, device="cpu")
    chunk = 640 * 16
    return max(asr.samples_needed(samples) for samples in range(1, 3 * chunk)) / chunk


def measure(rounds: int) -> tuple[list[Target], list[list[str]]]:
    """The targets, and further figures."""
    model = random_model()
    torch.set_num_threads(1)
    memory = memory_per_stream_mib(model)
    one = chunk_times_ms(model, 640, 1, rounds)
    short = chunk_times_ms(model, 160, 1, rounds)
    many = chunk_times_ms(model, 640, BATCH, max(rounds // 10, 5))
    many_short = chunk_times_ms(model, 160, BATCH, max(rounds // 10, 5))
    offline = offline_real_time_factor(model)
    median, short_median = statistics.median(one), statistics.median(short)
    p99 = statistics.quantiles(one, n=100)[98] / median
    batch_ms = statistics.median(many)
    gain = BATCH * median / batch_ms
    short_gain = BATCH * short_median / statistics.median(many_short)
    audio_ms, short_audio_ms = step_ms(model, 640), step_ms(model, 160)
    streams = 2 * BATCH * audio_ms / batch_ms
    targets = [
        Target(
            "640 ms, one thread, one stream: real-time factor", median / audio_ms, 0.04, False, ""
        ),
        Target("a chunk's time: p99 over median", p99, 3, False, ""),
        Target(
            "160 ms, one thread, one stream: real-time factor",
            short_median / short_audio_ms,
            0.12,
            False,
            "",
        ),
        Target(f"640 ms, {BATCH} streams in a batch: throughput of one", gain, 3, True, " times"),
        Target(
            f"160 ms, {BATCH} streams in a batch: throughput of one", short_gain, 3, True, " times"
        ),
        Target("streams of two threads at 640 ms", streams, 40, True, ""),
        Target("memory per further stream", memory, 2, False, " MiB"),
        Target("audio waited for", longest_wait_chunks(model), 1, False, " chunks"),
    ]
    return targets, [["the same audio offline: real-time factor", f"{offline:.3g}", "", ""]]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_streaming",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser)
    parser.add_argument("--rounds", type=int, default=200, help="chunks (default: %(default)s)")
    arguments = parser.parse_args(argv)
    targets, others = measure(arguments.rounds)
    rows = [target.row() for target in targets]
    table = markdown_table(
        ["", "measured", "target", "met"], list(itertools.chain(rows[:1], others, rows[1:]))
    )
    if arguments.report:
        source = origin(command_line("bench_streaming", argv), ["torch", "numpy"])
        text = f"# Streaming\n\n{__doc__}\n{table}\n\n{source}"
        write_report(f"streaming_{machine_slug()}", text)
    else:
        print(table)
    return verdict(targets, arguments.check)


if __name__ == "__main__":
    sys.exit(main())
