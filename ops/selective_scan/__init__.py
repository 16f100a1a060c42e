"""Selective scan (Mamba-1) with interchangeable backends.

Every backend is a module beside this one with

- ``unavailable() -> str | None``: why it cannot be used on this machine; cheap, builds nothing;
- ``unsupported(*arguments) -> str | None``: why a call does not fit;
- ``prepare() -> str | None``, where it has to be built before its first call: why that failed;
- ``scan(*arguments) -> (y, last_state)``: differentiable, arguments as `arguments.ScanArguments`;

and, where its gradients are its own, for one way or the mean over two (`arguments.Way`), outside
autograd:

- ``forward(ways, z, softplus, lengths, save) -> (y, last_states, saved)``: a last state and a
  tensor for the backward per way, the latter empty unless ``save``;
- ``backward(grad_y, grad_last_states, saved, ways, z, softplus, lengths) -> (grads, grad_z)``;
- ``bidirectional_scan(...)``: both directions in one pass, differentiable, see
  `dispatch.bidirectional_scan_fn`.
"""

from ops.selective_scan.dispatch import bidirectional_scan_fn, selective_scan_fn

__all__ = ["bidirectional_scan_fn", "selective_scan_fn"]
