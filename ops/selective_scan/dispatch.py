"""The public selective scan: arguments checked, a backend chosen, the call handed over."""

from __future__ import annotations

from torch import Tensor

from ops.backends import Backends
from ops.selective_scan import chunked, cpu, mamba_ssm, reference, triton
from ops.selective_scan.arguments import ScanArguments, Way, normalise, of_one_form

BACKENDS = Backends(
    "selective_scan",
    modules={
        "reference": reference,
        "torch": chunked,
        "cpu": cpu,
        "triton": triton,
        "mamba_ssm": mamba_ssm,
    },
    # The last is for what torch.func transforms.
    preference={
        "cpu": ("cpu", "torch", "reference"),
        "cuda": ("triton", "mamba_ssm", "torch", "reference"),
        None: ("torch", "reference"),
    },
)


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    lengths: Tensor | None = None,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    reset_every: int | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective scan h = exp(dt A) h + dt B u, y = (C h + D u) silu(z), frame by frame.

    The positional part has the signature, layout and meaning of mamba_ssm's function of this name.
    Memory order is free: (batch, time, dim) passed as a transposed view is read without a copy.

    Args:
        u: input (batch, dim, time), float16, bfloat16 or float32; float64 if everything is.
        delta: step sizes (batch, dim, time), before ``delta_bias`` and softplus.
        A: decay rates (dim, state), real and negative.
        B: input weights, (dim, state) or (batch, [groups,] state, time).
        C: output weights, shaped like B or independently of it.
        D: direct path (dim,).
        z: gate (batch, dim, time); the output is multiplied by silu(z).
        delta_bias: (dim,), added to ``delta``.
        delta_softplus: whether dt = softplus(delta + delta_bias) instead of the sum itself.
        return_last_state: return (y, last state).
        lengths: valid frames of each item (batch,), integers. Frames at and after an item's length
            influence nothing, whatever they hold; their outputs are zero.
        reverse: scan every item from its last valid frame to its first.
        initial_state: (batch, dim, state), the state before the first frame in scan order.
        reset_every: cut time into blocks [0, k), [k, 2k), ... that no state enters or leaves; an
            initial state enters the block that is scanned first.
        backend: ``auto``, ``reference``, ``torch``, ``cpu``, ``triton`` or ``mamba_ssm``. ``auto``
            follows the environment variable MAMBA_ASR_SCAN, else takes the fastest that fits,
            and what torch.func transforms goes to ``reference``.

    Returns:
        y (batch, dim, time) in the dtype of ``u``; with ``return_last_state`` also the state after
        the last frame in scan order (batch, dim, state), float32 (float64 for float64 inputs).

    Raises:
        ValueError: an argument does not fit, or the backend asked for cannot take the call.

    Paper: arXiv:2312.00752, section 3.
    """
    way = Way(u, delta, A, B, C, D, delta_bias, initial_state, reverse, reset_every)
    y, last_state = scan(ScanArguments((way,), z, delta_softplus, lengths), backend)
    return (y, last_state) if return_last_state else y


def bidirectional_scan_fn(
    forward: Way,
    backward: Way,
    z: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    lengths: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mean of two scans that share the gate ``z``, one of them in ``reverse``.

    Both directions stand in the order of time: the backward one scans each item from its own last
    valid frame, nothing is flipped. A backend with gradients of its own computes both in one pass
    where A, B and C have the same shapes in both.

    Args:
        forward: arguments of `selective_scan_fn` that are the first direction's own.
        backward: those of the second one.
        lengths: valid frames of each item (batch,).
        backend: as for `selective_scan_fn`.

    Returns:
        (y_f + y_b) / 2, (batch, dim, time), in the dtype of the first direction's u.

    Raises:
        ValueError: as `selective_scan_fn`.
    """
    return scan(ScanArguments((forward, backward), z, delta_softplus, lengths), backend)[0]


def scan(arguments: ScanArguments, backend: str) -> tuple[Tensor, Tensor]:
    """Output over one way or mean over two, and the last state of the first."""
    arguments = normalise(arguments)
    u = arguments.ways[0].u
    # Without a frame or an item there is nothing to be fast at, and kernels need not care.
    name = "reference" if u.numel() == 0 and backend == "auto" else backend
    module = BACKENDS.choose(name, u.device, arguments)
    if len(arguments.ways) == 1 or (hasattr(module, "backward") and of_one_form(arguments.ways)):
        return module.scan(arguments)
    (y_f, last_state), (y_b, _) = (
        module.scan(arguments._replace(ways=(way,))) for way in arguments.ways
    )
    return (y_f + y_b) * 0.5, last_state
