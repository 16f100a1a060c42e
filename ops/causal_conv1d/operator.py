"""Makes torch operators of a backend's ``conv_forward`` and ``conv_backward``: one node each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ops.native import empty_like


def register(name: str, conv_forward: Callable, conv_backward: Callable) -> Callable:
    """The differentiable ``conv`` of a backend whose outputs are laid out as `empty_like` does.

    Args:
        name: of the operator, ``namespace::name``.
        conv_forward: arguments as `ConvArguments`, gives (y, state).
        conv_backward: ``(grad_y, grad_state or None, *arguments)``, gives the gradients of x,
            weight, bias and initial_state, None for what was absent.
    """

    @torch.library.custom_op(name, mutates_args=())
    def operator(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: str | None,
        lengths: Tensor | None,
        reverse: bool,
        initial_state: Tensor | None,
        reset_every: int | None,
    ) -> tuple[Tensor, Tensor]:
        return conv_forward(
            x, weight, bias, activation, lengths, reverse, initial_state, reset_every
        )

    @operator.register_fake
    def _(x, weight, *_rest):
        return empty_like(x), x.new_empty(x.shape[0], x.shape[1], weight.shape[1] - 1)

    @torch.library.custom_op(f"{name}_backward", mutates_args=())
    def backward_operator(
        grad_y: Tensor,
        grad_state: Tensor | None,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: str | None,
        lengths: Tensor | None,
        reverse: bool,
        initial_state: Tensor | None,
        reset_every: int | None,
    ) -> list[Tensor]:
        grads = conv_backward(
            grad_y, grad_state, x, weight, bias, activation, lengths, reverse, initial_state,
            reset_every,
        )  # fmt: skip
        # An operator returns tensors only; what is absent is empty here and None for autograd.
        return [x.new_empty(0) if grad is None else grad for grad in grads]

    @backward_operator.register_fake
    def _(grad_y, grad_state, x, weight, bias, activation, lengths, reverse, initial_state, _reset):
        parameters = (weight, bias, initial_state)
        return [
            empty_like(x),
            *(x.new_empty(0) if p is None else p.new_empty(p.shape) for p in parameters),
        ]

    def setup_context(ctx, inputs, output):
        x, weight, bias, ctx.activation, lengths, ctx.reverse, initial_state, ctx.reset_every = (
            inputs
        )
        ctx.save_for_backward(x, weight, bias, initial_state, lengths)
        ctx.set_materialize_grads(False)

    def autograd_backward(ctx, grad_y, grad_state):
        x, weight, bias, initial_state, lengths = ctx.saved_tensors
        if grad_y is None:
            grad_y = x.new_zeros(()).expand(x.shape)
        grad_x, grad_weight, grad_bias, grad_initial = backward_operator(
            grad_y, grad_state, x, weight, bias, ctx.activation, lengths, ctx.reverse,
            initial_state, ctx.reset_every,
        )  # fmt: skip
        grad_bias = None if bias is None else grad_bias
        grad_initial = None if initial_state is None else grad_initial
        return grad_x, grad_weight, grad_bias, None, None, None, grad_initial, None

    operator.register_autograd(autograd_backward, setup_context=setup_context)

    def conv(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: str | None,
        lengths: Tensor | None,
        reverse: bool,
        initial_state: Tensor | None,
        reset_every: int | None,
    ) -> tuple[Tensor, Tensor]:
        """`reference.conv`; differentiable once; one node under torch.compile."""
        return operator(x, weight, bias, activation, lengths, reverse, initial_state, reset_every)

    return conv
