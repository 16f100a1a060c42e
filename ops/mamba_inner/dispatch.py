"""The public inner part of a mixer: one node of autograd where the backends allow it."""

from __future__ import annotations

import itertools
from types import ModuleType

from torch import Tensor

from ops.causal_conv1d import triton as triton_conv
from ops.causal_conv1d.arguments import ConvArguments
from ops.causal_conv1d.dispatch import BACKENDS as CONV_BACKENDS
from ops.checks import check_shape, is_observed, normalise_lengths, normalise_reset
from ops.mamba_inner import chunk_cpu, composed, fused
from ops.mamba_inner.arguments import Direction, InnerArguments, check_directions
from ops.selective_scan import triton as triton_scan
from ops.selective_scan.arguments import ScanArguments, Way
from ops.selective_scan.dispatch import BACKENDS as SCAN_BACKENDS


def mamba_inner_fn(
    xz_BTF: Tensor,
    forward: Direction,
    backward: Direction | None = None,
    *,
    lengths: Tensor | None = None,
    conv_state: Tensor | None = None,
    ssm_state: Tensor | None = None,
    chunk_size: int | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Convolution, projections, scan and gate of one or both directions, averaged.

    Args:
        xz_BTF: input and gate (batch, time, 2 E), as ``in_proj`` gives them.
        forward: parameters of the direction from the first frame to the last.
        backward: those of the other direction; None for a causal mixer.
        lengths: valid frames of each item (batch,), integers; the rest influences nothing.
        conv_state: (batch, E, W-1), the inputs of the forward direction before the first frame.
        ssm_state: (batch, E, N), its scan's state there.
        chunk_size: cut the backward direction into chunks of so many frames.
        return_state: whether the states after the last frame are wanted.
        backend: of the scan; the convolution takes the one of that name if there is one.

    Returns:
        y (batch, time, E), zero in padding, and the forward direction's states after each item's
        last valid frame, None unless ``return_state``.

    Raises:
        ValueError: an argument does not fit.
    """
    directions = (forward,) if backward is None else (forward, backward)
    inner, state, taps = check_directions(directions)
    if xz_BTF.dim() != 3 or xz_BTF.shape[-1] != 2 * inner:
        raise ValueError(f"xz has shape {tuple(xz_BTF.shape)}; wanted (batch, time, {2 * inner})")
    batch, time, _ = xz_BTF.shape
    check_shape("ssm_state", ssm_state, (batch, inner, state), "(batch, E, N)")
    check_shape("conv_state", conv_state, (batch, inner, taps - 1), "(batch, E, W-1)")
    arguments = InnerArguments(xz_BTF, directions, lengths, conv_state, ssm_state, chunk_size)
    if _is_short(arguments, backend):
        if conv_state is None:
            conv_state = xz_BTF.new_zeros(batch, inner, taps - 1)
        if ssm_state is None:
            ssm_state = xz_BTF.new_zeros(batch, inner, state)
        outputs = chunk_cpu.chunk(xz_BTF, directions, conv_state, ssm_state)
        return outputs if return_state else (outputs[0], None, None)
    conv_backend = backend if backend in CONV_BACKENDS.names else "auto"
    modules: tuple[ModuleType, ...] = ()
    # Who observes sees the parts; a compiler decides by itself what to keep.
    if xz_BTF.numel() and not is_observed(xz_BTF):
        arguments = arguments._replace(chunk_size=normalise_reset(chunk_size, time))
        modules = _choose(arguments, backend, conv_backend)
        # Triton's kernels clamp by themselves.
        clamp = modules != (triton_scan, triton_conv)
        arguments = arguments._replace(
            lengths=normalise_lengths(lengths, batch, time, xz_BTF.device, clamp)
        )
    if modules and hasattr(modules[0], "backward") and hasattr(modules[1], "conv_backward"):
        outputs = _fused(arguments, *modules)
    else:
        outputs = composed.mamba_inner(arguments, backend, conv_backend)
    return outputs if return_state else (outputs[0], None, None)


def _fused(
    arguments: InnerArguments, scan: ModuleType, conv: ModuleType
) -> tuple[Tensor, Tensor, Tensor]:
    if scan is triton_scan and conv is triton_conv:
        from ops.mamba_inner import fused_triton

        if fused_triton.fits(arguments):
            return fused_triton.mamba_inner(arguments)
    return fused.mamba_inner(arguments, scan, conv)


def _is_short(arguments: InnerArguments, backend: str) -> bool:
    """Whether these are a few frames, of one chunk and all valid, for which there is a kernel."""
    xz_BTF, directions, lengths, conv_state, ssm_state, chunk_size = arguments
    frames = xz_BTF.shape[1]
    return (
        backend == "auto"
        and lengths is None
        and 0 < frames <= chunk_cpu.MAX_FRAMES
        and xz_BTF.shape[0] > 0
        and (chunk_size is None or chunk_size >= frames)
        and chunk_cpu.fits(xz_BTF, conv_state, ssm_state, *itertools.chain(*directions))
    )


def _choose(
    arguments: InnerArguments, scan_backend: str, conv_backend: str
) -> tuple[ModuleType, ModuleType]:
    """The modules that take calls like those to come; of u, B and C only the kind is known yet."""
    direction = arguments.directions[-1]
    # Nobody differentiates by these.
    x_BET, z_BET = arguments._replace(xz_BTF=arguments.xz_BTF.detach()).input_and_gate()
    is_backward = len(arguments.directions) == 2
    convolution = ConvArguments(
        x_BET,
        direction.conv_weight,
        direction.conv_bias,
        "silu",
        arguments.lengths,
        is_backward,
        arguments.conv_state,
        arguments.chunk_size if is_backward else None,
    )
    projection = x_BET[:, None, :1].expand(-1, -1, direction.A_log.shape[1], -1)
    way = Way(
        x_BET,
        x_BET,
        # Like A in what is asked of it, and no exponentials.
        direction.A_log,
        projection,
        projection,
        direction.D,
        direction.dt_bias,
        arguments.ssm_state,
        convolution.reverse,
        convolution.reset_every,
    )
    scan_arguments = ScanArguments((way,), z_BET, True, arguments.lengths)
    scan = SCAN_BACKENDS.choose(scan_backend, x_BET.device, scan_arguments)
    return scan, CONV_BACKENDS.choose(conv_backend, x_BET.device, convolution)
