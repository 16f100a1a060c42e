"""The scan on a GPU: milliseconds, and the share of the memory bandwidth they come to.

    python -m benchmarks.scan_gpu --sweep

times the kernels under other block sizes and numbers of registers (`triton_launch.Tuning`), without
what the host does: a row per setting, the default first.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.scans import both_ways, make_inputs, make_inputs_of_both, runner, scan, two_calls
from benchmarks.targets import Target
from benchmarks.timing import copy_bandwidth, medians_ms, tell
from common.tables import markdown_table


class GpuShape(NamedTuple):
    batch: int
    dim: int
    frames: int


SHAPES = (GpuShape(32, 1024, 400), GpuShape(8, 1024, 3000))


def bench_cuda(rounds: int) -> tuple[str, list[Target]]:
    """Milliseconds and the share of the memory bandwidth that an ideal kernel would need."""
    bandwidth = copy_bandwidth("cuda", 1 << 28, torch.cuda.synchronize)
    rows, targets = [], []
    types = (torch.float32, torch.bfloat16)
    compile_together((0, dtype, both) for dtype in types for both in (False, True))
    for shape in SHAPES:
        for dtype in types:
            inputs = make_inputs(*shape, device="cuda", dtype=dtype)
            of_both = make_inputs_of_both(*shape, device="cuda", dtype=dtype)
            candidates = {
                "`triton`": (functools.partial(scan, "triton"), inputs),
                "`triton`, both directions": (functools.partial(both_ways, "triton"), of_both),
                "`triton`, two calls and flips": (functools.partial(two_calls, "triton"), of_both),
            }
            if importlib.util.find_spec("selective_scan_cuda"):
                # In the layout that its kernel reads without converting.
                contiguous = [x.contiguous() for x in inputs]
                candidates["mamba_ssm"] = (functools.partial(scan, "mamba_ssm"), contiguous)
            for backward in (False, True):
                times = medians_ms(
                    {name: runner(*c, backward) for name, c in candidates.items()},
                    rounds,
                    torch.cuda.synchronize,
                )
                what = f"{tuple(shape)} {str(dtype).removeprefix('torch.')}" + (
                    " forward + backward" if backward else " forward"
                )
                tell(what, times)
                on_device = {
                    name: device_ms(runner(*c, backward)) for name, c in candidates.items()
                }
                tell(f"{what}, on the device alone", on_device)
                for name, ms in times.items():
                    ways = 1 if name in ("`triton`", "mamba_ssm") else 2
                    floor = _bytes_moved(inputs, backward, ways) / bandwidth * 1e3
                    share = f"{floor / on_device[name]:.0%}"
                    rows.append([what, name, f"{ms:.3f}", f"{on_device[name]:.3f}", share])
                targets.append(
                    Target(
                        f"{what}: both directions, times as fast as two calls",
                        times["`triton`, two calls and flips"] / times["`triton`, both directions"],
                        1.3,
                        True,
                        "x",
                    )
                )
                if "mamba_ssm" in times:
                    targets.append(
                        Target(
                            f"{what}: times as fast as mamba_ssm",
                            times["mamba_ssm"] / times["`triton`"],
                            1.1 if backward else 2 if shape.frames == 3000 else 1.3,
                            True,
                            "x",
                        )
                    )
    text = [
        f"GPU: {torch.cuda.get_device_name()}, measured copy bandwidth {bandwidth / 1e9:.0f} GB/s; "
        f"medians of {rounds}. Calls one after the other; as graphs on the device alone, without "
        "what the host does. The floor reads every input and writes every output once.",
        markdown_table(
            ["shape and pass", "scan", "ms", "ms on the device", "of the bandwidth floor"], rows
        ),
        markdown_table(["target", "measured", "wanted", "met"], [t.row() for t in targets]),
    ]
    return "\n\n".join(text), targets


def _bytes_moved(inputs: list[Tensor], backward: bool, ways: int) -> int:
    """What has to cross the memory bus; the gate and the output are shared by both ways."""
    u, delta, _, B, C, _, z, _ = (x.numel() * x.element_size() for x in inputs)
    of_each_way = u + delta + B + C
    forward = ways * of_each_way + z + u
    # Reads the inputs and the output's gradient, writes the gradients.
    return forward + (2 * ways * of_each_way + 2 * z + u if backward else 0)


# Settings that are compared with the default, by what they change.
SETTINGS: list[dict[str, int | None]] = [
    {},
    *({"forward_registers": count} for count in (96, 168, None)),
    *({"ends_registers": count} for count in (96, None)),
    *({"backward_registers": count} for count in (128, None)),
    # From one piece to many, whatever the number of channels.
    *({"programs": count, "enough_programs": 1000} for count in (1, 16, 32, 64, 96, 192)),
]
_COMPILE = "--compile"


def sweep() -> str:
    """A table of milliseconds on the device alone, for every setting, shape and pass."""
    compile_together(
        (i, torch.float32, both)
        for i, changes in enumerate(SETTINGS)
        for both in (False, True)
        if not changes or any("registers" in name for name in changes)
    )
    rows = []
    for changes in SETTINGS:
        name = ", ".join(f"{name} {value}" for name, value in changes.items()) or "default"
        try:
            times = _device_times(changes)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            times = [str(error).splitlines()[0][:60]]
        rows.append([name, *times, *[""] * (2 * len(SHAPES) + 1 - len(times))])
        print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    columns = [f"{tuple(shape)} {what}" for shape in SHAPES for what in ("fwd", "fwd+bwd")]
    header = ["setting", *columns, "both directions, last shape, fwd+bwd"]
    return markdown_table(header, rows)


@contextlib.contextmanager
def tuned(changes: dict[str, int | None]) -> Iterator[None]:
    """Within it the kernels are launched with these settings."""
    from ops.selective_scan import triton_launch

    default = triton_launch.TUNING
    triton_launch.TUNING = default._replace(**changes)
    try:
        yield
    finally:
        triton_launch.TUNING = default


def _device_times(changes: dict[str, int | None]) -> list[str]:
    times = []
    with tuned(changes):
        for shape in SHAPES:
            inputs = make_inputs(*shape, device="cuda")
            for backward in (False, True):
                call = runner(functools.partial(scan, "triton"), inputs, backward)
                times.append(f"{device_ms(call):.3f}")
        of_both = make_inputs_of_both(*SHAPES[-1], device="cuda")
        call = runner(functools.partial(both_ways, "triton"), of_both, True)
        times.append(f"{device_ms(call):.3f}")
    return times


def device_ms(call: Callable[[], None]) -> float:
    """Median milliseconds of a call on the device: its kernels as a graph, nothing of the host.

    NaN where the call cannot be captured.
    """
    try:
        return _device_ms(call)
    except RuntimeError as error:
        print(f"not captured: {str(error).splitlines()[0]}", file=sys.stderr)
        torch.cuda.synchronize()
        return math.nan


def _device_ms(call: Callable[[], None]) -> float:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    times = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def compile_together(jobs: Iterable[tuple[int, torch.dtype, bool]]) -> None:
    """Fills Triton's cache, compilers side by side: one after another they would take minutes.

    Args:
        jobs: of `SETTINGS` which, the type of the sequences, and whether both directions at once.
    """
    own = [sys.executable, "-m", "benchmarks.scan_gpu", _COMPILE]
    compilers = [
        subprocess.Popen([*own, str(i), str(dtype).removeprefix("torch."), str(int(both))])
        for i, dtype, both in jobs
    ]
    for compiler in compilers:
        compiler.wait()


def _compile(setting: str, dtype: str, both: str) -> None:
    make, function = (make_inputs_of_both, both_ways) if int(both) else (make_inputs, scan)
    with tuned(SETTINGS[int(setting)]):
        inputs = make(*SHAPES[-1], device="cuda", dtype=getattr(torch, dtype))
        runner(functools.partial(function, "triton"), inputs, True)()
    torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", action="store_true", help="compare settings of the kernels")
    parser.add_argument("--rounds", type=int, default=7, help="times are medians of so many")
    parser.add_argument(_COMPILE, nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.compile:
        _compile(*arguments.compile)
    elif arguments.sweep:
        print(sweep())
    else:
        print(bench_cuda(arguments.rounds)[0])


if __name__ == "__main__":
    main()
