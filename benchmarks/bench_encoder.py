"""How fast and in how much memory encoders train: ConMamba beside SpeechBrain's Conformer.

    python -m benchmarks.bench_encoder              speed and memory from 4 to 240 seconds
    python -m benchmarks.bench_encoder --check      exit status 1 if ConMamba is not fast enough
    python -m benchmarks.bench_encoder --device cuda --precision bf16 --batch_size 16
    python -m benchmarks.bench_encoder --kernels --device cuda --precision bf16 --seconds 4 16
                                                    what a step launches, and how long it takes

A step is forward, backward and AdamW on unpadded frames at 25 a second, with dropout.
The two encoders take turns, so that whatever else the machine does meets both.
"""

import argparse
import ctypes
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from datetime import date
from pathlib import Path
from statistics import median

import torch
from speechbrain.lobes.models.transformer.TransformerASR import (
    TransformerASR as SpeechBrainTransformerASR,
)
from torch import Tensor, nn

from benchmarks.report import check_device, command_line, machine_slug, origin, write_report
from benchmarks.timing import memory_bytes
from common.tables import markdown_table
from modules.TransformerASR import TransformerASR
from training.brains.cast_weights import CastWeights
from training.brains.graphs import CudaRecorder, GraphedEncoder

SAMPLE_RATE = 16000
FRAMES_PER_S = 25
D_MODEL = 144
VOCABULARY = 31
NETWORK = {
    "tgt_vocab": VOCABULARY,
    "d_model": D_MODEL,
    "nhead": 4,
    "num_encoder_layers": 12,
    "num_decoder_layers": 0,
    "d_ffn": 1024,
    "dropout": 0.1,
    "normalize_before": True,
    "attention_type": "RelPosMHAXL",
    "causal": False,
}
REQUIRED_RATIOS = {16: 1.25, 60: 2.0}
"""Seconds of audio per utterance, and how many times as fast ConMamba must train there."""


def conmamba(**changes) -> nn.Module:
    """Ours: 12 layers, d_model 144, d_ffn 1024, but for the ``changes``."""
    options = NETWORK | changes
    return TransformerASR(input_size=options["d_model"], encoder_module="conmamba", **options)


def conformer(**changes) -> nn.Module:
    """SpeechBrain's own Conformer of the same size."""
    options = NETWORK | changes
    return SpeechBrainTransformerASR(
        input_size=options["d_model"], encoder_module="conformer", **options
    )


def training_step(
    network: nn.Module, src: Tensor, precision: str, ours: bool = False, graphs: bool = False
) -> Callable[[], None]:
    """A function that trains ``network`` by one step on ``src`` in fp32 or bf16.

    Args:
        ours: as the recipes train on a GPU, which cast all weights at once.
        graphs: as they do with ``cuda_graphs``.
    """
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    half = precision == "bf16"
    casts: CastWeights | None = None
    if ours and graphs:
        dtype = torch.bfloat16 if half else torch.float32
        network.encoder.forward = GraphedEncoder(network.encoder, 1, CudaRecorder(), dtype)
    elif ours and half and src.is_cuda:
        casts = CastWeights([network], torch.bfloat16)

    def step() -> None:
        cast = nullcontext() if casts is None else casts.in_place()
        with torch.autocast(src.device.type, torch.bfloat16, enabled=half), cast:
            loss = network.encode(src).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_gib(run: Callable[[], object], device: str) -> float | None:
    """Memory that ``run`` takes at its peak beyond what was taken before.

    None where a CPU's memory cannot be told (outside Linux).
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        return None
    # What the allocator keeps from earlier runs would hide what this one takes.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    clear.write_text("5")
    before = memory_bytes()
    run()
    return (memory_bytes("VmHWM") - before) / 2**30


def limit_memory(gib: float) -> None:
    """Let an allocation beyond ``gib`` fail here, before the system ends some process."""
    if sys.platform == "linux":
        limit = int(gib * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def available_gib() -> float:
    """Memory that is free now; infinite where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return float("inf")
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) / 2**20


def measure(
    seconds: int, batch_size: int, repeats: int, device: str, precision: str, graphs: bool
) -> tuple[dict[str, float], dict[str, float | None]]:
    """Median step time and peak memory of both networks; a network that does not fit is absent."""
    torch.manual_seed(0)
    src = torch.randn(batch_size, seconds * FRAMES_PER_S, D_MODEL, device=device)
    steps = {
        "conmamba": training_step(conmamba().to(device), src, precision, True, graphs),
        "conformer": training_step(conformer().to(device), src, precision),
    }
    peaks: dict[str, float | None] = {}
    for name, step in steps.items():
        try:
            step()
            # The second step captures, where steps are captured.
            peaks[name] = peak_gib(step, device)
        except RuntimeError as error:
            if "memory" not in str(error):
                raise
    durations = defaultdict(list)
    for _ in range(repeats):
        for name in peaks:
            durations[name].append(_seconds(steps[name], device))
    return {name: median(times) for name, times in durations.items()}, peaks


