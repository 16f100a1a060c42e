"""What a training step asks of the host that drives a GPU, counted where there is none.

    python -m benchmarks.bench_host --check

A network trains on the CPU for a step, by the Triton backends, whose kernels are specialised but
not launched. Counted are the operators that would launch a kernel on a GPU, those kernels, and
allocations; the host's time of a layer is that of forward and backward in a network of a few
channels, which take no time to compute. SpeechBrain's Conformer is counted the same way. Then
every kernel is compiled for an Ampere and a Hopper GPU: registers, spilled bytes, instructions.
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

import torch
import triton
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import bench_encoder
from benchmarks.absent_gpu import Unlaunched, absent_gpu, launches
from benchmarks.report import machine_slug, origin, write_report
from benchmarks.targets import Target
from common.tables import markdown_table
from modules.TransformerASR import TransformerASR
from training.brains.cast_weights import CastWeights

MOST_LAUNCHES = 1600
CAPABILITIES = (80, 90)
_ALLOCATING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
# Operators that describe memory anew or look at something, and launch nothing.
_FREE = {"detach", "alias", "lift_fresh", "_unsafe_view", "promote_types", "result_type"}
_FREE |= {"_local_scalar_dense", "bernoulli_", "div_"} | _ALLOCATING
# Lengths are looked at on a CPU only.
_FREE |= {"min", "max"}
# Narrow: a CPU is to be done at once with what a GPU would compute.
NARROW = {"d_model": 16, "d_ffn": 32}


class CountLaunches(TorchDispatchMode):
    """Counts operators by name within it; those that only describe memory anew are left out.

    A dropout is two kernels on a GPU, whatever it is here: of ours the draw of a seed is seen, of
    torch's four operators.
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
        # The operators of ours for the GPU launch kernels that are counted as such.
        if name == "random_":
            self.operators["dropout"] += 2
        elif not is_view and name not in _FREE and "triton" not in name:
            self.operators[name] += 1
        return func(*args, **(kwargs or {}))


def training_pass(network: nn.Module, d_model: int, frames: int) -> Callable[[], None]:
    """Forward and backward in bf16 on a small batch, ours with weights cast as on a GPU."""
    src = torch.randn(2, frames, d_model)
    relative = torch.tensor([1.0, 0.5])
    networks = [network] if isinstance(network, TransformerASR) else []
    weights = CastWeights(networks, torch.bfloat16)

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16), weights.in_place():
            loss = network.encode(src, relative).float().square().mean()
        loss.backward()
        network.zero_grad()

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


def host_ms_per_layer(make: Callable[..., nn.Module], rounds: int) -> float:
    """Median milliseconds of forward and backward of a layer: three layers less one, by two."""
    runs = [
        training_pass(make(num_encoder_layers=layers, **NARROW), NARROW["d_model"], 16)
        for layers in (1, 3)
    ]
    for run in runs * 3:
        run()
    differences = []
    for _ in range(rounds):
        times = []
        for run in runs:
            # Of this process: other work on the machine is not the host's of a GPU.
            start = time.process_time()
            run()
            times.append(time.process_time() - start)
        differences.append((times[1] - times[0]) / 2)
    return statistics.median(differences) * 1e3


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
    counts, times = {}, {}
    with absent_gpu(CAPABILITIES[-1]) as kernels:
        for name, encoder in (
            ("ConMamba", bench_encoder.conmamba), ("Conformer", bench_encoder.conformer)
        ):  # fmt: skip
            counts[name] = count_step(encoder(), kernels)
            times[name] = host_ms_per_layer(encoder, rounds)
    total = {name: operators.total() for name, (operators, _) in counts.items()}
    targets.append(
        Target("launches of a step of ConMamba", total["ConMamba"], MOST_LAUNCHES, False, "")
    )
    targets.append(
        Target(
            "host time of a layer against the Conformer's",
            times["ConMamba"] / times["Conformer"],
            1,
            False,
            "x",
        )
    )
    sections.append(
        markdown_table(
            ["12 layers, d_model 144, bf16", "launches a step", "allocations", "ms a layer"],
            [
                [name, str(total[name]), str(counts[name][1]), f"{times[name]:.2f}"]
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
    sections.append(
        markdown_table(["target", "measured", "wanted", "met"], [t.row() for t in targets])
    )
    return "\n\n".join(sections), targets


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    parser.add_argument("--report", action="store_true", help="write to benchmarks/reports")
    parser.add_argument("--rounds", type=int, default=30, help="times are medians of so many")
    parser.add_argument("--no_compiling", action="store_true", help="leave the kernels' table out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # What lies in Triton's cache would cost nothing.
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"
    text, targets = measure(arguments.rounds, not arguments.no_compiling)
    command = " ".join(["python -m benchmarks.bench_host", *sys.argv[1:]])
    text = "\n\n".join(["# The host of a GPU", origin(command, ["torch", "triton"], "cpu"), text])
    if arguments.report:
        write_report(f"host_{machine_slug('cpu')}_{date.today().isoformat()}", text)
    else:
        print(text)
    missed = [target for target in targets if not target.met]
    for target in missed:
        print(f"missed: {target.name}: {', '.join(target.row()[1:3])}", file=sys.stderr)
    return 1 if missed and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
