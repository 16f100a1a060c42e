"""Selective scan (Mamba-1) with interchangeable backends.

Every backend is a module beside this one with

- ``unavailable() -> str | None``: why it cannot be used on this machine; cheap, builds nothing;
- ``unsupported(arguments) -> str | None``: why a call does not fit, `arguments.ScanArguments`;
- ``prepare() -> str | None``, where it has to be built before its first call: why that failed;
- ``scan(arguments) -> (y, last_state)``: differentiable, of a single way;

and, where its gradients are its own, a ``scan`` that also takes two ways, and outside autograd

- ``forward(arguments, save) -> (y, last_states, saved)``: a last state and a tensor for the
  backward per way, the latter empty unless ``save``;
- ``backward(grad_y, grad_last_states, saved, arguments) -> (grads, grad_z)``.
"""

from ops.selective_scan.arguments import Way
from ops.selective_scan.dispatch import bidirectional_scan_fn, selective_scan_fn

__all__ = ["Way", "bidirectional_scan_fn", "selective_scan_fn"]
