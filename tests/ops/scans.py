"""Inputs, a plain loop and comparisons that the tests of the scan share."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from ops.backends import Backends
from ops.selective_scan import Way, selective_scan_fn
from ops.selective_scan.dispatch import BACKENDS

TENSORS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


def present_backends(backends: Backends) -> list[str]:
    """Backends present here, but for the definition; interpreted Triton has tests of its own."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return [
        name
        for name in backends.names
        if name != "reference"
        and not (name == "triton" and interpreted)
        and backends.module(name).unavailable() is None
    ]


# mamba_ssm takes no lengths, states or blocks: the published grid is what it is tested with.
FAST = [name for name in present_backends(BACKENDS) if name != "mamba_ssm"]


def device_of(backend: str) -> str:
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    return "cuda" if backend in ("triton", "mamba_ssm") and not interpreted else "cpu"


def random_inputs(
    time: int,
    *,
    batch: int = 3,
    dim: int = 6,
    state: int = 5,
    groups: int = 1,
    constant: str = "",
    channels_last: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Tensor]:
    """All tensors of a scan by name; ``constant`` holds the letters of those that do not vary."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def over_time(*shape: int) -> Tensor:
        if channels_last:
            return normal(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)
        return normal(*shape)

    inputs = {
        "u": over_time(batch, dim, time),
        "delta": over_time(batch, dim, time) - 1,
        "A": -torch.rand(dim, state, generator=generator) * 2 - 0.05,
        "B": normal(dim, state) if "B" in constant else over_time(batch, groups, state, time),
        "C": normal(dim, state) if "C" in constant else over_time(batch, groups, state, time),
        "D": normal(dim),
        "z": over_time(batch, dim, time),
        "delta_bias": normal(dim) * 0.5,
        "initial_state": normal(batch, dim, state),
    }
    narrow = {"u", "delta", "B", "C", "z"}
    return {name: x.to(dtype) if name in narrow else x for name, x in inputs.items()}


def way_of(inputs: dict[str, Tensor], **options) -> Way:
    """One direction of a bidirectional scan, without what both share."""
    return Way(**{name: x for name, x in inputs.items() if name != "z"}, **options)


def run(backend: str, inputs: dict[str, Tensor], dtype=None, **options) -> dict[str, Tensor]:
    """Outputs, last state and gradients of one weighting of both, as ``d<name>``, in float64.

    Args:
        dtype: convert every input to it; None leaves them as they are.
    """
    device = device_of(backend)
    leaves = {
        name: x.to(device=device, dtype=dtype or x.dtype).detach().requires_grad_()
        for name, x in inputs.items()
    }
    if options.get("lengths") is not None:
        options["lengths"] = options["lengths"].to(device)
    y, last_state = selective_scan_fn(
        **leaves, delta_softplus=True, return_last_state=True, backend=backend, **options
    )
    return with_gradients(y, last_state, leaves)


_in_double: dict[bytes, dict[str, Tensor]] = {}


def in_double(inputs: dict[str, Tensor], **options) -> dict[str, Tensor]:
    """The definition in float64; computed once for all backends that are compared with it."""
    buffer = io.BytesIO()
    torch.save((inputs, options), buffer)
    key = hashlib.sha256(buffer.getvalue()).digest()
    if key not in _in_double:
        _in_double[key] = run("reference", inputs, dtype=torch.float64, **options)
    return dict(_in_double[key])


def with_gradients(y: Tensor, last_state: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Results and the gradients of a fixed weighting of them."""
    generator = torch.Generator().manual_seed(99)
    weights = [torch.randn(x.shape, generator=generator).to(x) for x in (y, last_state)]
    ((y * weights[0]).sum() + (last_state * weights[1]).sum()).backward()
    found = {"y": y, "last_state": last_state}
    found |= {f"d{name}": x.grad for name, x in leaves.items() if x.grad is not None}
    return {name: x.detach().cpu().double() for name, x in found.items()}


@contextlib.contextmanager
def memory_of_nan() -> Iterator[None]:
    """Within it uninitialised memory holds NaN: whatever is read must have been written before."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(64).isnan().all(), "memory is not filled"
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def relative_error(x: Tensor, reference: Tensor) -> float:
    """||x - reference|| / ||reference||; a reference of zeros wants zeros."""
    scale = reference.norm()
    return ((x - reference).norm() / scale if scale > 0 else x.norm()).item()


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, reference in wanted.items():
        assert found[name].shape == reference.shape, name
        error = relative_error(found[name], reference)
        assert error < tolerance, f"{name}: {error:.2e}"


def plain_loop(u, delta, A, B, C, D, z, delta_bias, initial_state) -> tuple[Tensor, Tensor]:
    """One forward scan with softplus, in the dtype of its inputs throughout: what one would write.

    B and C are (batch, 1, state, time).
    """
    dt = torch.nn.functional.softplus(delta + delta_bias[:, None])
    h, outputs = initial_state, []
    for t in range(u.shape[-1]):
        dt_t, u_t = dt[..., t, None], u[..., t, None]
        h = torch.exp(dt_t * A) * h + dt_t * u_t * B[:, 0, None, :, t]
        outputs.append((h * C[:, 0, None, :, t]).sum(-1) + D * u[..., t])
    return torch.stack(outputs, -1) * torch.nn.functional.silu(z), h
