"""Linear layers of networks that take one token or frame at a time."""

from __future__ import annotations

from speechbrain.nnet.linear import Linear
from torch import Tensor, nn

from ops.packed_linear import packed_linear


def step_linear(layer: nn.Module, x_BD: Tensor) -> Tensor:
    """``layer(x_BD)``, faster within ``ops.packed_linear.packed_weights`` where it is linear.

    Args:
        layer: ``torch.nn.Linear`` or SpeechBrain's; another module, or one with hooks, is called.
        x_BD: one row per hypothesis or stream.
    """
    inner = layer.w if type(layer) is Linear and layer.max_norm is None else layer
    hooked = layer._forward_pre_hooks or inner._forward_pre_hooks or inner._forward_hooks
    if type(inner) is nn.Linear and not hooked:
        return packed_linear(x_BD, inner.weight, inner.bias)
    return layer(x_BD)
