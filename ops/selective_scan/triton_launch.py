"""Prepares memory for the Triton kernels of the scan, chooses block sizes, launches."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple, overload

import torch
import triton
from torch import Tensor

from ops.native import empty_like, float32
from ops.selective_scan.arguments import ScanArguments, Way, WayGradients
from ops.selective_scan.triton_backward import (
    WayGradientPointers,
    selective_scan_backward_kernel,
)
from ops.selective_scan.triton_forward import selective_scan_forward_kernel
from ops.selective_scan.triton_rows import TILE, WARP, WayPointers, pack_projection_kernel
from ops.triton_sequences import Sequence

# States that a thread of the forward keeps in registers.
_STATES_PER_THREAD = 16
# A program takes as many blocks of `reset_every` frames as hold this many: each leaves a part of
# the gradient of A, and the parts together must stay small against the inputs.
_FRAMES_PER_PROGRAM = 256
_PACKED_FRAMES = 64


def launch_forward(
    arguments: ScanArguments,
    y: Tensor,
    last_states: list[Tensor],
    states: list[Tensor] | None,
) -> None:
    """Fills ``y``, ``last_states`` and, unless None, ``states``; see `triton.forward`."""
    ways, z, softplus, lengths = arguments
    for launch in _launches(ways, lengths):
        call = launch.call
        channels = _forward_channels(call)
        first, second = _pair(
            call.pointers(ways[i], last_states[i], states[i] if states else None)
            for i in launch.ways
        )
        with torch.cuda.device_of(y):
            selective_scan_forward_kernel[call.grid(channels)](
                first, second, _sequence(z), _sequence(y), lengths, *launch.sizes(),
                STATES=triton.next_power_of_2(call.num_states), CHANNELS=channels,
                **launch.constants(channels, softplus, z, y), num_warps=1,
            )  # fmt: skip


def launch_backward(
    grad_y: Tensor,
    grad_last_states: list[Tensor | None],
    states: list[Tensor],
    arguments: ScanArguments,
) -> tuple[list[WayGradients], Tensor | None]:
    """See `triton.backward`."""
    ways, z, softplus, lengths = arguments
    grads = []
    grad_z = None if z is None else empty_like(z)
    for launch in _launches(ways, lengths):
        call = launch.call
        grid = call.grid(WARP.value)
        split = _backward_split(call, grid)
        parts = [_GradientParts(call, grid, ways[i], grad_last_states[i]) for i in launch.ways]
        first, second = _pair(call.pointers(ways[i], None, states[i]) for i in launch.ways)
        with torch.cuda.device_of(grad_y):
            selective_scan_backward_kernel[grid](
                first, second, *_pair(part.pointers() for part in parts), _sequence(z),
                _sequence(grad_y), _sequence(grad_z), lengths, *launch.sizes(), SPLIT=split,
                **launch.constants(WARP.value, softplus, z, grad_y), num_warps=split,
            )  # fmt: skip
        grads += [part.collect() for part in parts]
    return grads, grad_z


class _Launch(NamedTuple):
    """Ways that go through a kernel together."""

    call: _Call
    ways: tuple[int, ...]
    scale: float

    def sizes(self) -> tuple:
        """The arguments of a kernel from ``time`` to ``output_scale``."""
        call, of_each = self.call, [self.call.ways[0], self.call.ways[-1]]
        return (
            call.time,
            call.dim,
            call.groups,
            *(int(way.reverse) for way in of_each),
            *(call.block_frames(way) for way in of_each),
            call.blocks_per_program,
            int(self._adds()),
            self.scale,
        )

    def constants(self, channels: int, softplus: bool, *shared: Tensor | None) -> dict:
        """What kernels are compiled for; ``shared`` are sequences that belong to no way."""
        both = len(self.ways) == 2
        return self.call.constants(channels, softplus, *shared) | {
            "BOTH": both,
            "ADD": both or self._adds(),
        }

    def _adds(self) -> bool:
        return self.ways[0] > 0


def _launches(ways: tuple[Way, ...], lengths: Tensor | None) -> list[_Launch]:
    scale = 1 / len(ways)
    if len(ways) == 1 or _alike(*ways):
        return [_Launch(_Call(ways, lengths), tuple(range(len(ways))), scale)]
    return [_Launch(_Call((way,), lengths), (i,), scale) for i, way in enumerate(ways)]


def _alike(first: Way, second: Way) -> bool:
    """Whether two ways can go through the same code, which knows one set of strides and parts."""

    def parts(way: Way) -> tuple:
        types = way.u.dtype, way.delta.dtype
        present = way.D is not None, way.delta_bias is not None
        return way.u.stride(), way.delta.stride(), types, present

    return parts(first) == parts(second) and second.initial_state is None


def _forward_channels(call: _Call) -> int:
    """Channels of a program: of a warp's lanes, those that are left hold further states."""
    states = triton.next_power_of_2(call.num_states)
    channels = max(1, min(WARP.value, WARP.value * _STATES_PER_THREAD // states))
    # A warp for each of the four schedulers of a multiprocessor.
    while channels > 8 and call.num_programs(channels) < 4 * _num_multiprocessors(call.device):
        channels //= 2
    return channels


def _backward_split(call: _Call, grid: tuple[int, int, int]) -> int:
    """Warps that share the states: its registers leave room for two per scheduler."""
    split, programs = 1, math.prod(grid)
    wanted = 8 * _num_multiprocessors(call.device)
    while split < min(4, call.num_states // 2 + 1) and split * programs < wanted:
        split *= 2
    return split


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _pair(items) -> tuple:
    """Two of them, or twice the only one."""
    first, *second = items
    return first, second[0] if second else first


@overload
def _sequence(x: Tensor) -> Sequence: ...
@overload
def _sequence(x: None) -> None: ...
def _sequence(x: Tensor | None) -> Sequence | None:
    return None if x is None else Sequence(x, *x.stride())


def _by_state(state: Tensor | None) -> Tensor | None:
    """A state (batch, dim, state) as the kernels want it, channels last."""
    return None if state is None else float32(state.transpose(1, 2))


class _Call:
    """What forward and backward of a scan have in common."""

    def __init__(self, ways: tuple[Way, ...], lengths: Tensor | None):
        self.ways, self.lengths = ways, lengths
        self.batch, self.dim, self.time = ways[0].u.shape
        self.device = ways[0].u.device
        self.num_states = ways[0].A.shape[1]
        projections = [x for way in ways for x in (way.B, way.C) if x.dim() == 4]
        self.groups = max((x.shape[1] for x in projections), default=1)
        blocks = triton.cdiv(self.time, self.block_frames(ways[0]))
        # Two ways share programs, which cannot be cut where one of them goes on.
        self.blocks_per_program = blocks
        if len(ways) == 1:
            wanted = triton.cdiv(_FRAMES_PER_PROGRAM, self.block_frames(ways[0]))
            self.blocks_per_program = min(blocks, wanted)
        self.programs_in_time = triton.cdiv(blocks, self.blocks_per_program)

    def block_frames(self, way: Way) -> int:
        return way.reset_every or self.time

    def grid(self, channels: int) -> tuple[int, int, int]:
        channel_blocks = self.groups * triton.cdiv(self.dim // self.groups, channels)
        return channel_blocks, self.programs_in_time, self.batch

    def num_programs(self, channels: int) -> int:
        channel_blocks, in_time, batch = self.grid(channels)
        return channel_blocks * in_time * batch

    def constants(self, channels: int, softplus: bool, *shared: Tensor | None) -> dict:
        first = self.ways[0]
        sequences = [x for way in self.ways for x in (way.u, way.delta)]
        sequences += [x for x in shared if x is not None]
        return {
            "NUM_STATE": self.num_states,
            "FULL_CHANNELS": self.dim // self.groups % channels == 0,
            "VARIABLE_B": first.B.dim() == 4,
            "VARIABLE_C": first.C.dim() == 4,
            "SOFTPLUS": softplus,
            "CUT": any(way.reset_every is not None for way in self.ways),
            "WIDE": any(x.stride(2) * self.time >= 2**31 for x in sequences),
        }

    def pointers(self, way: Way, last_state: Tensor | None, states: Tensor | None) -> WayPointers:
        return WayPointers(
            _sequence(way.u),
            _sequence(way.delta),
            float32(way.A.t()),
            self._projection(way.B, way.reverse),
            self._projection(way.C, way.reverse),
            float32(way.D),
            float32(way.delta_bias),
            states,
            _by_state(way.initial_state),
            None if last_state is None else last_state.transpose(1, 2),
        )

    def _projection(self, projection: Tensor, reverse: bool) -> Tensor:
        if projection.dim() == 2:
            return float32(projection.t())
        projection = projection.expand(-1, self.groups, -1, -1)
        num_tiles = triton.cdiv(self.time, TILE.value)
        packed = projection.new_empty(
            self.batch, self.groups, num_tiles * TILE.value, self.num_states, dtype=torch.float32
        )
        grid = (triton.cdiv(packed.shape[2], _PACKED_FRAMES), self.groups, self.batch)
        with torch.cuda.device_of(packed):
            pack_projection_kernel[grid](
                projection, packed, self.lengths, self.time, int(reverse), self.groups,
                *projection.stride(), NUM_STATE=self.num_states,
                STATES=triton.next_power_of_2(self.num_states), FRAMES=_PACKED_FRAMES,
            )  # fmt: skip
        return packed


class _GradientParts:
    """Memory for the gradients of a way, and their sums once the kernel has filled it."""

    def __init__(
        self, call: _Call, grid: tuple[int, int, int], way: Way, grad_last_state: Tensor | None
    ):
        self.call, self.way, self.grad_last_state = call, way, _by_state(grad_last_state)
        channel_blocks, in_time, batch = grid
        new = functools.partial(way.u.new_empty, dtype=torch.float32)
        parameter = (batch, in_time, call.num_states, call.dim)
        self.u, self.delta = empty_like(way.u), empty_like(way.delta)
        self.A, self.carry = new(parameter), new(parameter)
        self.B = new(parameter) if way.B.dim() == 2 else None
        self.C = new(parameter) if way.C.dim() == 2 else None
        self.D, self.bias = new(batch, in_time, call.dim), new(batch, in_time, call.dim)
        kinds = (way.B.dim() == 4) + (way.C.dim() == 4)
        self.projections = None
        if kinds:
            self.projections = new(kinds, batch, channel_blocks, call.num_states, call.time)
            if call.lengths is not None:
                # The kernel stays away from padding.
                self.projections.zero_()

    def pointers(self) -> WayGradientPointers:
        return WayGradientPointers(
            _sequence(self.u),
            _sequence(self.delta),
            self.A,
            self.B,
            self.C,
            self.D,
            self.bias,
            self.projections,
            self.carry,
            self.grad_last_state,
        )

    def collect(self) -> WayGradients:
        way, call = self.way, self.call
        projections = []
        if self.projections is not None:
            parts = self.projections.unflatten(2, (call.groups, -1))
            # One by one: outputs of an operator must not share memory.
            projections = [part.sum(2) for part in parts]
        grad_B = projections[0] if self.B is None else _sum_parameter(self.B, way.B)
        grad_C = projections[-1] if self.C is None else _sum_parameter(self.C, way.C)
        return WayGradients(
            self.u,
            self.delta,
            _sum_parameter(self.A, way.A),
            _to_groups_of(grad_B, way.B),
            _to_groups_of(grad_C, way.C),
            None if way.D is None else self.D.sum((0, 1)).to(way.D.dtype),
            None if way.delta_bias is None else self.bias.sum((0, 1)).to(way.delta_bias.dtype),
            self._initial_state(),
        )

    def _initial_state(self) -> Tensor | None:
        way, call = self.way, self.call
        if way.initial_state is None:
            return None
        program = torch.zeros(call.batch, dtype=torch.int64, device=call.device)
        if way.reverse:
            valid = program + call.time if call.lengths is None else call.lengths
            block = (valid - 1).clamp(min=0) // call.block_frames(way)
            program = block // call.blocks_per_program
        items = torch.arange(call.batch, device=call.device)
        grad = self.carry[items, program].transpose(1, 2)
        return empty_like(way.initial_state).copy_(grad)


def _sum_parameter(parts: Tensor, parameter: Tensor) -> Tensor:
    return parts.sum((0, 1)).t().to(parameter.dtype, memory_format=torch.contiguous_format)


def _to_groups_of(grad: Tensor, projection: Tensor) -> Tensor:
    """The gradient of a projection with the groups and the type it came with."""
    if grad.dim() == 4 and projection.shape[1] != grad.shape[1]:
        grad = grad.sum(1, keepdim=True)
    return grad.to(projection.dtype)
