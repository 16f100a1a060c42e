"""How fast the scan is, beside other ways to compute it and beside what the machine could do.

    python -m benchmarks.bench_scan --check --report

Every candidate runs in this process, in turn, in blocks of consecutive calls (as those of
torch.utils.benchmark's ``blocked_autorange``); times are medians over the blocks. ``--check`` exits
with 1 and names the targets that were missed. Where there is a GPU its table follows (``--device
cuda`` prints that alone).
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import importlib.util
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.report import (
    add_options,
    check_device,
    command_line,
    machine_slug,
    origin,
    write_report,
)
from benchmarks.scan_gpu import bench_cuda
from benchmarks.scans import (
    STATE,
    both_ways,
    make_inputs,
    make_inputs_of_both,
    parallel_scan,
    runner,
    scan,
    textbook_loop,
)
from benchmarks.targets import Target, table, verdict
from benchmarks.timing import (
    BLOCK_MS,
    blocks_ms,
    cold_ms,
    copy_bandwidth,
    medians_ms,
    memory_bytes,
    nothing,
    tell,
    timed_ms,
)
from common.tables import markdown_table
from ops import build

BATCH, DIM, TIME = 8, 512, 400
HOUR_FRAMES = 90_000


def machine_rates(threads: int) -> dict[str, float]:
    """Fused multiply-adds and exponentials a second that the kernels' vector code can reach."""
    library = build.Kernel(Path(__file__).with_name("rates.cpp")).load()
    results = (ctypes.c_float * threads)()
    parallel_for = ctypes.c_void_p(build.parallel_for_address())
    rates = {}
    for name in ("fused_multiply_adds", "exponentials"):
        rounds = 400_000
        count = threads * rounds * library.elements_per_round()
        best = 0.0
        for _ in range(7):
            start = time.perf_counter()
            getattr(library, name)(
                *(ctypes.c_int64(n) for n in (threads, rounds, threads)), parallel_for, results
            )
            best = max(best, count / (time.perf_counter() - start))
        rates[name] = best
    return rates


def extra_memory(frames: int, batch: int, backward: bool) -> int:
    """Bytes beyond inputs, outputs and gradients at the peak, measured in a fresh process."""
    what = "backward" if backward else "forward"
    return int(_in_fresh_process("--memory_of", str(frames), str(batch), what)[-1])


def _in_fresh_process(*arguments: str) -> list[str]:
    """What this program prints when called so, by words."""
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.bench_scan", *arguments],
        cwd=Path(__file__).resolve().parents[1],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()


def print_memory(frames: int, batch: int, backward: bool) -> None:
    """The peak of this process above what it held before the scan and keeps after it."""
    leaves = [x.requires_grad_(backward) for x in make_inputs(batch, DIM, frames)]
    grad_y = torch.randn_like(leaves[0])
    # Loads the kernel and starts the threads.
    runner(functools.partial(scan, "cpu"), make_inputs(2, DIM, 64), backward)()
    before = memory_bytes()
    y = scan("cpu", *leaves)
    kept = [y, *(torch.autograd.grad(y, leaves, grad_y) if backward else ())]
    results = sum(x.numel() * x.element_size() for x in kept)
    print(memory_bytes("VmHWM") - before - results)


