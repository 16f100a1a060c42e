"""The public selective scan: arguments checked, a backend chosen, the call handed over."""

from __future__ import annotations

from torch import Tensor

from ops.backends import Backends
from ops.checks import check_float_types, check_shape
from ops.selective_scan import chunked, cpu, mamba_ssm, reference, triton
from ops.selective_scan.arguments import normalise, of_one_form

BACKENDS = Backends(
    "selective_scan",
    modules={
        "reference": reference,
        "torch": chunked,
        "cpu": cpu,
        "triton": triton,
        "mamba_ssm": mamba_ssm,
    },
    preference={
        "cpu": ("cpu", "torch"),
        "cuda": ("triton", "mamba_ssm", "torch"),
        None: ("torch",),
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
            follows the environment variable MAMBA_ASR_SCAN, else takes the fastest that fits.

    Returns:
        y (batch, dim, time) in the dtype of ``u``; with ``return_last_state`` also the state after
        the last frame in scan order (batch, dim, state), float32 (float64 for float64 inputs).

    Raises:
        ValueError: an argument does not fit, or the backend asked for cannot take the call.

    Paper: arXiv:2312.00752, section 3.
    """
    arguments = normalise(
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        delta_bias,
        delta_softplus,
        lengths,
        reverse,
        initial_state,
        reset_every,
    )
    # Without a frame or an item there is nothing to be fast at, and kernels need not care.
    name = "reference" if u.numel() == 0 and backend == "auto" else backend
    y, last_state = BACKENDS.choose(name, u.device, arguments).scan(*arguments)
    return (y, last_state) if return_last_state else y


def bidirectional_scan_fn(
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
    *,
    lengths: Tensor | None = None,
    reset_every: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mean of a forward and a backward `selective_scan_fn` that share the gate ``z``.

    Both directions stand in the order of time: the backward one scans each item from its own last
    valid frame, nothing is flipped. ``reset_every`` cuts the backward direction only. A backend
    that offers ``bidirectional_scan`` computes both in one pass where A, B and C have the same
    shapes in both.

    Args:
        lengths: valid frames of each item (batch,).
        reset_every: frames of a block of the backward direction.
        backend: as for `selective_scan_fn`.

    Returns:
        (y_f + y_b) / 2, (batch, dim, time), in the dtype of ``u_f``.

    Raises:
        ValueError: as `selective_scan_fn`.
    """
    check_shape("u_b", u_b, tuple(u_f.shape), "that of u_f")
    check_float_types(u_f.device, u_f=u_f, u_b=u_b)
    forward = normalise(
        u_f, delta_f, A_f, B_f, C_f, D_f, z, delta_bias_f, delta_softplus, lengths, False, None,
        None,
    )  # fmt: skip
    backward = normalise(
        u_b, delta_b, A_b, B_b, C_b, D_b, z, delta_bias_b, delta_softplus, lengths, True, None,
        reset_every,
    )  # fmt: skip
    name = "reference" if u_f.numel() == 0 and backend == "auto" else backend
    module = BACKENDS.choose(name, u_f.device, backward)
    if hasattr(module, "bidirectional_scan") and of_one_form(forward, backward):
        return module.bidirectional_scan(
            u_f, u_b, delta_f, delta_b, A_f, A_b, forward.B, backward.B, forward.C, backward.C,
            D_f, D_b, z, delta_bias_f, delta_bias_b, forward.delta_softplus, forward.lengths,
            backward.reset_every,
        )  # fmt: skip
    return (module.scan(*forward)[0] + module.scan(*backward)[0]) * 0.5
