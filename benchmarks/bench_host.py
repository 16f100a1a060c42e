"""What a training step asks of the host that drives a GPU, counted where there is none.

    python -m benchmarks.bench_host --check

A network trains on the CPU for a step, by the Triton backends, whose launches end before the call
of the driver. Counted are the operators that would launch a kernel on a GPU, those kernels, and
allocations. The host's time of a layer is what the core takes for it in a network of few channels
and frames, with SpeechBrain's Conformer in turns and in the same way. A CPU's small products and
convolutions stand there for what cuBLAS, cuDNN and launches take a host. Then every kernel is
compiled for an Ampere and a Hopper GPU: registers, spilled bytes, instructions.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from datetime import date
from pathlib import Path
from unittest.mock import patch

import torch
import triton
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import bench_encoder
from benchmarks.absent_gpu import Unlaunched, absent_gpu, launches
from benchmarks.report import add_options, command_line, machine_slug, origin, write_report
from benchmarks.targets import Target, table, verdict
from common.tables import markdown_table
from modules.TransformerASR import TransformerASR
from ops.selective_scan import triton_launch
from training.brains.cast_weights import CastWeights

MOST_LAUNCHES = 1600
CAPABILITIES = (80, 90)
_ALLOCATING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
# Operators that describe memory anew or look at something, and launch nothing.
_FREE = {"detach", "alias", "lift_fresh", "_unsafe_view", "promote_types", "result_type"}
_FREE |= {"_local_scalar_dense", "bernoulli_", "div_"} | _ALLOCATING
# Narrow: a CPU is to be done at once with what a GPU would compute.
NARROW = {"d_model": 16, "d_ffn": 32}
NARROW_FRAMES = 32


class CountLaunches(TorchDispatchMode):
    """Counts operators by name within it; those that only describe memory anew are left out.

    A dropout is two kernels on a GPU; here two multiplications are counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.allocations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        is_view = any(
            value.alias_info is not None and not value.alias_info.is_write
            for value in func._schema.returns
        )
        self.allocations += name in _ALLOCATING
        if not is_view and name not in _FREE:
            self.operators[name] += 1
        return func(*args, **(kwargs or {}))


def training_pass(network: nn.Module, d_model: int, frames: int) -> Callable[[], float]:
    """Forward and backward in bf16 on a small batch, ours with weights cast as on a GPU.

    What it returns is the core's clock between the two.
    """
    src = torch.randn(2, frames, d_model)
    relative = torch.tensor([1.0, 0.5])
    networks = [network] if isinstance(network, TransformerASR) else []
    weights = CastWeights(networks, torch.bfloat16)
    parameters = list(network.parameters())

    def run() -> float:
        for parameter in parameters:
            parameter.grad = None
        with torch.autocast("cpu", torch.bfloat16), weights.in_place():
            loss = network.encode(src, relative).float().square().mean()
        between = time.process_time()
        loss.backward()
        return between

    return run


def count_step(network: nn.Module, kernels: dict[str, Unlaunched]) -> tuple[Counter[str], int]:
    """What a step launches, by name, and its allocations; the optimiser's few kernels too."""
    run = training_pass(network, bench_encoder.D_MODEL, 100)
    run()
    optimizer = torch.optim.AdamW(network.parameters(), foreach=True)
    before = launches(kernels)
    with CountLaunches() as counted:
        run()
    found = counted.operators + launches(kernels) - before
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    # The first step makes its memory.
    optimizer.step()
    with CountLaunches() as counted_optimizer:
        optimizer.step()
    for name, count in counted_optimizer.operators.items():
        if name.startswith("_foreach"):
            found[name] += count
    return found, counted.allocations