def compare(args: argparse.Namespace) -> list[str]:
    """Print and write the table; returns what falls short."""
    rows, short = [], []
    for seconds in args.seconds:
        step_s, peaks = measure(
            seconds, args.batch_size, args.repeats, args.device, args.precision, args.cuda_graphs
        )
        audio_s = seconds * args.batch_size
        cells = [f"{audio_s / step_s[name]:.1f}" if name in step_s else "-" for name in step_s]
        memory = [_gib(peaks, name) for name in ("conmamba", "conformer")]
        if "conformer" in step_s:
            ratio = step_s["conformer"] / step_s["conmamba"]
            rows.append([seconds, *cells, f"{ratio:.2f}", *memory])
            if ratio < REQUIRED_RATIOS.get(seconds, 0.0):
                short.append(
                    f"{seconds} s: ConMamba trains {ratio:.2f} times as fast as the Conformer; "
                    f"wanted {REQUIRED_RATIOS[seconds]}"
                )
        else:
            rows.append([seconds, *cells, "does not fit", "-", *memory])
        sys.stdout.write(f"{rows[-1]}\n")
        sys.stdout.flush()
    header = [
        "seconds of audio",
        "ConMamba, s/s",
        "Conformer, s/s",
        "ratio",
        "ConMamba, GiB",
        "Conformer, GiB",
    ]
    text = (
        f"# Training speed of encoders\n\nForward, backward and AdamW; batch {args.batch_size}, "
        f"{args.precision}, {_where(args)}, no padding, 12 layers, d_model 144, d_ffn 1024, "
        f"medians of {args.repeats} steps in turns. s/s: seconds of audio trained on per second. "
        f"GiB: peak beyond parameters and their moments. The Conformer is SpeechBrain's own"
        f"{'; the ConMamba is captured as a CUDA graph' if args.cuda_graphs else ''}.\n\n"
        f"{markdown_table(header, rows)}\n\n{_origin(args.device)}"
    )
    kind = "encoder_graphs" if args.cuda_graphs else "encoder"
    write_report(f"{kind}_{_machine(args)}_{date.today().isoformat()}", text, args.report)
    return short


def _where(args: argparse.Namespace) -> str:
    if args.device == "cuda":
        return "on a GPU"
    return f"{args.threads} threads, at most {args.max_memory_gib:.0f} GiB"


def _machine(args: argparse.Namespace) -> str:
    precision = "" if args.precision == "fp32" else f"_{args.precision}"
    return machine_slug(args.device) + precision


def _gib(peaks: dict[str, float | None], name: str) -> str:
    if name not in peaks:
        return "beyond the limit"
    return "not measured" if peaks[name] is None else f"{peaks[name]:.2f}"


def kernels(args: argparse.Namespace) -> None:
    """Print and write which kernels a step of each encoder launches, the longest first.

    On a CPU they are torch's operators.
    """
    on_gpu = args.device == "cuda"
    activity = (
        torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    )
    parts = []
    for seconds in args.seconds:
        src = torch.randn(args.batch_size, seconds * FRAMES_PER_S, D_MODEL, device=args.device)
        for name, make in (("ConMamba", conmamba), ("Conformer", conformer)):
            network, ours = make().to(args.device), name == "ConMamba"
            step = training_step(network, src, args.precision, ours, args.cuda_graphs)
            for _ in range(3):
                step()
            wall_ms = 1e3 * median(_seconds(step, args.device) for _ in range(args.repeats))
            with torch.profiler.profile(activities=[activity]) as profiler:
                step()
                if on_gpu:
                    torch.cuda.synchronize()
            rows = []
            for event in profiler.key_averages():
                us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
                if us > 0 and (not on_gpu or event.device_type == torch.profiler.DeviceType.CUDA):
                    rows.append([event.key[:70], event.count, us / 1e3])
            rows.sort(key=lambda row: -row[2])
            busy_ms, launches = sum(row[2] for row in rows), sum(row[1] for row in rows)
            title = (
                f"{name}, {args.batch_size} x {seconds} s: {wall_ms:.1f} ms a step, "
                f"{launches} kernels in {busy_ms:.1f} ms"
            )
            sys.stdout.write(f"{title}\n")
            shown = [[key, count, f"{ms:.2f}"] for key, count, ms in rows[:18]]
            parts.append(f"## {title}\n\n{markdown_table(['kernel', 'calls', 'ms'], shown)}")
    text = "\n\n".join(["# Kernels of a training step", *parts, _origin(args.device)])
    write_report(f"kernels_{_machine(args)}_{date.today().isoformat()}", text, args.report)


def _seconds(run: Callable[[], None], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _origin(device: str) -> str:
    return origin(command_line("bench_encoder"), ["torch", "speechbrain"], device)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, default = parser.add_argument, "default: %(default)s"
    lengths = [4, 8, 16, 30, 60, 120, 240]
    add("--seconds", type=int, nargs="+", default=lengths, help=f"lengths of audio; {default}")
    add("--batch_size", type=int, default=4, help=f"utterances of a batch; {default}")
    add("--repeats", type=int, default=5, help=f"times are medians of so many steps; {default}")
    add("--threads", type=int, default=2, help=f"of the CPU; {default}")
    add(
        "--max_memory_gib",
        type=float,
        default=0.8 * available_gib(),
        help="what needs more is left out; default: 80 %% of what is free (%(default).1f)",
    )
    add("--device", choices=["cpu", "cuda"], default="cpu", help=default)
    add("--precision", choices=["fp32", "bf16"], default="fp32", help=default)
    parser.add_argument("--cuda_graphs", action="store_true", help="for ConMamba, as the key does")
    parser.add_argument(
        "--check", action="store_true", help="measure 16 and 60 s only; 1 on failure"
    )
    parser.add_argument("--report", action="store_true", help="write to benchmarks/reports")
    parser.add_argument("--kernels", action="store_true", help="list what a step launches instead")
    args = parser.parse_args()
    check_device(parser, args.device)
    torch.set_num_threads(args.threads)
    if args.device == "cpu":
        # A GPU's driver reserves more than that.
        limit_memory(args.max_memory_gib)
    if args.kernels:
        kernels(args)
        return
    if args.check:
        args.seconds = sorted(REQUIRED_RATIOS)
    short = compare(args)
    if args.check and short:
        sys.exit("\n".join(["Too slow:", *short]))


if __name__ == "__main__":
    main()
