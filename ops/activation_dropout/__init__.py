"""An activation and dropout in one pass over memory, with interchangeable backends.

Every backend is a module beside this one with

- ``unavailable() -> str | None``: why it cannot be used on this machine; cheap, builds nothing;
- ``unsupported((x, activation, p)) -> str | None``: why a call does not fit;
- ``apply((x, activation, p)) -> y``: differentiable.
"""

from ops.activation_dropout.dispatch import activation_dropout_fn

__all__ = ["activation_dropout_fn"]
