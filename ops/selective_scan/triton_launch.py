"""Prepares memory for the Triton kernels of the scan, chooses block sizes, launches."""

from __future__ import annotations

import functools
from collections import abc
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
from ops.triton_launcher import Plan, launch
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


Projections = list[tuple[Tensor, Tensor]]
"""B and C of each way as the kernels want them."""


def launch_forward(
    arguments: ScanArguments,
    y: Tensor,
    last_states: list[Tensor],
    states: list[Tensor] | None,
) -> None:
    """Fills ``y``, ``last_states`` and, unless None, ``states``; see `triton.forward`."""
    for call in _calls(arguments, y):
        ways = call.pointers(call.new_ends(), states, last_states)
        launch_scan(call.plans, ways, _sequence(arguments.z), _sequence(y), arguments.lengths)


def launch_scan(
    plans: Plans, ways: tuple[WayPointers, WayPointers], z: Sequence | None, y: Sequence,
    lengths: Tensor | None,
) -> None:  # fmt: skip
    """Launches the forward; `WayPointers` say what it fills."""
    if plans.num_pieces > 1:
        launch(selective_scan_ends_kernel, plans.ends, *ways, z, None, lengths)
    launch(selective_scan_forward_kernel, plans.forward, *ways, z, y, lengths)


def launch_backward(
    grad_y: Tensor,
    grad_last_states: list[Tensor | None],
    states: list[Tensor],
    arguments: ScanArguments,
) -> tuple[list[WayGradients], Tensor | None]:
    """See `triton.backward`."""
    grad_z = None if arguments.z is None else empty_like(arguments.z)
    found = []
    for call in _calls(arguments, grad_y):
        ends, parts = call.new_ends(), GradientParts(call)
        launch_gradients(
            call.plans, call.pointers(ends, states), parts.pointers(ends, grad_last_states),
            _sequence(arguments.z), _sequence(grad_y), _sequence(grad_z), arguments.lengths,
        )  # fmt: skip
        found += parts.collect()
    return found, grad_z


def launch_gradients(
    plans: Plans, ways: tuple[WayPointers, WayPointers],
    grads: tuple[WayGradientPointers, WayGradientPointers], z: Sequence | None, grad_y: Sequence,
    grad_z: Sequence | None, lengths: Tensor | None,
) -> None:  # fmt: skip
    """Launches the backward; `WayGradientPointers`, which share ``ends``, say what it fills."""
    if plans.num_pieces > 1:
        of_states = [
            way._replace(initial_state=grad.last_state)
            for way, grad in zip(ways, grads, strict=True)
        ]
        launch(selective_scan_ends_kernel, plans.ends_of_gradients, *of_states, z, grad_y, lengths)
    launch(
        selective_scan_backward_kernel, plans.backward, *ways, *grads, z, grad_y, grad_z, lengths
    )


class Shape(NamedTuple):
    """All that decides over grids, numbers and constants; those of both ways side by side."""

    device: torch.device
    batch: int
    dim: int
    time: int
    num_states: int
    groups: int
    B_varies: bool
    C_varies: bool
    reverse: tuple[bool, ...]
    reset_every: tuple[int | None, ...]
    softplus: bool
    wide: bool
    adds: bool
    scale: float
    multiprocessors: int
    tuning: Tuning


