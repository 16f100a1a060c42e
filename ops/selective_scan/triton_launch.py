"""Prepares memory for the Triton kernels of the scan, chooses block sizes, launches."""

from __future__ import annotations

import functools
from typing import NamedTuple, overload

import torch
from torch import Tensor

from ops.native import ceil_div, empty_like, float32, next_power_of_2
from ops.selective_scan.arguments import ScanArguments, Way, WayGradients
from ops.selective_scan.triton_backward import (
    WayGradientPointers,
    selective_scan_backward_kernel,
)
from ops.selective_scan.triton_forward import selective_scan_forward_kernel
from ops.selective_scan.triton_pieces import selective_scan_ends_kernel
from ops.selective_scan.triton_rows import TILE, WARP, WayPointers, pack_projections_kernel
from ops.triton_launcher import launcher
from ops.triton_sequences import Sequence

# States that a thread of the forward keeps in registers.
_STATES_PER_THREAD = 16
_PACKED_FRAMES = 64


class Tuning(NamedTuple):
    """What decides over speed alone; `benchmarks.scan_gpu` tries others.

    Attributes:
        programs: of a warp each, that a multiprocessor is wanted to have: time is cut until then.
        enough_programs: with so many, time is not cut: cutting repeats the exponentials.
        min_piece_frames: the shortest piece.
        forward_registers: of a thread, which decides how many programs run at once.
        ends_registers: of a thread of the kernel that prepares the pieces.
        backward_registers: of a thread; None leaves it to the compiler.
    """

    programs: int = 48
    enough_programs: int = 7
    min_piece_frames: int = 64
    forward_registers: int | None = 128
    ends_registers: int | None = 128
    backward_registers: int | None = 168


TUNING = Tuning()


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
        first, second = launch.pointers(last_states, states)
        with torch.cuda.device_of(y):
            first, second = launch.find_ends(first, second, None, None, softplus)
            launcher(selective_scan_forward_kernel, call.grid(call.channels))(
                first, second, _sequence(z), _sequence(y), lengths, *launch.sizes(),
                CHANNELS=call.channels, VARIABLE_B=launch.variable[0],
                VARIABLE_C=launch.variable[1], **launch.ways_constants(),
                **call.constants(call.channels, softplus, z, y),
                num_warps=1, maxnreg=TUNING.forward_registers,
            )  # fmt: skip


def launch_backward(
    grad_y: Tensor,
    grad_last_states: list[Tensor | None],
    states: list[Tensor],
    arguments: ScanArguments,
) -> tuple[list[WayGradients], Tensor | None]:
    """See `triton.backward`."""
    grad_z = None if arguments.z is None else empty_like(arguments.z)
    parts = launch_backward_in_parts(grad_y, grad_last_states, states, arguments, grad_z)
    return [part.collect() for part in parts], grad_z


def launch_backward_in_parts(
    grad_y: Tensor,
    grad_last_states: list[Tensor | None],
    states: list[Tensor],
    arguments: ScanArguments,
    grad_z: Tensor | None,
) -> list[GradientParts]:
    """`launch_backward` into the memory ``grad_z``, sums over channels and pieces left to do."""
    ways, z, softplus, lengths = arguments
    found = []
    for launch in _launches(ways, lengths):
        call = launch.call
        memory = GradientMemory.new(call, len(launch.ways))
        parts = [
            GradientParts(call, ways[way], grad_last_states[way], memory, index)
            for index, way in enumerate(launch.ways)
        ]
        first, second = launch.pointers(None, states)
        first_grads, second_grads = _pair(part.pointers() for part in parts)
        with torch.cuda.device_of(grad_y):
            first_ends, second_ends = launch.find_ends(
                first._replace(initial_state=first_grads.last_state),
                second._replace(initial_state=second_grads.last_state),
                z, grad_y, softplus,
            )  # fmt: skip
            first_grads = first_grads._replace(ends=first_ends.ends)
            second_grads = second_grads._replace(ends=second_ends.ends)
            launcher(selective_scan_backward_kernel, call.grid(WARP.value))(
                first, second, first_grads, second_grads, _sequence(z), _sequence(grad_y),
                _sequence(grad_z), lengths, *launch.sizes(), VARIABLE_B=launch.variable[0],
                VARIABLE_C=launch.variable[1], **launch.ways_constants(),
                **call.constants(WARP.value, softplus, z, grad_y),
                num_warps=1, maxnreg=TUNING.backward_registers,
            )  # fmt: skip
        found += parts
    return found