def bench_cpu(rounds: int, slow_rounds: int) -> tuple[str, list[Target]]:
    """Tables for the CPU, and the targets they are held against."""
    threads = torch.get_num_threads()
    rates_before = machine_rates(threads)
    inputs = make_inputs(BATCH, DIM, TIME)
    candidates: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
        f"`{name}`": (functools.partial(scan, name), inputs)
        for name in ("cpu", "torch", "reference")
    }
    candidates["`cpu`, both directions"] = (
        functools.partial(both_ways, "cpu"),
        make_inputs_of_both(BATCH, DIM, TIME),
    )
    if importlib.util.find_spec("mambapy"):
        candidates["mamba.py's parallel scan"] = (parallel_scan, inputs)
    forward = medians_ms({n: runner(*c, False) for n, c in candidates.items()}, rounds, nothing)
    tell("forward", forward)
    forward["`cpu`, caches cold"] = cold_ms(runner(*candidates["`cpu`"], False), rounds)
    slow = {"`reference`": candidates.pop("`reference`")}
    both = medians_ms({n: runner(*c, True) for n, c in candidates.items()}, rounds, nothing)
    tell("forward + backward", both)
    if slow_rounds:
        textbook = {"textbook loop": (textbook_loop, inputs)}
        forward |= medians_ms({n: runner(*c, False) for n, c in textbook.items()}, 5, nothing)
        for name, candidate in (slow | textbook).items():
            call = runner(*candidate, True)
            both[name] = statistics.median(timed_ms(call) for _ in range(slow_rounds))

    pscan = "mamba.py's parallel scan"
    targets = [
        Target(
            "`cpu` forward, times as fast as `reference`",
            forward["`reference`"] / forward["`cpu`"],
            20,
            True,
            "x",
        )
    ]
    if pscan in both:
        targets += [
            Target(
                "`cpu` forward + backward, times as fast as mamba.py's parallel scan",
                both[pscan] / both["`cpu`"],
                30,
                True,
                "x",
            ),
            Target(
                "`torch` forward + backward, times as fast as mamba.py's parallel scan",
                both[pscan] / both["`torch`"],
                3,
                True,
                "x",
            ),
        ]
    for what, times in (("forward", forward), ("forward + backward", both)):
        targets.append(
            Target(
                f"bidirectional layer against one direction, {what}",
                times["`cpu`, both directions"] / times["`cpu`"],
                2.05,
                False,
                "x",
            )
        )
    targets += _memory_targets() + _hour_targets(rounds, threads)
    # Whoever else uses the machine makes it look slower: the better of two moments counts.
    rates = {name: max(rate, rates_before[name]) for name, rate in machine_rates(threads).items()}

    rows = []
    for name in forward:
        row = [f"{times[name]:.1f}" if name in times else "-" for times in (forward, both)]
        row += [
            f"{times[name] / times['`cpu`']:.1f}" if name in times else "-"
            for times in (forward, both)
        ]
        rows.append([name, *row])
    header = ["scan", "forward ms", "forward + backward ms", "forward / `cpu`", "both / `cpu`"]
    text = [
        f"Batch {BATCH}, dim {DIM}, {TIME} frames, state {STATE}, float32, softplus and gate "
        f"included, {threads} threads; medians of {rounds} blocks "
        f"of at least {BLOCK_MS} ms"
        + (f" (backward of the two loops: {slow_rounds} calls)" if slow_rounds else "")
        + ". Caches cold: single calls, each after other work.",
        markdown_table(header, rows),
        table(targets),
        _against_the_floor(forward["`cpu`"], both["`cpu`"], rates, threads),
    ]
    return "\n\n".join(text), targets


def _memory_targets() -> list[Target]:
    # Ten times the frames of the table: beside 65 MB the odd page of the process does not count.
    frames = 10 * TIME
    size = BATCH * DIM * frames * 4
    extra = statistics.median(extra_memory(frames, BATCH, backward=True) for _ in range(3))
    return [
        Target(
            "memory of `cpu` forward + backward beyond inputs, outputs and gradients",
            extra / size,
            1,
            False,
            " u",
        )
    ]


def print_hour(rounds: int) -> None:
    """Milliseconds of an hour, and how many times those of its four quarters."""
    inputs, length = make_inputs(1, DIM, HOUR_FRAMES), HOUR_FRAMES // 4
    quarters = [
        [x[..., first : first + length] if x.dim() == 3 else x for x in inputs]
        for first in range(0, HOUR_FRAMES, length)
    ]
    hour, *parts = (
        runner(functools.partial(scan, "cpu"), of_part, False) for of_part in (inputs, *quarters)
    )

    def one_by_one() -> None:
        for part in parts:
            part()

    times = blocks_ms({"hour": hour, "quarters": one_by_one}, rounds, nothing)
    # Of neighbours, which a busy spell of the machine slows alike.
    ratio = statistics.median(
        whole / in_parts for whole, in_parts in zip(*times.values(), strict=True)
    )
    print(statistics.median(times["hour"]), ratio)


