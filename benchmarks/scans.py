"""The scans that are compared, and what they are given."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.selective_scan import Way, bidirectional_scan_fn, selective_scan_fn

STATE = 16
# Of mamba.py's block, which does nothing with it here.
_MODEL = 256


def make_inputs(
    batch: int, dim: int, frames: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """u, delta, A, B, C, D, z and delta_bias, channels next to each other in memory."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    def over_time(channels: int) -> Tensor:
        return normal(batch, frames, channels).to(dtype).transpose(1, 2)

    rates = torch.arange(1.0, STATE + 1, device=device)
    return [
        over_time(dim),
        over_time(dim),
        -rates.expand(dim, STATE).contiguous(),
        over_time(STATE),
        over_time(STATE),
        normal(dim),
        over_time(dim),
        normal(dim) - 4,
    ]


def make_inputs_of_both(*size, **options) -> list[Tensor]:
    """The gate, which both directions share, and the other tensors of each."""
    *own, z, bias = make_inputs(*size, **options)
    return [z, *own, bias, *(x.clone() for x in (*own, bias))]


def scan(backend: str, *inputs: Tensor) -> Tensor:
    return selective_scan_fn(*inputs, delta_softplus=True, backend=backend)


def both_ways(backend: str, *inputs: Tensor) -> Tensor:
    z, forward, backward = of_each(inputs)
    ways = Way(*forward), Way(*backward, reverse=True)
    return bidirectional_scan_fn(*ways, z, True, backend=backend)


def two_calls(backend: str, *inputs: Tensor) -> Tensor:
    """The same by flipping, as one does with a function that knows no direction."""
    z, (*own, bias), (*own_b, bias_b) = of_each(inputs)
    second = [x.flip(-1) if x.dim() == 3 else x for x in (*own_b, z, bias_b)]
    return (scan(backend, *own, z, bias) + scan(backend, *second).flip(-1)) / 2


def of_each(inputs: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
    """The gate, and what each direction of `make_inputs_of_both` has of its own."""
    z, *own = inputs
    return z, own[: len(own) // 2], own[len(own) // 2 :]


def textbook_loop(u, delta, A, B, C, D, z, delta_bias) -> Tensor:
    """A loop that slices its inputs frame by frame, as mamba_ssm's reference is written."""
    dt = F.softplus(delta + delta_bias[:, None])
    decay = torch.exp(torch.einsum("bdl,dn->bdln", dt, A))
    entering = torch.einsum("bdl,bnl,bdl->bdln", dt, B, u)
    h, outputs = torch.zeros_like(entering[:, :, 0]), []
    for t in range(u.shape[-1]):
        h = decay[:, :, t] * h + entering[:, :, t]
        outputs.append(torch.einsum("bdn,bn->bd", h, C[:, :, t]))
    return (torch.stack(outputs, dim=2) + u * D[:, None]) * F.silu(z)


@functools.cache
def _mambapy_block():
    from mambapy.mamba import MambaBlock, MambaConfig

    return MambaBlock(MambaConfig(d_model=_MODEL, n_layers=1, d_state=STATE))


def parallel_scan(*inputs: Tensor) -> Tensor:
    """mamba.py's parallel scan (package mambapy), softplus and gate around it as in its block."""
    u, delta, A, B, C, D, z, bias = (x.transpose(1, 2) if x.dim() == 3 else x for x in inputs)
    dt = F.softplus(delta + bias)
    return (_mambapy_block().selective_scan(u, dt, A, B, C, D) * F.silu(z)).transpose(1, 2)


def runner(
    function: Callable[..., Tensor], inputs: list[Tensor], backward: bool
) -> Callable[[], None]:
    """A call of ``function``; with ``backward`` also the gradients of all inputs."""
    if not backward:

        def forward_only() -> None:
            with torch.no_grad():
                function(*inputs)

        return forward_only
    leaves = [x.detach().requires_grad_() for x in inputs]
    grad_y = torch.randn_like(inputs[0])

    def forward_and_backward() -> None:
        torch.autograd.grad(function(*leaves), leaves, grad_y)

    return forward_and_backward
