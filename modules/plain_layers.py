"""Layers that compute nothing but what their weights say, so that a faster path may read these."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from modules.packed_linear import PackedLinear

PLAIN = (nn.Linear, NonDynamicallyQuantizableLinear, PackedLinear, nn.Conv1d, nn.Conv2d)


def is_plain(layer: nn.Module) -> TypeGuard[nn.Linear | nn.Conv1d]:
    """Whether ``layer`` is a linear layer or a convolution of torch's, as torch makes it.

    Everything else has to be called: what stands around or in the place of such a layer (an
    adapter, a quantised layer), a parametrised one, one with hooks or with a forward of its own,
    and one whose weight is a tensor of a special kind, as int8 and fp8 ones are.
    """
    return (
        type(layer) in PLAIN
        and runs_its_class(layer)
        # While a graph is made, every tensor is of a special kind.
        and (type(layer.weight) in (nn.Parameter, Tensor) or torch.compiler.is_compiling())
    )


def runs_its_class(layer: nn.Module) -> bool:
    """Whether a call of ``layer`` runs the forward of its class and nothing else."""
    return not (
        layer._forward_pre_hooks
        or layer._forward_hooks
        or layer._backward_pre_hooks
        or layer._backward_hooks
        or "forward" in vars(layer)
    )