def _hour_targets(rounds: int, threads: int) -> list[Target]:
    # Where others have freed memory before, it would serve the results of the quarters without
    # page faults and be too small for the hour's.
    hour_ms, ratio = map(
        float, _in_fresh_process("--hour", "--rounds", str(rounds), "--threads", str(threads))
    )
    extra = [
        statistics.median(extra_memory(frames, 1, backward=False) for _ in range(3))
        for frames in (HOUR_FRAMES // 4, HOUR_FRAMES)
    ]
    output = HOUR_FRAMES * DIM * 4
    return [
        Target(
            f"one hour of audio ({HOUR_FRAMES} frames, {hour_ms:.0f} ms) "
            "against its four quarters, forward",
            ratio,
            1.1,
            False,
            "x",
        ),
        Target(
            "memory of one hour beyond that of a quarter, inputs and outputs not counted, "
            "part of the output",
            (extra[1] - extra[0]) / output,
            0.02,
            False,
            "",
        ),
    ]


def _against_the_floor(
    forward_ms: float, both_ms: float, rates: dict[str, float], threads: int
) -> str:
    elements = BATCH * DIM * TIME * STATE
    # Per element: one exponential; forward x B, the state and the output, three multiply-adds.
    exp_ms = elements / rates["exponentials"] * 1e3
    fma_ms = 3 * elements / rates["fused_multiply_adds"] * 1e3
    bandwidth = copy_bandwidth("cpu", 1 << 24, nothing)
    # u, delta, z in, y out.
    memory_ms = 4 * BATCH * DIM * TIME * 4 / bandwidth * 1e3
    floor_ms = exp_ms + fma_ms + memory_ms
    return (
        f"Against the floor: this machine evaluates {rates['exponentials'] / 1e9:.1f} G "
        f"exponentials and {rates['fused_multiply_adds'] / 1e9:.0f} G fused multiply-adds a second "
        f"on {threads} threads (best of 14, vectors in registers) and copies at "
        f"{bandwidth / 1e9:.1f} GB/s. Of the first the forward needs one per element and state "
        f"({exp_ms:.2f} ms), of the second three ({fma_ms:.2f} ms; both go through the same "
        f"units), and u, delta, z and y cross the memory bus ({memory_ms:.2f} ms): together "
        f"{floor_ms:.2f} ms. Measured {forward_ms:.2f} ms: {exp_ms / forward_ms:.0%} of the "
        f"exponential rate, {fma_ms / forward_ms:.0%} of the multiply-add rate, "
        f"{memory_ms / forward_ms:.0%} of the bandwidth, {floor_ms / forward_ms:.0%} of their sum. "
        "The multipliers bound it: an exponential and its three multiply-adds keep them busy while "
        "the next tile is fetched. The rest is the softplus, the gate's sigmoid and rows that come "
        "from the second-level cache. Forward + backward evaluates each exponential twice "
        f"({2 * exp_ms / both_ms:.0%} of the exponential rate)."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--device", choices=["cpu", "cuda", "all"], default="all", help="default: all"
    )
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--rounds", type=int, default=7, help="times are medians of so many")
    parser.add_argument(
        "--slow_rounds",
        type=int,
        default=0,
        help="also time the backward of the loops, so many times (minutes each)",
    )
    add_options(parser)
    parser.add_argument("--memory_of", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--hour", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    check_device(parser, arguments.device)
    torch.set_num_threads(arguments.threads)
    if arguments.hour:
        print_hour(arguments.rounds)
        return 0
    if arguments.memory_of:
        frames, batch, what = arguments.memory_of
        print_memory(int(frames), int(batch), what == "backward")
        return 0

    sections, targets = [], []
    if arguments.device != "cuda":
        text, found = bench_cpu(arguments.rounds, arguments.slow_rounds)
        sections.append(text)
        targets += found
    if arguments.device == "cuda" or (arguments.device == "all" and torch.cuda.is_available()):
        text, found = bench_cuda(arguments.rounds)
        sections.append(text)
        targets += found
    elif arguments.device == "all":
        sections.append(
            "No GPU here: `python -m benchmarks.bench_scan --device cuda --report` adds its table."
        )

    device = "cuda" if arguments.device == "cuda" else "cpu"
    packages = [
        name
        for name in ("torch", "mambapy", "triton", "mamba_ssm")
        if importlib.util.find_spec(name)
    ]
    source = origin(command_line("bench_scan"), packages, device)
    text = "\n\n".join(["# The scan", source, *sections])
    if arguments.report:
        write_report(f"scan_{machine_slug(device)}_{date.today().isoformat()}", text)
    else:
        print(text)
    return verdict(targets, arguments.check)


if __name__ == "__main__":
    sys.exit(main())