def host_ms_per_layer(
    encoders: dict[str, Callable[..., nn.Module]], rounds: int
) -> dict[str, tuple[float, float]]:
    """Median milliseconds of a layer forward, and with the backward: three less one, by two.

    All take turns, so that whatever else the machine does meets all.
    """
    runs = {
        (name, layers): training_pass(
            make(num_encoder_layers=layers, **NARROW), NARROW["d_model"], NARROW_FRAMES
        )
        for name, make in encoders.items()
        for layers in (1, 3)
    }
    times: dict[tuple[str, int], list[tuple[float, float]]] = {key: [] for key in runs}
    # Time is cut into pieces, as that of the batches that are counted.
    tuning = triton_launch.TUNING._replace(min_piece_frames=NARROW_FRAMES // 2)
    with patch.object(triton_launch, "TUNING", tuning):
        for number in range(-3, rounds):
            for key, run in runs.items():
                # Of this process: other work on the machine is not the host's of a GPU.
                start = time.process_time()
                between = run()
                if number >= 0:
                    times[key].append((between - start, time.process_time() - start))

    def of_layer(name: str, part: int) -> float:
        pairs = zip(times[name, 3], times[name, 1], strict=True)
        return statistics.median(many[part] - one[part] for many, one in pairs) / 2 * 1e3

    return {name: (of_layer(name, 0), of_layer(name, 1)) for name in encoders}


def compiled_rows(capability: int, kernels: dict[str, Unlaunched]) -> list[list[str]]:
    """Of every variant of every kernel: registers, spilled bytes, instructions, seconds."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    rows = []
    for kernel in kernels.values():
        start = _core_seconds()
        for compiled in kernel.compile_wholly():
            seconds = _core_seconds() - start
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(compiled.asm["cubin"])
                file.flush()
                usage, code = (
                    subprocess.run(
                        [tools / tool, option, file.name],
                        capture_output=True, text=True, check=True,
                    ).stdout
                    for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
                )  # fmt: skip
            registers, stack = (re.findall(rf"{name}:(\d+)", usage)[0] for name in ("REG", "STACK"))
            instructions = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.MULTILINE))
            rows.append(
                [f"sm_{capability}", kernel.name, registers, stack, str(instructions),
                 f"{seconds:.1f}"]
            )  # fmt: skip
            start = _core_seconds()
    return rows


def _core_seconds() -> float:
    """Seconds of a core that this process and those it waited for have taken."""
    return sum(os.times()[:4])


def measure(rounds: int, compiling: bool) -> tuple[str, list[Target]]:
    """The report's text, and what is wanted."""
    sections, targets = [], []
    encoders = {"ConMamba": bench_encoder.conmamba, "Conformer": bench_encoder.conformer}
    with absent_gpu(CAPABILITIES[-1]) as kernels:
        counts = {name: count_step(encoder(), kernels) for name, encoder in encoders.items()}
        times = host_ms_per_layer(encoders, rounds)
    total = {name: operators.total() for name, (operators, _) in counts.items()}
    targets.append(
        Target("launches of a step of ConMamba", total["ConMamba"], MOST_LAUNCHES, False, "")
    )
    targets.append(
        Target(
            "host time of a layer against the Conformer's",
            times["ConMamba"][1] / times["Conformer"][1],
            1,
            False,
            "x",
        )
    )
    sections.append(
        markdown_table(
            [
                "12 layers, d_model 144, bf16",
                "launches a step",
                "allocations",
                "ms a layer forward",
                "and backward",
            ],
            [
                [name, str(total[name]), str(counts[name][1]), *(f"{ms:.2f}" for ms in times[name])]
                for name in counts
            ],
        )
    )
    for name, (operators, _) in counts.items():
        most = ", ".join(f"{operator} {count}" for operator, count in operators.most_common(24))
        sections.append(f"{name}: {most}.")
    if compiling:
        rows = []
        for capability in CAPABILITIES:
            with absent_gpu(capability) as kernels:
                network = bench_encoder.conmamba(num_encoder_layers=1)
                training_pass(network, bench_encoder.D_MODEL, 100)()
                rows += compiled_rows(capability, kernels)
        header = ["GPU", "kernel", "registers", "spilled bytes", "instructions", "compiled in s"]
        sections.append(markdown_table(header, rows))
        seconds = sum(float(row[-1]) for row in rows if row[0] == f"sm_{CAPABILITIES[-1]}")
        targets.append(Target("seconds to compile what a recipe needs", seconds, 40, False, "s"))
    sections.append(table(targets))
    return "\n\n".join(sections), targets


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--rounds", type=int, default=30, help="times are medians of so many")
    parser.add_argument("--no_compiling", action="store_true", help="leave the kernels' table out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # What lies in Triton's cache would cost nothing.
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"
    text, targets = measure(arguments.rounds, not arguments.no_compiling)
    source = origin(command_line("bench_host"), ["torch", "triton"], "cpu")
    text = "\n\n".join(["# The host of a GPU", source, text])
    if arguments.report:
        write_report(f"host_{machine_slug('cpu')}_{date.today().isoformat()}", text)
    else:
        print(text)
    return verdict(targets, arguments.check)


if __name__ == "__main__":
    sys.exit(main())