class _Launch(NamedTuple):
    """Ways that go through a kernel together."""

    call: _Call
    ways: tuple[int, ...]
    scale: float

    @property
    def variable(self) -> tuple[bool, bool]:
        """Whether B and C vary over time."""
        first = self.call.ways[0]
        return first.B.dim() == 4, first.C.dim() == 4

    def pointers(
        self, last_states: list[Tensor] | None, states: list[Tensor] | None
    ) -> tuple[WayPointers, WayPointers]:
        """What the kernels are told of the first way and the second, or the first again."""
        call = self.call
        return _pair(
            call.pointers(
                way, projections, last_states[i] if last_states else None,
                states[i] if states else None,
            )
            for i, way, projections in zip(self.ways, call.ways, call.projections(), strict=True)
        )  # fmt: skip

    def find_ends(
        self, first: WayPointers, second: WayPointers, z: Tensor | None, grad_y: Tensor | None,
        softplus: bool,
    ) -> tuple[WayPointers, WayPointers]:  # fmt: skip
        """Both with the ``ends`` of their states, or for ``grad_y`` of the gradients of these."""
        call = self.call
        if call.num_pieces == 1:
            return first, second
        count = len(self.ways)
        ends = call.new(count, call.batch, call.num_pieces, call.num_states + 1, call.dim)
        first = first._replace(ends=ends[0])
        second = second._replace(ends=ends[-1])
        channel_blocks, num_pieces, batch = call.grid(call.channels)
        turns = int(grad_y is not None)
        of_each = [call.ways[0], call.ways[-1]]
        launcher(selective_scan_ends_kernel, (channel_blocks, num_pieces * count, batch))(
            first, second, _sequence(z), _sequence(grad_y), call.lengths, call.time, call.dim,
            call.groups, *(int(way.reverse) ^ turns for way in of_each),
            *(call.block_frames(way) for way in of_each), call.piece_frames, self.scale,
            CHANNELS=call.channels, VARIABLE=self.variable[turns], BOTH=count == 2,
            **call.constants(call.channels, softplus, z, grad_y),
            num_warps=1, maxnreg=TUNING.ends_registers,
        )  # fmt: skip
        return first, second

    def sizes(self) -> tuple:
        """The arguments of a kernel from ``time`` to ``output_scale``."""
        call, of_each = self.call, [self.call.ways[0], self.call.ways[-1]]
        return (
            call.time,
            call.dim,
            call.groups,
            *(int(way.reverse) for way in of_each),
            *(call.block_frames(way) for way in of_each),
            call.piece_frames,
            int(self._adds()),
            self.scale,
        )

    def ways_constants(self) -> dict:
        both = len(self.ways) == 2
        return {"BOTH": both, "ADD": both or self._adds()}

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
        self.states = next_power_of_2(self.num_states)
        projections = [x for way in ways for x in (way.B, way.C) if x.dim() == 4]
        self.groups = max((x.shape[1] for x in projections), default=1)
        # Of a warp's lanes, those that are left hold further states.
        self.channels = max(1, min(WARP.value, WARP.value * _STATES_PER_THREAD // self.states))
        self.piece_frames = self._piece_frames()
        self.num_pieces = ceil_div(self.time, self.piece_frames)

    def _piece_frames(self) -> int:
        programs = self._channel_blocks(WARP.value) * self.batch
        multiprocessors = _num_multiprocessors(self.device)
        pieces = 1
        if programs < TUNING.enough_programs * multiprocessors:
            pieces = ceil_div(TUNING.programs * multiprocessors, programs)
        frames = max(ceil_div(self.time, pieces), TUNING.min_piece_frames)
        return ceil_div(frames, TILE.value) * TILE.value

    def new(self, *shape: int) -> Tensor:
        """Uninitialised memory in float32."""
        return self.ways[0].u.new_empty(shape, dtype=torch.float32)

    def block_frames(self, way: Way) -> int:
        return way.reset_every or self.time

    def _channel_blocks(self, channels: int) -> int:
        return self.groups * ceil_div(self.dim // self.groups, channels)

    def grid(self, channels: int) -> tuple[int, int, int]:
        return self._channel_blocks(channels), self.num_pieces, self.batch

    def constants(self, channels: int, softplus: bool, *shared: Tensor | None) -> dict:
        """What kernels are compiled for; ``shared`` are sequences that belong to no way."""
        sequences = [x for way in self.ways for x in (way.u, way.delta)]
        sequences += [x for x in shared if x is not None]
        return {
            "NUM_STATE": self.num_states,
            "STATES": self.states,
            "FULL_CHANNELS": self.dim // self.groups % channels == 0,
            "SOFTPLUS": softplus,
            "CUT": any(way.reset_every is not None for way in self.ways),
            "WIDE": any(x.stride(2) * self.time >= 2**31 for x in sequences),
        }

    def pointers(
        self, way: Way, projections: list[Tensor], last_state: Tensor | None,
        states: Tensor | None,
    ) -> WayPointers:  # fmt: skip
        A = float32(way.A.t())
        B, C = projections
        return WayPointers(
            _sequence(way.u),
            _sequence(way.delta),
            A,
            B,
            C,
            float32(way.D),
            float32(way.delta_bias),
            states,
            _by_state(way.initial_state),
            None if last_state is None else last_state.transpose(1, 2),
            # Not None, for which kernels would be compiled apart; of one piece nobody reads them.
            A,
        )

    def projections(self) -> list[list[Tensor]]:
        """B and C of each way as the kernels want them, packed together where they are alike."""
        pairs = [[way.B, way.C] for way in self.ways]
        kinds: dict[tuple, list[tuple[int, int]]] = {}
        for i, pair in enumerate(pairs):
            for j, x in enumerate(pair):
                if x.dim() == 2:
                    pair[j] = float32(x.t())
                else:
                    x = pair[j] = x.expand(-1, self.groups, -1, -1)
                    kinds.setdefault((x.dtype, x.stride()), []).append((i, j))
        for places in kinds.values():
            sources = [pairs[i][j] for i, j in places]
            reverse = [self.ways[i].reverse for i, _ in places]
            for (i, j), packed in zip(places, self._pack(sources, reverse), strict=True):
                pairs[i][j] = packed
        return pairs

    def _pack(self, sources: list[Tensor], reverse: list[bool]) -> Tensor:
        frames = ceil_div(self.time, TILE.value) * TILE.value
        packed = self.new(len(sources), self.batch, self.groups, frames, self.num_states)
        grid = (ceil_div(frames, _PACKED_FRAMES), self.groups * len(sources), self.batch)
        with torch.cuda.device_of(packed):
            launcher(pack_projections_kernel, grid)(
                *(sources * 4)[:4], packed, self.lengths, self.time,
                sum(int(turned) << i for i, turned in enumerate(reverse)), self.groups,
                *sources[0].stride(), NUM_STATE=self.num_states, STATES=self.states,
                FRAMES=_PACKED_FRAMES, KINDS=len(sources),
            )  # fmt: skip
        return packed


class GradientMemory(NamedTuple):
    """What the backward kernel fills for one way or two, the first axis; see `WayGradientPointers`.

    Both ways' in one piece of memory, so that they can be added up together.
    """

    parts: Tensor
    projections: Tensor | None

    @classmethod
    def new(cls, call: _Call, count: int) -> GradientMemory:
        """Uninitialised memory."""
        channel_blocks, pieces, batch = call.grid(WARP.value)
        B, C = (x.dim() == 4 for x in call.ways[0][3:5])
        rows = call.num_states * (4 - B - C) + 2
        of_projections = (count, B + C, batch, channel_blocks, call.num_states, call.time)
        return cls(
            call.new(count, batch, pieces, rows, call.dim),
            call.new(*of_projections) if B or C else None,
        )


class GradientParts:
    """Gradients of a way, and their sums once the kernel has filled its ``memory``."""

    def __init__(
        self,
        call: _Call,
        way: Way,
        grad_last_state: Tensor | None,
        memory: GradientMemory,
        index: int,
    ):
        self.call, self.way, self.grad_last_state = call, way, _by_state(grad_last_state)
        self.memory = memory
        self.u, self.delta = empty_like(way.u), empty_like(way.delta)
        self.parts = memory.parts[index]
        self.projections = None if memory.projections is None else memory.projections[index]

    def pointers(self) -> WayGradientPointers:
        return WayGradientPointers(
            _sequence(self.u),
            _sequence(self.delta),
            self.parts,
            self.projections,
            self.grad_last_state,
            self.parts,
        )

    def collect(self) -> WayGradients:
        way, num_states = self.way, self.call.num_states
        projections = []
        if self.projections is not None:
            by_group = self.projections.unflatten(2, (self.call.groups, -1))
            projections = [part.sum(2) for part in by_group]
        sums = self.parts[:, :, :-num_states].sum((0, 1))
        constant = iter(sums[num_states:-2].split(num_states))
        grad_B = projections[0] if way.B.dim() == 4 else next(constant).t().to(way.B.dtype)
        grad_C = projections[-1] if way.C.dim() == 4 else next(constant).t().to(way.C.dtype)
        return WayGradients(
            self.u,
            self.delta,
            sums[:num_states].t().to(way.A.dtype),
            _to_groups_of(grad_B, way.B),
            _to_groups_of(grad_C, way.C),
            None if way.D is None else sums[-2].to(way.D.dtype),
            None if way.delta_bias is None else sums[-1].to(way.delta_bias.dtype),
            self.initial_state(),
        )

    def initial_state(self) -> Tensor | None:
        way, call = self.way, self.call
        if way.initial_state is None:
            return None
        piece = torch.zeros(call.batch, dtype=torch.int64, device=call.device)
        if way.reverse:
            valid = piece + call.time if call.lengths is None else call.lengths
            piece = (valid - 1).clamp(0, call.time - 1) // call.piece_frames
        items = torch.arange(call.batch, device=call.device)
        grad = self.parts[items, piece, -call.num_states :].transpose(1, 2)
        return empty_like(way.initial_state).copy_(grad)


def _to_groups_of(grad: Tensor, projection: Tensor) -> Tensor:
    """The gradient of a projection with the groups and the type it came with."""
    if grad.dim() == 4 and projection.shape[1] != grad.shape[1]:
        grad = grad.sum(1, keepdim=True)
    return grad.to(projection.dtype)
