"""The inner part of a mixer put together from operations that bring their own gradients.

For backends without a raw forward and backward, and for graphs that a compiler plans by itself.
"""

from __future__ import annotations

import functools

from torch import Tensor

from ops.causal_conv1d.dispatch import convolve
from ops.mamba_inner.arguments import InnerArguments, prepare_ways
from ops.selective_scan.dispatch import scan


def mamba_inner(
    arguments: InnerArguments, scan_backend: str, conv_backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """`dispatch.mamba_inner_fn`, always with the states."""
    ways, _, conv_states = prepare_ways(
        arguments, functools.partial(convolve, backend=conv_backend)
    )
    y_BET, last_state = scan(arguments.scan(ways), scan_backend)
    return y_BET.transpose(1, 2), conv_states[0], last_state
