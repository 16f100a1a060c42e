"""Linear layers of networks that take one token or frame at a time."""

from __future__ import annotations

from speechbrain.nnet.linear import Linear
from torch import Tensor, nn

from modules.plain_layers import is_plain, runs_its_class
from ops.packed_linear import packed_linear


def step_linear(layer: nn.Module, x_BD: Tensor) -> Tensor:
    """``layer(x_BD)``, faster within ``ops.packed_linear.packed_weights`` where it is plain.

    Args:
        layer: ``torch.nn.Linear`` or SpeechBrain's around one; every other module is called.
        x_BD: one row per hypothesis or stream.
    """
    wraps = type(layer) is Linear and layer.max_norm is None and runs_its_class(layer)
    inner = layer.w if wraps else layer
    if is_plain(inner):
        return packed_linear(x_BD, inner.weight, inner.bias)
    return layer(x_BD)
