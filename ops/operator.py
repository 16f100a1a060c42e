"""Makes a torch operator of a backend's forward and backward: one node, with gradients.

torch.compile and torch.export see the operator, not what it does. Calls that nobody watches go past
it: what torch does around an operator written in Python takes as long as what a GPU does in it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ops.checks import is_observed
from ops.native import without_views


def register(
    name: str,
    parameters: str,
    forward: Callable,
    backward: Callable,
    fake_forward: Callable,
    fake_like: Callable,
) -> Callable:
    """A differentiable ``(*arguments) -> (y, state)``; y has the shape of the first argument.

    Args:
        name: of the operator, ``namespace::name``.
        parameters: what ``arguments`` are, as torch's schemas say it.
        forward: ``(arguments, save) -> (y, state, *kept)``; ``kept`` tensors are for the backward
            and may be empty unless ``save``.
        backward: ``(grad_y, grad_state or None, kept, arguments)``, gives the gradients of all
            floating-point tensors among the arguments, in their order, and None wherever it likes.
        fake_forward: `forward` on tensors without memory.
        fake_like: memory for the gradient of a given tensor, in the layout `backward` gives it.
    """

    @torch.library.custom_op(name, mutates_args=(), schema=f"({parameters}, bool save) -> Tensor[]")
    def operator(*arguments_and_save):
        *arguments, save = arguments_and_save
        return list(forward(arguments, save))

    @operator.register_fake
    def _(*arguments_and_save):
        *arguments, save = arguments_and_save
        return list(fake_forward(arguments, save))

    @torch.library.custom_op(
        f"{name}_backward",
        mutates_args=(),
        schema=f"(Tensor grad_y, Tensor? grad_state, Tensor[] kept, {parameters}) -> Tensor[]",
    )
    def backward_operator(grad_y, grad_state, kept, *arguments):
        grads = backward(grad_y, grad_state, kept, arguments)
        # What comes out of an operator has memory of its own, parameters' in order.
        return [
            grad.clone(memory_format=torch.contiguous_format) if grad.dim() < 3 else grad
            for grad in grads
            if grad is not None
        ]

    @backward_operator.register_fake
    def _(grad_y, grad_state, kept, *arguments):
        return [fake_like(x) for x in arguments if _has_gradient(x)]

    def setup_context(ctx, inputs, output):
        *arguments, ctx.save = inputs
        ctx.others = [None if isinstance(x, Tensor) else x for x in arguments]
        tensors = [x if isinstance(x, Tensor) else None for x in arguments]
        ctx.save_for_backward(*tensors, *output[2:])
        ctx.set_materialize_grads(False)

    def autograd_backward(ctx, grad_outputs):
        if not ctx.save:
            raise RuntimeError(f"{name} ran without keeping what its gradient needs")
        grad_y, grad_state, *_ = grad_outputs
        grad_y, arguments, kept = _saved(ctx, grad_y)
        grads = iter(backward_operator(grad_y, grad_state, kept, *arguments))
        return *(next(grads) if _has_gradient(x) else None for x in arguments), None

    operator.register_autograd(autograd_backward, setup_context=setup_context)

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *arguments):
            y, state, *kept = forward(arguments, True)
            ctx.others = [None if isinstance(x, Tensor) else x for x in arguments]
            tensors = [x if isinstance(x, Tensor) else None for x in arguments]
            ctx.save_for_backward(*tensors, *kept)
            ctx.set_materialize_grads(False)
            return without_views(y, state)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad_y, grad_state):
            grad_y, arguments, kept = _saved(ctx, grad_y)
            grads = backward(grad_y, grad_state, kept, arguments)
            found = iter(grad for grad in grads if grad is not None)
            return tuple(next(found) if _has_gradient(x) else None for x in arguments)

    def call(*arguments) -> tuple[Tensor, Tensor]:
        save = _wants_gradient(arguments)
        if is_observed(arguments[0]):
            y, state, *_ = operator(*arguments, save)
        elif save:
            y, state = Node.apply(*arguments)
        else:
            with torch.no_grad():
                y, state, *_ = forward(arguments, False)
        return y, state

    return call


def _saved(ctx, grad_y: Tensor | None) -> tuple[Tensor, list, list[Tensor]]:
    """The gradient of y, zeros for None, the arguments and what was kept."""
    # Once: recomputed tensors are handed out a single time.
    saved = ctx.saved_tensors
    tensors, kept = saved[: len(ctx.others)], list(saved[len(ctx.others) :])
    arguments = [other if x is None else x for x, other in zip(tensors, ctx.others, strict=True)]
    if grad_y is None:
        grad_y = arguments[0].new_zeros(()).expand(arguments[0].shape)
    return grad_y, arguments, kept


def _has_gradient(argument: object) -> bool:
    return isinstance(argument, Tensor) and argument.is_floating_point()


def _wants_gradient(arguments: tuple) -> bool:
    # An exported program has no gradient, and what is kept for one would tie it to a length. While
    # torch 2.11 compiles, it calls that exporting, too.
    exporting = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
    if exporting or not torch.is_grad_enabled():
        return False
    return any(isinstance(x, Tensor) and x.requires_grad for x in arguments)
