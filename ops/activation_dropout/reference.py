"""The definition, in PyTorch's own functions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {None: lambda x: x, "gelu": F.gelu, "silu": F.silu}


def unavailable() -> str | None:
    """Nothing keeps this backend from being used."""
    return None


def unsupported(_arguments: tuple[Tensor, str | None, float]) -> str | None:
    """Nothing that floats is unsupported."""
    return None


def apply(arguments: tuple[Tensor, str | None, float]) -> Tensor:
    """``dropout(activation(x), p)``."""
    x, activation, p = arguments
    y = ACTIVATIONS[activation](x)
    return F.dropout(y, p) if p else y
