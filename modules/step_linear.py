"""Linear layers of networks that take one token or frame at a time."""

from __future__ import annotations

from speechbrain.nnet.linear import Linear
from torch import Tensor, nn

from ops.packed_linear import packed_linear


def step_linear(layer: nn.Module, x_BD: Tensor) -> Tensor:
    """``layer(x_BD)``, faster within ``ops.packed_linear.packed_weights`` where it is linear.

    Args:
        layer: ``torch.nn.Linear`` or SpeechBrain's; another module (a quantised one) is called.
    """
    if isinstance(layer, Linear) and layer.max_norm is None:
        layer = layer.w
    if type(layer) is nn.Linear:
        return packed_linear(x_BD, layer.weight, layer.bias)
    return layer(x_BD)
