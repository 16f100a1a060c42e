"""Makes the ``scan`` of a backend of its ``forward`` and ``backward``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ops import operator
from ops.selective_scan.arguments import ScanArguments, Way

_FIRST_WAY = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias, "
    "Tensor? initial_state, bool reverse, SymInt? reset_every"
)
_SECOND_WAY = (
    "Tensor? u_b, Tensor? delta_b, Tensor? A_b, Tensor? B_b, Tensor? C_b, Tensor? D_b, "
    "Tensor? delta_bias_b, Tensor? initial_state_b, bool? reverse_b, SymInt? reset_every_b"
)
_PARAMETERS = f"{_FIRST_WAY}, {_SECOND_WAY}, Tensor? z, bool softplus, Tensor? lengths"


def register(
    name: str, forward: Callable, backward: Callable, fake_forward: Callable, fake_like: Callable
) -> Callable:
    """The differentiable ``scan`` of a backend, over one way or two, as an operator of torch's.

    Args:
        name: of the operator, ``namespace::name``.
        forward: ``(arguments, save) -> (y, last_states, saved)``.
        backward: ``(grad_y, grad_last_states, saved, arguments) -> (grads, grad_z)``.
        fake_forward: `forward` on tensors without memory.
        fake_like: memory for the gradient of a given tensor, in the layout `backward` gives it.
    """

    def flat_forward(function: Callable) -> Callable:
        def flat(arguments: Sequence, save: bool) -> list[Tensor]:
            y, last_states, saved = function(_join(arguments), save)
            return [y, last_states[0], *saved]

        return flat

    def flat_backward(grad_y, grad_last_state, saved, arguments: Sequence) -> list[Tensor | None]:
        joined = _join(arguments)
        grad_last_states = [grad_last_state, None][: len(joined.ways)]
        grads, grad_z = backward(grad_y, grad_last_states, saved, joined)
        return [*(grad for of_way in grads for grad in of_way), grad_z]

    call = operator.register(
        name, _PARAMETERS, flat_forward(forward), flat_backward, flat_forward(fake_forward),
        fake_like,
    )  # fmt: skip

    def scan(arguments: ScanArguments) -> tuple[Tensor, Tensor]:
        """`reference.scan`, or the mean over two ways; differentiable once; one node."""
        first, *second = arguments.ways
        return call(*first, *(second[0] if second else [None] * len(first)), *arguments[1:])

    return scan


def _join(arguments: Sequence) -> ScanArguments:
    count = len(Way._fields)
    first, second = Way(*arguments[:count]), Way(*arguments[count : 2 * count])
    ways = (first,) if second.u is None else (first, second)
    return ScanArguments(ways, *arguments[2 * count :])
