"""Dropout, alone and behind an activation, through `ops.activation_dropout`."""

from speechbrain.nnet.activations import Swish
from torch import Tensor, nn

from ops.activation_dropout import activation_dropout_fn


class Dropout(nn.Dropout):
    """``nn.Dropout``, which on a CPU takes longer than the matrix product beside it, made fast."""

    def forward(self, x: Tensor) -> Tensor:
        """Zeroes elements with probability ``p`` in training and divides the others by 1 - p."""
        if not self.training or self.p in (0.0, 1.0):
            return super().forward(x)
        return activation_dropout_fn(x, None, self.p)


def replace_dropout(module: nn.Module) -> None:
    """Puts ``Dropout`` in the place of every ``nn.Dropout`` below ``module``."""
    for name, child in module.named_children():
        if type(child) is nn.Dropout:
            setattr(module, name, Dropout(child.p))
        else:
            replace_dropout(child)


def activate_and_drop(x: Tensor, activation: nn.Module, dropout: nn.Dropout) -> Tensor:
    """``dropout(activation(x))``, in training in one pass where there is a kernel for it."""
    name = _kernel_name(activation)
    if not dropout.training or name is None or dropout.p == 1.0:
        return dropout(activation(x))
    return activation_dropout_fn(x, name, dropout.p)


def _kernel_name(activation: nn.Module) -> str | None:
    if isinstance(activation, nn.GELU) and activation.approximate == "none":
        return "gelu"
    if isinstance(activation, nn.SiLU) or (isinstance(activation, Swish) and activation.beta == 1):
        return "silu"
    return None
