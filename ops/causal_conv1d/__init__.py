"""Causal depthwise convolution with interchangeable backends.

Every backend is a module beside this one with

- ``unavailable() -> str | None``: why it cannot be used on this machine; cheap, builds nothing;
- ``unsupported(arguments) -> str | None``: why a call does not fit, `arguments.ConvArguments`;
- ``prepare() -> str | None``, where it has to be built before its first call: why that failed;
- ``conv(arguments) -> (y, state)``: differentiable;

and, where its gradients are its own,

- ``conv_forward(arguments) -> (y, state)``: the same without autograd;
- ``conv_backward(grad_y, grad_state or None, arguments)``: the gradients of x, weight, bias and
  initial_state, None for what was absent.
"""

from ops.causal_conv1d.dispatch import causal_conv1d_fn

__all__ = ["causal_conv1d_fn"]
