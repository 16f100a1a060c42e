"""The inner part of a mixer put together from operations that bring their own gradients.

For backends without a raw forward and backward, and for graphs that a compiler plans by itself.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ops.causal_conv1d import causal_conv1d_fn
from ops.mamba_inner.arguments import Direction
from ops.selective_scan import bidirectional_scan_fn, selective_scan_fn


def mamba_inner(
    xz_BTF: Tensor,
    forward: Direction,
    backward: Direction | None,
    lengths: Tensor | None,
    conv_state: Tensor | None,
    ssm_state: Tensor | None,
    chunk_size: int | None,
    return_state: bool,
    backends: tuple[str, str],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`dispatch.mamba_inner_fn`, with the names of the scan's and the convolution's backend."""
    scan_backend, conv_backend = backends
    x_BET, z_BET = xz_BTF.transpose(1, 2).chunk(2, dim=1)

    def scan_inputs(direction, **options):
        u_BET, last_state = causal_conv1d_fn(
            x_BET,
            direction.conv_weight,
            direction.conv_bias,
            "silu",
            lengths=lengths,
            return_last_state=True,
            backend=conv_backend,
            **options,
        )
        projected = F.linear(u_BET.transpose(1, 2), direction.x_proj.to(u_BET.dtype))
        dt, B, C = direction.split(projected)
        delta_BET = F.linear(dt, direction.dt_proj.to(dt.dtype)).transpose(1, 2)
        return (u_BET, delta_BET, direction.A, B.transpose(1, 2), C.transpose(1, 2)), last_state

    f_inputs, last_conv = scan_inputs(forward, initial_state=conv_state)
    if backward is not None:
        b_inputs, _ = scan_inputs(backward, reverse=True, reset_every=chunk_size)
        if ssm_state is None and not return_state:
            pairs = [x for pair in zip(f_inputs, b_inputs, strict=True) for x in pair]
            y_BET = bidirectional_scan_fn(
                *pairs,
                forward.D,
                backward.D,
                z_BET,
                forward.dt_bias,
                backward.dt_bias,
                True,
                lengths=lengths,
                reset_every=chunk_size,
                backend=scan_backend,
            )
            return y_BET.transpose(1, 2), None, None

    y_BET, last_ssm = selective_scan_fn(
        *f_inputs,
        forward.D,
        z_BET,
        forward.dt_bias,
        True,
        True,
        lengths=lengths,
        initial_state=ssm_state,
        backend=scan_backend,
    )
    if backward is not None:
        y_b = selective_scan_fn(
            *b_inputs,
            backward.D,
            z_BET,
            backward.dt_bias,
            True,
            lengths=lengths,
            reverse=True,
            reset_every=chunk_size,
            backend=scan_backend,
        )
        y_BET = (y_BET + y_b) * 0.5
    return y_BET.transpose(1, 2), last_conv, last_ssm
