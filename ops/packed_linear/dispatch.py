"""The public product, and the time for which weights stay arranged for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.packed_linear import cpu


class _Scope(threading.local):
    """Weights arranged so far by their id, each with the tensor that keeps the id from reuse."""

    def __init__(self) -> None:
        self.packed: dict[int, tuple[Tensor, Tensor]] | None = None


_scope = _Scope()


@contextmanager
def packed_weights() -> Iterator[None]:
    """Within, `packed_linear` arranges weights at their first use and keeps them so until the end.

    They must not change in the meantime. Meant for a search, which multiplies with the same weights
    for every token; to arrange them costs about what a few products with them do.
    """
    outer, _scope.packed = _scope.packed, {}
    try:
        yield
    finally:
        _scope.packed = outer


def packed_linear(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``, faster for few rows within `packed_weights`.

    A BLAS arranges the weights anew for every call, which for ten rows takes longer than the
    product. Compiled for the CPU, in float32 and without gradients; else torch's.

    Args:
        x_MK: (rows, K); of other dimensions, torch's.
        weight_NK: (N, K).
        bias_N: (N,).

    Returns:
        (rows, N).
    """
    packed = _scope.packed
    if (
        packed is None
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
        or not cpu.supports(x_MK, weight_NK, bias_N)
        or cpu.prepare() is not None
    ):
        return F.linear(x_MK, weight_NK, bias_N)
    if id(weight_NK) not in packed:
        packed[id(weight_NK)] = weight_NK, cpu.pack(weight_NK)
    return cpu.linear(x_MK, packed[id(weight_NK)][1], bias_N, len(weight_NK))
