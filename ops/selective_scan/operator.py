"""Makes torch operators of a backend's ``forward`` and ``backward``: one node, with gradients.

torch.compile and torch.export see the operator, not what it does. Both directions of a
bidirectional scan are arguments of the same operator.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ops.selective_scan.arguments import Way

_NUM_TENSORS = 16  # seven of each way, z and initial_state


def register(
    name: str, forward: Callable, backward: Callable, fake_forward: Callable, fake_like: Callable
) -> tuple[Callable, Callable]:
    """The differentiable ``scan`` and ``bidirectional_scan`` of a backend.

    Args:
        name: of the operator, ``namespace::name``.
        forward: ``(ways, z, softplus, lengths, save) -> (y, last_states, saved)``.
        backward: ``(grad_y, grad_last_states, saved, ways, z, softplus, lengths) ->
            (grads, grad_z)``.
        fake_forward: `forward` on tensors without memory.
        fake_like: memory for the gradient of a given tensor, in the layout `backward` gives it.
    """

    @torch.library.custom_op(name, mutates_args=())
    def operator(
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        delta_bias: Tensor | None,
        u_b: Tensor | None,
        delta_b: Tensor | None,
        A_b: Tensor | None,
        B_b: Tensor | None,
        C_b: Tensor | None,
        D_b: Tensor | None,
        delta_bias_b: Tensor | None,
        z: Tensor | None,
        initial_state: Tensor | None,
        softplus: bool,
        lengths: Tensor | None,
        reverse: bool,
        reset_every: int | None,
        reset_every_b: int | None,
        save: bool,
    ) -> list[Tensor]:
        tensors = (
            u, delta, A, B, C, D, delta_bias, u_b, delta_b, A_b, B_b, C_b, D_b, delta_bias_b, z,
            initial_state,
        )  # fmt: skip
        ways = _ways(tensors, reverse, reset_every, reset_every_b)
        y, last_states, saved = forward(ways, z, softplus, lengths, save)
        return [y, last_states[0], *saved]

    @operator.register_fake
    def _(*arguments):
        *tensors, softplus, lengths, reverse, reset_every, reset_every_b, save = arguments
        ways = _ways(tensors, reverse, reset_every, reset_every_b)
        y, last_states, saved = fake_forward(ways, tensors[14], softplus, lengths, save)
        return [y, last_states[0], *saved]

    @torch.library.custom_op(f"{name}_backward", mutates_args=())
    def backward_operator(
        grad_y: Tensor,
        grad_last_state: Tensor | None,
        saved: list[Tensor],
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        delta_bias: Tensor | None,
        u_b: Tensor | None,
        delta_b: Tensor | None,
        A_b: Tensor | None,
        B_b: Tensor | None,
        C_b: Tensor | None,
        D_b: Tensor | None,
        delta_bias_b: Tensor | None,
        z: Tensor | None,
        initial_state: Tensor | None,
        softplus: bool,
        lengths: Tensor | None,
        reverse: bool,
        reset_every: int | None,
        reset_every_b: int | None,
    ) -> list[Tensor]:
        tensors = (
            u, delta, A, B, C, D, delta_bias, u_b, delta_b, A_b, B_b, C_b, D_b, delta_bias_b, z,
            initial_state,
        )  # fmt: skip
        ways = _ways(tensors, reverse, reset_every, reset_every_b)
        grads, grad_z = backward(
            grad_y, [grad_last_state, None][: len(ways)], saved, ways, z, softplus, lengths
        )
        found = [*grads[0][:7], *(grads[1][:7] if len(grads) == 2 else [None] * 7)]
        # An operator returns tensors only; what is absent is empty here and None for autograd.
        found += [grad_z, grads[0].initial_state]
        return [grad_y.new_empty(0) if grad is None else grad for grad in found]

    @backward_operator.register_fake
    def _(grad_y, grad_last_state, saved, *rest):
        return [grad_y.new_empty(0) if x is None else fake_like(x) for x in rest[:_NUM_TENSORS]]

    def setup_context(ctx, inputs, output):
        *tensors, ctx.softplus, lengths, ctx.reverse, ctx.reset_every, ctx.reset_every_b, _ = inputs
        ctx.save = inputs[-1]
        ctx.save_for_backward(*tensors, lengths, *output[2:])
        ctx.set_materialize_grads(False)

    def autograd_backward(ctx, grad_outputs):
        if not ctx.save:
            raise RuntimeError("the scan ran without keeping what its gradient needs")
        grad_y, grad_last_state, *_ = grad_outputs
        *tensors_and_lengths, lengths = ctx.saved_tensors[: _NUM_TENSORS + 1]
        if grad_y is None:
            grad_y = tensors_and_lengths[0].new_zeros(()).expand(tensors_and_lengths[0].shape)
        grads = backward_operator(
            grad_y, grad_last_state, list(ctx.saved_tensors[_NUM_TENSORS + 1 :]),
            *tensors_and_lengths, ctx.softplus, lengths, ctx.reverse, ctx.reset_every,
            ctx.reset_every_b,
        )  # fmt: skip
        grads = [
            None if x is None else grad for x, grad in zip(tensors_and_lengths, grads, strict=True)
        ]
        return *grads, None, None, None, None, None, None

    operator.register_autograd(autograd_backward, setup_context=setup_context)

    def scan(
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        delta_bias: Tensor | None,
        delta_softplus: bool,
        lengths: Tensor | None,
        reverse: bool,
        initial_state: Tensor | None,
        reset_every: int | None,
    ) -> tuple[Tensor, Tensor]:
        """`reference.scan`; differentiable once; one node under torch.compile."""
        tensors = (u, delta, A, B, C, D, delta_bias, *[None] * 7, z, initial_state)
        y, last_state, *_ = operator(
            *tensors, delta_softplus, lengths, reverse, reset_every, None, _wants_gradient(tensors)
        )
        return y, last_state

    def bidirectional_scan(
        u_f: Tensor,
        u_b: Tensor,
        delta_f: Tensor,
        delta_b: Tensor,
        A_f: Tensor,
        A_b: Tensor,
        B_f: Tensor,
        B_b: Tensor,
        C_f: Tensor,
        C_b: Tensor,
        D_f: Tensor | None,
        D_b: Tensor | None,
        z: Tensor | None,
        delta_bias_f: Tensor | None,
        delta_bias_b: Tensor | None,
        delta_softplus: bool,
        lengths: Tensor | None,
        reset_every: int | None,
    ) -> Tensor:
        """`dispatch.bidirectional_scan_fn` in one pass; differentiable once; one node."""
        tensors = (
            u_f, delta_f, A_f, B_f, C_f, D_f, delta_bias_f,
            u_b, delta_b, A_b, B_b, C_b, D_b, delta_bias_b, z, None,
        )  # fmt: skip
        return operator(
            *tensors, delta_softplus, lengths, False, None, reset_every, _wants_gradient(tensors)
        )[0]

    return scan, bidirectional_scan


def _ways(tensors, reverse: bool, reset_every: int | None, reset_every_b: int | None) -> list[Way]:
    """The operator's tensors by direction; the second one, where there is one, runs backward."""
    ways = [Way(*tensors[:7], reverse, tensors[15], reset_every)]
    if tensors[7] is not None:
        ways.append(Way(*tensors[7:14], True, None, reset_every_b))
    return ways


def _wants_gradient(tensors) -> bool:
    # An exported program has no gradient, and what is kept for one would tie it to a length.
    if torch.compiler.is_exporting():
        return False
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
