"""Where a run computes, and what that place can do."""

import resource
import sys

import torch
from speechbrain.utils.distributed import get_local_rank

from training.errors import UserError


def choose_device() -> str:
    """CUDA (this process's own GPU under torchrun) before MPS before CPU."""
    if torch.cuda.is_available():
        return f"cuda:{get_local_rank() or 0}"
    if torch.backends.mps.is_available():
        return "mps"
    return "cpu"


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


def check_precision(device: str, precision: str) -> None:
    """fp16 needs loss scaling, which exists on CUDA only.

    Raises:
        UserError: fp16 on another device.
    """
    if precision == "fp16" and not device.startswith("cuda"):
        raise UserError(
            f"--precision fp16 needs a CUDA device, not {device!r}. Use --precision bf16 or fp32."
        )


def peak_memory_gib(device: torch.device | str) -> float:
    """Peak memory in GiB: of the GPU on CUDA, else of this process's resident set."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
