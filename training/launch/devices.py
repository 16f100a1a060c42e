"""Where a run computes, and what that place can do."""

import functools
import importlib.util
import os
import platform
import resource
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from speechbrain.utils.distributed import get_local_rank

from common.errors import UserError
from ops.backends import OVERRIDE, OVERRIDE_VALUES, obstacle
from ops.selective_scan.dispatch import BACKENDS


def own_device(asked_for: str | None) -> str:
    """The device of this process: what was asked for, else CUDA before MPS before CPU.

    Under torchrun every process has a GPU of its own, and processes of a Mac compute on its CPU:
    gloo does not reach MPS.

    Raises:
        UserError: one GPU for several processes.
    """
    rank = get_local_rank()
    if asked_for is None:
        if torch.cuda.is_available():
            asked_for = "cuda"
        else:
            asked_for = "mps" if torch.backends.mps.is_available() and rank is None else "cpu"
    if not asked_for.startswith("cuda"):
        # Checkpoints know no device of the name cpu:0.
        return "cpu" if asked_for == "cpu:0" else asked_for
    if asked_for == "cuda":
        return f"cuda:{rank or 0}"
    if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
        raise UserError(
            f"--device {asked_for}: torchrun gives every process a GPU of its own. Leave the "
            "number out; CUDA_VISIBLE_DEVICES chooses among the GPUs."
        )
    return asked_for


def distributed_backend_for(device: str) -> str:
    """nccl between GPUs, gloo everywhere else."""
    return "nccl" if device.startswith("cuda") else "gloo"


def check_device(device: str) -> None:
    """Whether this machine has the device.

    Raises:
        UserError: it has not, or there is no device of that name.
    """
    counts = {
        "cpu": 1,
        "mps": int(torch.backends.mps.is_available()),
        "cuda": torch.cuda.device_count(),
    }
    kind, _, index = device.partition(":")
    if not (index or "0").isdigit() or int(index or 0) >= counts.get(kind, 0):
        usable = ", ".join(name for name, count in counts.items() if count)
        raise UserError(f"--device {device}: there is none here. Usable: {usable}.")


def check_forced_backend(mamba_config: Mapping | None = None) -> None:
    """Whether the scan backend that environment or settings name can compute on this machine.

    Raises:
        UserError: it cannot, or there is none of that name.
    """
    for name, wanted in (
        (f"{OVERRIDE}=", os.environ.get(OVERRIDE) or "auto"),
        ("mamba_config: backend: ", (mamba_config or {}).get("backend", "auto")),
    ):
        if wanted not in OVERRIDE_VALUES:
            raise UserError(f"{name}{wanted}: it must be one of {', '.join(OVERRIDE_VALUES)}.")
        reason = None if wanted == "auto" else obstacle(BACKENDS.module(wanted))
        if reason is not None:
            raise UserError(
                f"{name}{wanted} cannot be used here: {reason}. Leave it out, or choose among "
                "those that python -m ops.doctor lists."
            )


def check_precision(device: str, precision: str) -> None:
    """fp16 needs loss scaling, which exists on CUDA only.

    Raises:
        UserError: fp16 on another device.
    """
    if precision == "fp16" and not device.startswith("cuda"):
        raise UserError(
            f"--precision fp16 needs a CUDA device, not {device!r}. Use --precision bf16 or fp32."
        )


def computes_bf16(device: torch.device | str) -> bool:
    """False for an x86 CPU without bf16 instructions: it converts to fp32 and back."""
    if torch.device(device).type != "cpu" or platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    # Before torch 2.12 there is no list of what a CPU can.
    can = getattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})()
    return any(can.get(name) for name in ("avx512_bf16", "amx_bf16", "avx10_1", "avx10_2"))


def peak_memory_gib(device: torch.device | str) -> float:
    """Peak memory in GiB: of the GPU on CUDA, else of this process's resident set."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def memory_gib(device: torch.device | str) -> float | None:
    """Memory of a GPU that tensors take now; None elsewhere."""
    device = torch.device(device)
    return torch.cuda.memory_allocated(device) / 2**30 if device.type == "cuda" else None


@functools.cache
def _can_ask_for_use() -> bool:
    return importlib.util.find_spec("pynvml") is not None


def gpu_use_percent(device: torch.device | str) -> float | None:
    """Share of the last moments in which the GPU computed; None where nothing tells it."""
    device = torch.device(device)
    if device.type != "cuda" or not _can_ask_for_use():
        return None
    try:
        return float(torch.cuda.utilization(device))
    except Exception:
        # Some machines hide the driver's management library, whose errors are a class of its own.
        return None


@contextmanager
def explained_memory(
    keys: Sequence[str], describe: Callable[[Any], str], batch: object
) -> Iterator[None]:
    """Turns a lack of memory into a message that says what to lower.

    Args:
        keys: of the YAML file, that decide how large a batch is.
        describe: says how large ``batch`` was.

    Raises:
        UserError: something inside did not fit into memory.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _is_lack_of_memory(error):
            raise
        first = str(error).partition("\n")[0]
        raise UserError(
            f"Out of memory in a batch of {describe(batch)}: {first} Lower {' or '.join(keys)} (a "
            "larger grad_accumulation_factor keeps the effective batch), or give "
            "--gradient_checkpointing True; then repeat the command to go on."
        ) from error


def _is_lack_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return "can't allocate memory" in str(error) or "not enough memory" in str(error)
