"""The public activation with dropout: arguments checked, a backend chosen, the call handed over."""

from __future__ import annotations

import torch
from torch import Tensor

from ops.activation_dropout import cpu, reference
from ops.backends import Backends

BACKENDS = Backends(
    "activation_dropout",
    modules={"reference": reference, "cpu": cpu},
    preference={"cpu": ("cpu", "reference"), None: ("reference",)},
)


def activation_dropout_fn(
    x: Tensor, activation: str | None, p: float, training: bool = True, *, backend: str = "auto"
) -> Tensor:
    """``dropout(activation(x), p)``.

    The mask comes from torch's generator of the device, but backends draw it differently: one seed
    gives one mask with each of them, not the same mask with all.

    Args:
        x: any shape; a floating-point dtype.
        activation: ``"gelu"`` (exact, not the tanh formula), ``"silu"`` or None.
        p: probability with which an element becomes zero; the others are divided by 1 - p.
        training: whether to drop at all.
        backend: ``auto``, ``reference`` or ``cpu``.

    Returns:
        y in shape and dtype of ``x``.

    Raises:
        ValueError: an unknown activation, a probability outside [0, 1), or a backend that does not
            fit.
    """
    if activation not in reference.ACTIVATIONS:
        known = ", ".join(map(repr, reference.ACTIVATIONS))
        raise ValueError(f"activation is {activation!r}; known are {known}")
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p is {p}; wanted a probability of at least 0 and less than 1")
    p = p if training else 0.0
    if not x.numel() or torch.compiler.is_compiling():
        # A compiler fuses the plain formula by itself.
        return reference.apply((x, activation, p))
    return BACKENDS.choose(backend, x.device, (x, activation, p)).apply((x, activation, p))
