"""Where a figure comes from: machine, versions, commit and command, beside the figures."""

import argparse
import os
import platform
import re
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch

from common.provenance import git_commit, package_version

_REPOSITORY = Path(__file__).resolve().parent.parent
REPORTS = Path(os.environ.get("BENCHMARK_REPORTS", _REPOSITORY / "benchmarks" / "reports"))


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of a benchmark that has targets."""
    parser.add_argument("--check", action="store_true", help="exit with 1 where a target is missed")
    parser.add_argument("--report", action="store_true", help="write to benchmarks/reports")


def command_line(module: str, argv: Sequence[str] | None = None) -> str:
    """How a benchmark was called, with ``argv`` or the arguments of this process."""
    return " ".join([f"python -m benchmarks.{module}", *(sys.argv[1:] if argv is None else argv)])


def origin(command: str, packages: Sequence[str] = (), device: str = "cpu") -> str:
    """Bullet points that say how the figures of a report were obtained.

    Args:
        command: what was run.
        packages: installed distributions whose versions matter.
        device: on which type of device.
    """
    versions = [f"Python {platform.python_version()}"]
    # A package that was copied rather than installed does not tell its version.
    versions += [f"{name} {package_version(name) or 'of unknown version'}" for name in packages]
    machine = f"{processor()}, {os.cpu_count()} cores, {platform.system()}"
    if device == "cuda":
        machine = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}; {machine}"
    return "\n".join(
        [
            f"- command: `{command}`",
            f"- commit: {git_commit() or 'unknown'}",
            f"- date: {date.today().isoformat()}",
            f"- machine: {machine}",
            # Above the number of cores, other programs took part of the time.
            f"- load average at the end: {os.getloadavg()[0]:.1f}",
            f"- versions: {', '.join(versions)}",
        ]
    )


def write_report(name: str, text: str, keep: bool = True) -> None:
    """Print a report and, where it is to be kept, write it to ``<name>.md``.

    That lies in benchmarks/reports, or where BENCHMARK_REPORTS says.
    """
    text = text.rstrip("\n") + "\n"
    if keep:
        REPORTS.mkdir(parents=True, exist_ok=True)
        (REPORTS / f"{name}.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def machine_slug(device: str = "cpu") -> str:
    """The processor's or the GPU's name as part of a report's file name."""
    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or platform.machine()


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def check_device(parser: argparse.ArgumentParser, device: str) -> None:
    """Ends the command with a message where it asks for a GPU and there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU here; --device cpu measures without one.")
