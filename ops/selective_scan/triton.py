"""The backend called ``triton``: GPU kernels without a CUDA toolchain, one launch for both ways.

`triton_forward` and `triton_backward` say how the kernels work, `triton_launch` prepares what they
need. Triton is imported at the first call. With TRITON_INTERPRET=1 in the environment before that,
the kernels run on the CPU, slowly: this is how they are tested without a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

from ops.native import empty_like
from ops.selective_scan.arguments import ScanArguments, WayGradients
from ops.selective_scan.operator import register

# Frames between two kept states: a tile of the kernels.
TILE_FRAMES = 16
# Programs along the second and third axis of a CUDA grid.
MAX_GRID = 65535


def interpreted() -> bool:
    """Whether Triton's interpreter is on, which computes on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y", "t")


@functools.cache
def _can_compile() -> bool:
    """Whether Triton can build, once for a machine, what it starts kernels with."""
    if os.name != "posix":
        return True
    # As Triton looks for them.
    scheme = sysconfig.get_default_scheme()
    scheme = "posix_prefix" if scheme == "posix_local" else scheme
    headers = Path(sysconfig.get_paths(scheme)["include"], "Python.h")
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return compiler is not None and headers.is_file()


def unavailable() -> str | None:
    """Why this backend cannot be used on this machine, None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if interpreted():
        return None
    if torch.version.hip is not None:
        return "its kernels have not been made ready for AMD GPUs (ROCm)"
    if not torch.cuda.is_available():
        return "no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, for tests only)"
    if not _can_compile():
        return "Triton needs a C compiler and Python's headers (gcc and python3-dev)"
    return None


def unsupported(arguments: ScanArguments) -> str | None:
    """Why a call does not fit, None if it does."""
    u = arguments.ways[0].u
    batch, _, time = u.shape
    states = max(way.A.shape[1] for way in arguments.ways)
    if u.dtype == torch.float64:
        return "it computes in float32, the inputs are float64"
    if u.device.type != "cuda" and not interpreted():
        return f"the inputs are on {u.device}, it needs a CUDA device"
    if u.numel() == 0 or states == 0:
        return "there is nothing to scan"
    if batch > MAX_GRID:
        return f"the batch of {batch} exceeds {MAX_GRID} items"
    if (time + TILE_FRAMES) * states >= 2**31:
        return f"{time} frames of {states} states exceed 32-bit indices; scan in pieces"
    return None


def forward(arguments: ScanArguments, save: bool) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The scan in one direction, or the mean over two.

    Returns:
        y, and for each way the last state and the states in front of every tile of frames that
        `backward` wants, empty unless ``save``.
    """
    from ops.selective_scan.triton_launch import launch_forward

    y, last_states, states = _new_outputs(arguments, save)
    with torch.cuda.device_of(y):
        launch_forward(arguments, y, last_states, states if save else None)
    return y, last_states, states


def _new_outputs(arguments: ScanArguments, save: bool) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    ways = arguments.ways
    u, num_states = ways[0].u, ways[0].A.shape[1]
    batch, dim, time = u.shape
    # Of the tile that is scanned first the state is the caller's.
    kept_tiles = max((time + TILE_FRAMES - 1) // TILE_FRAMES - 1, 0)
    kept = (batch, kept_tiles, num_states, dim) if save else (0,)
    return (
        empty_like(u),
        [u.new_empty(batch, num_states, dim, dtype=torch.float32).transpose(1, 2) for _ in ways],
        [u.new_empty(kept, dtype=torch.float32) for _ in ways],
    )


def backward(
    grad_y: Tensor,
    grad_last_states: list[Tensor | None],
    states: list[Tensor],
    arguments: ScanArguments,
) -> tuple[list[WayGradients], Tensor | None]:
    """Gradients of everything in ``ways``, and of ``z``."""
    from ops.selective_scan.triton_launch import launch_backward

    with torch.cuda.device_of(grad_y):
        return launch_backward(grad_y, grad_last_states, states, arguments)


def _new_gradient(x: Tensor) -> Tensor:
    """Memory laid out like the gradient of ``x``: only sequences and states keep their layout."""
    return empty_like(x) if x.dim() == 3 else x.new_empty(x.shape)


scan = register("mamba_asr::selective_scan_triton", forward, backward, _new_outputs, _new_gradient)
