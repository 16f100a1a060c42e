"""The scan on a GPU: milliseconds, and the share of the memory bandwidth they come to."""

from __future__ import annotations

import functools
import importlib.util
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


def bench_cuda(rounds: int) -> tuple[str, list[Target]]:
    """Milliseconds and the share of the memory bandwidth that an ideal kernel would need."""
    bandwidth = copy_bandwidth("cuda", 1 << 28, torch.cuda.synchronize)
    rows, targets = [], []
    for shape in (GpuShape(32, 1024, 400), GpuShape(8, 1024, 3000)):
        for dtype in (torch.float32, torch.bfloat16):
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
                for name, ms in times.items():
                    ways = 1 if name in ("`triton`", "mamba_ssm") else 2
                    floor = _bytes_moved(inputs, backward, ways) / bandwidth * 1e3
                    rows.append([what, name, f"{ms:.3f}", f"{floor / ms:.0%}"])
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
                            1,
                            True,
                            "x",
                        )
                    )
    text = [
        f"GPU: {torch.cuda.get_device_name()}, measured copy bandwidth {bandwidth / 1e9:.0f} GB/s; "
        f"medians of {rounds}. The floor reads every input and writes every output once.",
        markdown_table(["shape and pass", "scan", "ms", "of the bandwidth floor"], rows),
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
