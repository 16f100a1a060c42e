"""Makes the ``conv`` of a backend of its ``conv_forward`` and ``conv_backward``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ops import operator
from ops.causal_conv1d.arguments import ConvArguments
from ops.native import empty_like

_PARAMETERS = (
    "Tensor x, Tensor weight, Tensor? bias, str? activation, Tensor? lengths, bool reverse, "
    "Tensor? initial_state, SymInt? reset_every"
)


def register(name: str, conv_forward: Callable, conv_backward: Callable) -> Callable:
    """The differentiable ``conv`` of a backend, whose results are laid out as `empty_like` does.

    Args:
        name: of the operator, ``namespace::name``.
        conv_forward: ``(arguments) -> (y, state)``.
        conv_backward: ``(grad_y, grad_state or None, arguments)``, gives the gradients of x,
            weight, bias and initial_state, None for what was absent.
    """

    def forward(arguments: Sequence, _save: bool) -> tuple[Tensor, Tensor]:
        return conv_forward(ConvArguments(*arguments))

    def backward(grad_y, grad_state, _kept, arguments: Sequence) -> tuple[Tensor | None, ...]:
        return conv_backward(grad_y, grad_state, ConvArguments(*arguments))

    def fake_forward(arguments: Sequence, _save: bool) -> tuple[Tensor, Tensor]:
        x, weight, *_ = arguments
        return empty_like(x), x.new_empty(x.shape[0], x.shape[1], weight.shape[1] - 1)

    call = operator.register(name, _PARAMETERS, forward, backward, fake_forward, new_gradient)

    def conv(arguments: ConvArguments) -> tuple[Tensor, Tensor]:
        """`reference.conv`; differentiable once; one node under torch.compile."""
        return call(*arguments)

    return conv


def new_gradient(x: Tensor) -> Tensor:
    """Memory laid out like the gradient of ``x``: sequences and states keep their layout."""
    return empty_like(x) if x.dim() == 3 else x.new_empty(x.shape)