class Plans:
    """How the kernels are launched for one way or two of a shape, and shapes of their memory."""

    def __init__(self, shape: Shape):
        batch, dim, time, tuning = shape.batch, shape.dim, shape.time, shape.tuning
        count, reverse = len(shape.reverse), shape.reverse
        states = next_power_of_2(shape.num_states)
        # Of a warp's lanes, those that are left hold further states.
        channels = max(1, min(WARP.value, WARP.value * _STATES_PER_THREAD // states))
        self.channel_blocks = _channel_blocks(shape, WARP.value)
        piece_frames = _piece_frames(shape, self.channel_blocks * batch)
        self.piece_frames, self.num_pieces = piece_frames, ceil_div(time, piece_frames)
        self.packed_frames = ceil_div(time, TILE.value) * TILE.value
        # Of one piece nobody reads them; for None kernels would be compiled apart.
        rows = shape.num_states + 1 if self.num_pieces > 1 else 0
        self.ends_shape = count, batch, self.num_pieces, rows, dim
        kinds = shape.B_varies + shape.C_varies
        rows = shape.num_states * (4 - kinds) + 2
        self.parts_shape = count, batch, self.num_pieces, rows, dim
        self.projections_shape: tuple[int, ...] = ()
        if kinds:
            self.projections_shape = (
                count, kinds, batch, self.channel_blocks, shape.num_states, time
            )  # fmt: skip
        block_frames = [reset_every or time for reset_every in shape.reset_every]

        def numbers(turned: bool) -> tuple:
            return (
                time, dim, shape.groups, int(reverse[0] ^ turned), int(reverse[-1] ^ turned),
                block_frames[0], block_frames[-1], piece_frames,
            )  # fmt: skip

        def plan(channels: int, count: int, numbers: tuple, registers: int | None, **constants):
            grid = _channel_blocks(shape, channels), self.num_pieces * count, batch
            return Plan(
                grid, numbers, NUM_STATE=shape.num_states, STATES=states,
                FULL_CHANNELS=dim // shape.groups % channels == 0, SOFTPLUS=shape.softplus,
                CUT=any(shape.reset_every), WIDE=shape.wide, BOTH=both, num_warps=1,
                maxnreg=registers, **constants,
            )  # fmt: skip

        both = count == 2
        varying = {"VARIABLE_B": shape.B_varies, "VARIABLE_C": shape.C_varies}
        added = *numbers(False), int(shape.adds), shape.scale
        adding = {"ADD": both or shape.adds, **varying}
        ends, gradient_ends = (
            plan(
                channels, count, (*numbers(turned), shape.scale), tuning.ends_registers,
                CHANNELS=channels, VARIABLE=varies,
            )
            for turned, varies in ((False, shape.B_varies), (True, shape.C_varies))
        )  # fmt: skip
        self.ends, self.ends_of_gradients = ends, gradient_ends
        self.forward = plan(
            channels, 1, added, tuning.forward_registers, CHANNELS=channels, **adding
        )
        self.backward = plan(WARP.value, 1, added, tuning.backward_registers, **adding)


# Lengths of batches come in hundreds.
plans_of = functools.lru_cache(1024)(Plans)


def _channel_blocks(shape: Shape, channels: int) -> int:
    return shape.groups * ceil_div(shape.dim // shape.groups, channels)


def _piece_frames(shape: Shape, programs: int) -> int:
    tuning, pieces = shape.tuning, 1
    if programs < tuning.enough_programs * shape.multiprocessors:
        pieces = ceil_div(tuning.programs * shape.multiprocessors, programs)
    frames = max(ceil_div(shape.time, pieces), tuning.min_piece_frames)
    return ceil_div(frames, TILE.value) * TILE.value


@functools.lru_cache(1024)
def pack_plan(
    _device: torch.device, batch: int, time: int, groups: int, num_states: int,
    reverse: tuple[bool, ...], strides: tuple[int, ...],
) -> Plan:  # fmt: skip
    count = len(reverse)
    return Plan(
        (ceil_div(time, _PACKED_FRAMES), groups * count, batch),
        (time, sum(int(turned) << i for i, turned in enumerate(reverse)), groups, *strides),
        NUM_STATE=num_states, STATES=next_power_of_2(num_states), FRAMES=_PACKED_FRAMES,
        KINDS=count,
    )  # fmt: skip


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def pair(items: abc.Iterable) -> tuple:
    """Two of them, or twice the only one."""
    first, *second = items
    return first, second[0] if second else first


@overload
def _sequence(x: Tensor) -> Sequence: ...
@overload
def _sequence(x: None) -> None: ...
def _sequence(x: Tensor | None) -> Sequence | None:
    return None if x is None else Sequence(x, *x.stride())


def by_state(state: Tensor | None) -> Tensor | None:
    """A state (batch, dim, state) as the kernels want it, channels last."""
    return None if state is None else float32(state.transpose(1, 2))


class _Call:
    """One way, or two that go through the kernels together.

    Attributes:
        indices: of the ways among those of the scan.
    """

    def __init__(self, arguments: ScanArguments, indices: tuple[int, ...], y: Tensor):
        self.indices, self.lengths = indices, arguments.lengths
        self.ways = ways = [arguments.ways[i] for i in indices]
        first = ways[0]
        projections = [x for way in ways for x in (way.B, way.C) if x.dim() == 4]
        sequences = [y, *(x for way in ways for x in (way.u, way.delta))]
        if arguments.z is not None:
            sequences.append(arguments.z)
        batch, dim, time = first.u.shape
        self.shape = Shape(
            y.device, batch, dim, time, first.A.shape[1],
            max((x.shape[1] for x in projections), default=1), first.B.dim() == 4,
            first.C.dim() == 4, tuple(way.reverse for way in ways),
            tuple(way.reset_every for way in ways), arguments.softplus,
            max(x.stride(2) for x in sequences) * time >= 2**31, indices[0] > 0,
            1 / len(arguments.ways), num_multiprocessors(y.device), TUNING,
        )  # fmt: skip
        self.plans = plans_of(self.shape)

    def new(self, *shape: int) -> Tensor:
        """Uninitialised memory in float32."""
        return self.ways[0].u.new_empty(shape, dtype=torch.float32)

    def new_ends(self) -> abc.Sequence[Tensor]:
        """Memory for each way's ``ends``."""
        return self.new(*self.plans.ends_shape).unbind()

    def pointers(
        self, ends: abc.Sequence[Tensor], states: list[Tensor] | None,
        last_states: list[Tensor] | None = None,
    ) -> tuple[WayPointers, WayPointers]:  # fmt: skip
        """What the kernels are told of the first way and the second, or the first again."""
        return pair(
            WayPointers(
                _sequence(way.u),
                _sequence(way.delta),
                float32(way.A.t()),
                B,
                C,
                float32(way.D),
                float32(way.delta_bias),
                states[i] if states else None,
                by_state(way.initial_state),
                last_states[i].transpose(1, 2) if last_states else None,
                end,
            )
            for i, way, (B, C), end in zip(
                self.indices, self.ways, self._projections(), ends, strict=True
            )
        )

    def _projections(self) -> Projections:
        """B and C of each way as the kernels want them, packed together where they are alike."""
        found: list[Tensor] = []
        kinds: dict[tuple, list[int]] = {}
        for way in self.ways:
            for x in (way.B, way.C):
                if x.dim() == 2:
                    x = float32(x.t())
                else:
                    x = x.expand(-1, self.shape.groups, -1, -1)
                    kinds.setdefault((x.dtype, x.stride()), []).append(len(found))
                found.append(x)
        for places in kinds.values():
            packed = self._pack([found[place] for place in places], places)
            for place, x in zip(places, packed, strict=True):
                found[place] = x
        return list(zip(found[::2], found[1::2], strict=True))

    def _pack(self, sources: list[Tensor], places: list[int]) -> abc.Sequence[Tensor]:
        _, batch, _, time, num_states, groups, *_ = self.shape
        packed = self.new(len(sources), batch, groups, self.plans.packed_frames, num_states)
        reverse = tuple(self.ways[place // 2].reverse for place in places)
        plan = pack_plan(
            self.shape.device, batch, time, groups, num_states, reverse, sources[0].stride()
        )
        launch(pack_projections_kernel, plan, *(sources * 4)[:4], packed, self.lengths)
        return packed.unbind()


def _calls(arguments: ScanArguments, y: Tensor) -> list[_Call]:
    """The scan's ways, together if they can be."""
    ways = arguments.ways
    if len(ways) == 1 or _alike(*ways):
        return [_Call(arguments, tuple(range(len(ways))), y)]
    return [_Call(arguments, (i,), y) for i in range(len(ways))]


def _alike(first: Way, second: Way) -> bool:
    """Whether two ways can go through the same code, which knows one set of strides and parts."""

    def parts(way: Way) -> tuple:
        types = way.u.dtype, way.delta.dtype
        present = way.D is not None, way.delta_bias is not None
        return way.u.stride(), way.delta.stride(), types, present

    return parts(first) == parts(second) and second.initial_state is None


class GradientParts:
    """Gradients of one way or two; those of parameters and projections are sums still to be done.

    Attributes:
        u, delta: (ways, batch, dim, time).
        parts, projections: see `WayGradientPointers`; ways in front.
    """

    def __init__(self, call: _Call):
        self.call, plans = call, call.plans
        first, count = call.ways[0], len(call.ways)
        self.u = empty_like(first.u.expand(count, *first.u.shape))
        self.delta = empty_like(first.delta.expand(count, *first.delta.shape))
        self.parts = call.new(*plans.parts_shape)
        self.projections = call.new(*plans.projections_shape) if plans.projections_shape else None

    def pointers(
        self, ends: abc.Sequence[Tensor], grad_last_states: list[Tensor | None]
    ) -> tuple[WayGradientPointers, WayGradientPointers]:
        return pair(
            WayGradientPointers(
                _sequence(u),
                _sequence(delta),
                parts,
                projections,
                by_state(grad_last_states[i]),
                end,
            )
            for i, u, delta, parts, projections, end in zip(
                self.call.indices,
                self.u.unbind(),
                self.delta.unbind(),
                self.parts.unbind(),
                [None] * len(ends) if self.projections is None else self.projections.unbind(),
                ends,
                strict=True,
            )
        )

    def collect(self) -> list[WayGradients]:
        """The gradients of each way."""
        return [self._collect(index, way) for index, way in enumerate(self.call.ways)]

    def _collect(self, index: int, way: Way) -> WayGradients:
        num_states = self.call.shape.num_states
        projections = []
        if self.projections is not None:
            by_group = self.projections[index].unflatten(2, (self.call.shape.groups, -1))
            projections = [part.sum(2) for part in by_group]
        sums = self.parts[index, :, :, :-num_states].sum((0, 1))
        constant = iter(sums[num_states:-2].split(num_states))
        grad_B = projections[0] if way.B.dim() == 4 else next(constant).t().to(way.B.dtype)
        grad_C = projections[-1] if way.C.dim() == 4 else next(constant).t().to(way.C.dtype)
        return WayGradients(
            self.u[index],
            self.delta[index],
            sums[:num_states].t().to(way.A.dtype),
            _to_groups_of(grad_B, way.B),
            _to_groups_of(grad_C, way.C),
            None if way.D is None else sums[-2].to(way.D.dtype),
            None if way.delta_bias is None else sums[-1].to(way.delta_bias.dtype),
            self.initial_state(index),
        )

    def initial_state(self, index: int) -> Tensor | None:
        """The gradient of a way's initial state."""
        call, way = self.call, self.call.ways[index]
        if way.initial_state is None:
            return None
        _, batch, _, time, num_states, *_ = call.shape
        piece = torch.zeros(batch, dtype=torch.int64, device=call.shape.device)
        if way.reverse:
            valid = piece + time if call.lengths is None else call.lengths
            piece = (valid - 1).clamp(0, time - 1) // call.plans.piece_frames
        items = torch.arange(batch, device=call.shape.device)
        grad = self.parts[index, items, piece, -num_states:].transpose(1, 2)
        return empty_like(way.initial_state).copy_(grad)


def _to_groups_of(grad: Tensor, projection: Tensor) -> Tensor:
    """The gradient of a projection with the groups and the type it came with."""
    if grad.dim() == 4 and projection.shape[1] != grad.shape[1]:
        grad = grad.sum(1, keepdim=True)
    return grad.to(projection.dtype)
