"""The backend called ``cpu``: C++ with SIMD and torch's threads, forward and backward.

Compiled at first use (`ops.build`). Registered as torch operators, so that torch.compile and
torch.export see one node.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ops import build
from ops.native import NativeTensor, address, empty_like, float32, native, unsupported_types
from ops.selective_scan.arguments import ScanArguments, Way, WayGradients
from ops.selective_scan.operator import register

_kernel = build.Kernel(Path(__file__).with_name("cpu.cpp"))
unavailable, prepare = _kernel.unavailable, _kernel.prepare
# Elements of (batch, dim, time, state) that are worth another thread: it takes a while to wake up.
_THREAD_ELEMENTS = 1 << 18
# Channels of a unit of work: with float32 and the kernel's tile they stay in a small L2 cache.
_UNIT_CHANNELS = 256


class _Direction(ctypes.Structure):
    _fields_ = [
        *((name, NativeTensor) for name in ("u", "delta", "B", "C")),
        *(
            (name, ctypes.c_void_p)
            for name in ("A", "D", "delta_bias", "initial_state", "last_state", "checkpoints")
        ),
        ("reverse", ctypes.c_int64),
        ("reset_every", ctypes.c_int64),
        *((name, NativeTensor) for name in ("du", "ddelta", "dB", "dC")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "dlast_state",
                "dinitial_state",
                "dA",
                "dB_constant",
                "dC_constant",
                "dD",
                "ddelta_bias",
            )
        ),
    ]


class _Scan(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "dim", "state", "frames", "groups")),
        *((name, ctypes.c_int64) for name in ("B_varies", "C_varies", "softplus")),
        ("lengths", ctypes.c_void_p),
        *((name, NativeTensor) for name in ("z", "out", "dout", "dz")),
        *((name, ctypes.c_int64) for name in ("directions", "channels_per_unit", "threads")),
        ("parallel_for", ctypes.c_void_p),
        ("direction", _Direction * 2),
    ]


class _Layout(NamedTuple):
    frames: int  # between two checkpoints
    channels: int  # of a vector
    states: int  # that run together


@functools.cache
def _layout(functions: ctypes.CDLL) -> _Layout:
    sizes = [ctypes.c_int64() for _ in _Layout._fields]
    functions.selective_scan_layout(*(ctypes.byref(size) for size in sizes))
    return _Layout(*(size.value for size in sizes))


def unsupported(arguments: ScanArguments) -> str | None:
    """Why a call does not fit, if so."""
    return unsupported_types(arguments.z, *(x for way in arguments.ways for x in way[:8]))


def forward(arguments: ScanArguments, save: bool) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The scan in one direction, or the mean over two.

    Returns:
        y, and for each way the last state and the checkpoints that `backward` wants, empty unless
        ``save``.
    """
    functions, scan, kept = _describe(arguments)
    y, last_states, checkpoints = _new_outputs(arguments, save)
    scan.out = native(y)
    scan.channels_per_unit = _channels_per_unit(scan, _layout(functions), scan.dim // scan.groups)
    for target, last_state, saved in zip(scan.direction, last_states, checkpoints, strict=False):
        target.last_state = address(last_state)
        target.checkpoints = address(saved) if save else None
    functions.selective_scan_forward(ctypes.byref(scan))
    del kept
    return y, last_states, checkpoints


def backward(
    dy: Tensor,
    dlast_states: list[Tensor | None],
    checkpoints: list[Tensor],
    arguments: ScanArguments,
) -> tuple[list[WayGradients], Tensor | None]:
    """Gradients of everything in ``ways``, and of ``z``."""
    functions, scan, kept = _describe(arguments)
    layout = _layout(functions)
    group_dim = scan.dim // scan.groups
    dz = None if arguments.z is None else empty_like(arguments.z)
    scan.dout, scan.dz = native(dy), native(dz)
    # Each part holds dB and dC of all frames: together they stay below half of u's size.
    most = max(1, int(0.4 * group_dim / (2 * scan.state)))
    scan.channels_per_unit = _channels_per_unit(scan, layout, group_dim, most)
    targets = []
    for way, target, dlast_state, saved in zip(
        arguments.ways, scan.direction, dlast_states, checkpoints, strict=False
    ):
        kept.append(float32(dlast_state))
        target.checkpoints, target.dlast_state = address(saved), address(kept[-1])
        targets.append(_Targets(way, scan, layout))
        targets[-1].point(target)
    functions.selective_scan_backward(ctypes.byref(scan))
    del kept
    return [target.gradients() for target in targets], dz


class _Targets:
    """What the backward of one way writes: gradients, and parts of gradients to be added up."""

    def __init__(self, way: Way, scan: _Scan, layout: _Layout):
        self.way, self.groups = way, scan.groups
        group_dim = scan.dim // scan.groups
        padded_dim = scan.groups * _padded(group_dim, layout.channels)
        per_state = (scan.batch, _padded(scan.state, layout.states), padded_dim)
        parts = -(-group_dim // scan.channels_per_unit)
        self.du, self.ddelta = empty_like(way.u), empty_like(way.delta)
        self.by_item = {
            name: way.u.new_empty(shape, dtype=torch.float32)
            for name, wanted, shape in (
                ("dinitial_state", way.initial_state is not None, (*way.u.shape[:2], scan.state)),
                ("dA", True, per_state),
                ("dB_constant", way.B.dim() == 2, per_state),
                ("dC_constant", way.C.dim() == 2, per_state),
                ("dD", way.D is not None, (scan.batch, padded_dim)),
                ("ddelta_bias", way.delta_bias is not None, (scan.batch, padded_dim)),
            )
            if wanted
        }
        self.by_part = {
            name: _empty_parts(projection, parts)
            for name, projection in (("dB", way.B), ("dC", way.C))
            if projection.dim() == 4
        }

    def point(self, target: _Direction) -> None:
        """Enters the addresses into the call."""
        target.du, target.ddelta = native(self.du), native(self.ddelta)
        for name, x in self.by_item.items():
            setattr(target, name, address(x))
        for name, x in self.by_part.items():
            setattr(target, name, native(x, "part batch group channel frame"))

    def gradients(self) -> WayGradients:
        """The sums, always added in the same order, in the types of what they are gradients of."""
        way = self.way
        return WayGradients(
            self.du,
            self.ddelta,
            self._per_channel("dA", way.A),
            self._projection("dB", way.B),
            self._projection("dC", way.C),
            None if way.D is None else self._per_channel("dD", way.D),
            None if way.delta_bias is None else self._per_channel("ddelta_bias", way.delta_bias),
            None
            if way.initial_state is None
            else _new_gradient(way.initial_state).copy_(self.by_item["dinitial_state"]),
        )

    def _per_channel(self, name: str, like: Tensor) -> Tensor:
        group_dim = like.shape[0] // self.groups
        total = self.by_item[name].sum(0).unflatten(-1, (self.groups, -1))[..., :group_dim]
        total = total.flatten(-2)
        if like.dim() == 2:
            total = total[: like.shape[1]].T
        return total.to(like.dtype).contiguous()

    def _projection(self, name: str, like: Tensor) -> Tensor:
        if like.dim() == 2:
            return self._per_channel(f"{name}_constant", like)
        parts = self.by_part[name]
        return parts[0] if len(parts) == 1 else _new_gradient(like).copy_(parts.sum(0))


def _new_outputs(arguments: ScanArguments, save: bool) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    layout = _layout(_kernel.load())
    u = arguments.ways[0].u
    batch, dim, frames = u.shape
    y = empty_like(u)
    last_states, checkpoints = [], []
    for way in arguments.ways:
        state = way.A.shape[1]
        last_states.append(u.new_empty(batch, dim, state, dtype=torch.float32))
        groups = _num_groups(way)
        shape = _checkpoint_shape(layout, batch, frames, state, groups, dim) if save else (0,)
        checkpoints.append(u.new_empty(shape, dtype=torch.float32))
    return y, last_states, checkpoints


def _new_gradient(x: Tensor) -> Tensor:
    """Memory laid out like the gradient of ``x``: sequences and states keep their layout."""
    return empty_like(x) if x.dim() > 2 else x.new_empty(x.shape)


scan = register("mamba_asr::selective_scan_cpu", forward, backward, _new_outputs, _new_gradient)


def _num_groups(way: Way) -> int:
    return next((x.shape[1] for x in (way.B, way.C) if x.dim() == 4), 1)


def _describe(arguments: ScanArguments) -> tuple[ctypes.CDLL, _Scan, list[Tensor | None]]:
    """The kernel, the call without what it writes, and the tensors that must outlive it."""
    ways, z, softplus, lengths = arguments
    first = ways[0]
    scan = _Scan()
    scan.batch, scan.dim, scan.frames = first.u.shape
    scan.state = first.A.shape[1]
    scan.groups = _num_groups(first)
    scan.B_varies, scan.C_varies = first.B.dim() == 4, first.C.dim() == 4
    scan.softplus = softplus
    scan.lengths = address(lengths)
    scan.z = native(z)
    scan.directions = len(ways)
    work = scan.batch * scan.dim * scan.frames * scan.state * scan.directions
    scan.threads = min(torch.get_num_threads(), 1 + work // _THREAD_ELEMENTS)
    scan.parallel_for = build.parallel_for_address()
    kept: list[Tensor | None] = []
    for way, target in zip(ways, scan.direction, strict=False):
        target.u, target.delta = native(way.u), native(way.delta)
        for name in ("B", "C"):
            projection = getattr(way, name)
            if projection.dim() == 4:
                setattr(target, name, native(projection, "batch group channel frame"))
            else:
                kept.append(float32(projection))
                setattr(target, name, native(kept[-1], "channel frame"))
        for name in ("A", "D", "delta_bias", "initial_state"):
            kept.append(float32(getattr(way, name)))
            setattr(target, name, address(kept[-1]))
        target.reverse = way.reverse
        target.reset_every = way.reset_every or 0
    return _kernel.load(), scan, kept


def _padded(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _checkpoint_shape(
    layout: _Layout, batch: int, frames: int, state: int, groups: int, dim: int
) -> tuple[int, int, int, int]:
    return (
        batch,
        -(-frames // layout.frames),
        _padded(state, layout.states),
        groups * _padded(dim // groups, layout.channels),
    )


def _channels_per_unit(
    scan: _Scan, layout: _Layout, group_dim: int, most_parts: int | None = None
) -> int:
    """Channels of a unit, such that units are small and every thread gets several of them."""
    parts = -(-group_dim // _UNIT_CHANNELS)
    busy = -(-4 * torch.get_num_threads() // max(1, scan.batch * scan.groups))
    if busy > parts:
        parts = busy if most_parts is None else max(parts, min(busy, most_parts))
    return _padded(max(1, -(-group_dim // max(1, parts))), layout.channels)


def _empty_parts(projection: Tensor, parts: int) -> Tensor:
    """Room for the parts of dB or dC: float32 to be summed, or the gradient itself if it is one."""
    if parts == 1:
        return empty_like(projection).unsqueeze(0)
    batch, groups, state, frames = projection.shape
    shape = (parts, batch, groups, frames, state)
    if projection.stride(-2) == 1:
        return projection.new_empty(shape, dtype=torch.float32).transpose(-1, -2)
    return projection.new_empty((*shape[:3], state, frames), dtype=torch.float32)
