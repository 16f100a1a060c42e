"""Says which backends work on this machine, which are chosen, and why not others.

    python -m ops.doctor

Exits with 1 where a backend that the machine could run fails to compute, or where the environment
variable MAMBA_ASR_SCAN asks for one that cannot be used.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable, Sequence

import torch

from ops.backends import OVERRIDE, Backends, obstacle
from ops.causal_conv1d.arguments import ConvArguments
from ops.causal_conv1d.dispatch import BACKENDS as CONV_BACKENDS
from ops.selective_scan.arguments import ScanArguments, Way
from ops.selective_scan.dispatch import BACKENDS as SCAN_BACKENDS


def devices() -> list[torch.device]:
    """The kinds of device that torch can compute on here."""
    found = [torch.device("cpu")]
    if torch.cuda.is_available():
        found.append(torch.device("cuda"))
    if torch.backends.mps.is_available():
        found.append(torch.device("mps"))
    return found


def small_scan(device: torch.device) -> ScanArguments:
    """An ordinary call in float32, with a gradient to compute."""
    u = torch.randn(2, 4, 8, device=device, requires_grad=True)
    projection = torch.randn(2, 1, 3, 8, device=device)
    A = -torch.ones(4, 3, device=device)
    return ScanArguments((Way(u, u, A, projection, projection),), u, True, None)


def small_conv(device: torch.device) -> ConvArguments:
    """An ordinary call in float32, with a gradient to compute."""
    x = torch.randn(2, 4, 8, device=device, requires_grad=True)
    weight = torch.randn(4, 4, device=device)
    return ConvArguments(x, weight, None, "silu", None, False, None, None)


def attempt(compute: Callable, arguments: tuple) -> str | None:
    """Runs a call and its gradient; the error, if there was one."""
    try:
        compute(arguments)[0].sum().backward()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def diagnose(backends: Backends, function: str, small_call: Callable) -> bool:
    """Prints what every backend of an operation can do here; False if one is broken."""
    healthy = True
    print(f"\n{backends.operation}")
    for name in backends.names:
        module = backends.module(name)
        reason = module.unavailable()
        if reason is not None:
            print(f"  {name:<10} no   {reason}")
            continue
        findings = []
        for device in devices():
            arguments = small_call(device)
            reason = module.unsupported(arguments)
            failure = None
            if reason is None:
                failure = obstacle(module) or attempt(getattr(module, function), arguments)
            healthy = healthy and failure is None
            finding = reason or (f"FAILS: {failure}" if failure else "yes")
            findings.append(f"{device.type}: {finding}")
        print(f"  {name:<10} {'; '.join(findings)}")
    return healthy


def report_choice(backends: Backends, small_call: Callable) -> bool:
    """Prints what ``auto`` takes on each device; False if it finds nothing."""
    healthy = True
    for device in devices():
        try:
            name = backends.name(backends.choose("auto", device, small_call(device)))
        except ValueError as error:
            healthy, name = False, f"none: {error}"
        print(f"  {backends.operation:<18} on {device.type:<5} {name}")
    return healthy


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m ops.doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(argv)
    print(
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.system()} "
        f"{platform.machine()}, {torch.get_num_threads()} threads, "
        f"devices: {', '.join(device.type for device in devices())}"
    )
    print(f"{OVERRIDE}: {os.environ.get(OVERRIDE) or 'not set, the fastest that can is used'}")
    operations = (
        (SCAN_BACKENDS, "scan", small_scan),
        (CONV_BACKENDS, "conv", small_conv),
    )
    healthy = True
    for operation in operations:
        healthy &= diagnose(*operation)
    print("\nused")
    for backends, _, small_call in operations:
        healthy &= report_choice(backends, small_call)
    return 0 if healthy else 1


if __name__ == "__main__":
    sys.exit(main())
