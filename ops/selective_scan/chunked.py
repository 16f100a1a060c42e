"""The backend called ``torch``: the scan in plain torch, block by block, on any device.

Time is cut into blocks of a few frames. Everything but the recurrence is one operation per block;
the recurrence is one fused multiply-add per frame over all items, channels and states at once. The
forward keeps the state at the start of every segment of 64 frames, the backward recomputes the
others from it, so that nothing of size (batch, dim, time, state) ever exists. States are only
multiplied by decays in (0, 1], never divided by their products: no step size is too large or too
small.

Inside, channels stand last, which is how the projections of a mixer leave them in memory, and are
split by group: P frames of a block, B batch, G groups, N state, F channels of a group.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.frames import clear_at_block_start, is_block_start, select, valid_frames
from ops.selective_scan.arguments import ScanArguments, Way, WayGradients
from ops.selective_scan.operator import register

SEGMENT_FRAMES = 64
# Elements (frames, batch, dim, state) of one block: on a CPU three such tensors stay in its caches,
# elsewhere a block has to be worth the launches.
_CPU_BLOCK_ELEMENTS = 1 << 19
_DEVICE_BLOCK_ELEMENTS = 1 << 23


def unavailable() -> str | None:
    """Why this backend cannot be used on this machine: never."""
    return None


def unsupported(_arguments: ScanArguments) -> str | None:
    """Why a call does not fit: every call does."""
    return None


def forward(arguments: ScanArguments, save: bool) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The scan in one direction, or the mean over two.

    Returns:
        y, and of each way the last state and what `backward` wants: the state at the start of
        every segment, nothing unless ``save``.
    """
    y: Tensor | None = None
    last_states, saved = [], []
    for way in arguments.ways:
        way_y, last_state, segment_starts = _forward_way(_Call(arguments, way), save)
        y = way_y if y is None else y.lerp_(way_y.to(y.dtype), 0.5)
        last_states.append(last_state)
        saved.append(segment_starts)
    assert y is not None
    return y, last_states, saved


def backward(
    grad_y: Tensor,
    grad_last_states: list[Tensor | None],
    saved: list[Tensor],
    arguments: ScanArguments,
) -> tuple[list[WayGradients], Tensor | None]:
    """Gradients of everything in ``ways``, and of ``z``."""
    ways = arguments.ways
    if len(ways) == 2:
        grad_y = grad_y * 0.5
    found, grad_z = [], None
    for way, grad_last_state, segment_starts in zip(ways, grad_last_states, saved, strict=True):
        call = _Call(arguments, way)
        way_grads, way_grad_z = _backward_way(call, grad_y, grad_last_state, segment_starts)
        found.append(way_grads)
        if way_grad_z is not None:
            grad_z = way_grad_z if grad_z is None else grad_z.add_(way_grad_z)
    return found, grad_z


def _fake_forward(
    arguments: ScanArguments, save: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    last_states, saved = [], []
    for way in arguments.ways:
        batch, dim, time = way.u.shape
        groups, state, dtype = _num_groups(way.B, way.C), way.A.shape[1], _compute_dtype(way.u)
        segments = _num_segments(time) if save else 0
        last_states.append(way.u.new_empty(batch, dim, state, dtype=dtype))
        saved.append(way.u.new_empty(segments, batch, groups, state, dim // groups, dtype=dtype))
    return torch.empty_like(arguments.ways[0].u), last_states, saved


def _new_gradient(x: Tensor) -> Tensor:
    """Memory laid out like the gradient of ``x``: sequences and states keep their layout."""
    return torch.empty_like(x) if x.dim() > 2 else x.new_empty(x.shape)


scan = register("mamba_asr::selective_scan_torch", forward, backward, _fake_forward, _new_gradient)


def _forward_way(call: _Call, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    way = call.way
    y = torch.empty_like(way.u)
    h = call.state_from_caller(way.initial_state)
    segment_starts = h.new_empty(_num_segments(call.time) if save else 0, *h.shape)
    for segment in call.segments():
        if save:
            segment_starts[segment] = h
        for lo, hi in call.blocks(segment):
            block = _Block(call, lo, hi)
            states = block.states(block.clear(h))
            call.write(y, block.output(states), lo, hi)
            # A copy, lest the whole block stays alive.
            h = states[block.last].clone()
    return y, call.state_to_caller(h), segment_starts


def _backward_way(
    call: _Call, grad_y: Tensor, grad_last_state: Tensor | None, segment_starts: Tensor
) -> tuple[WayGradients, Tensor | None]:
    way, grads = call.way, _Gradients(call)
    carry = call.state_from_caller(grad_last_state)
    for segment in reversed(call.segments()):
        edges = call.blocks(segment)
        starts = [segment_starts[segment]]
        for lo, hi in edges[:-1]:
            block = _Block(call, lo, hi)
            starts.append(block.states(block.clear(starts[-1]))[block.last].clone())
        for (lo, hi), start in zip(reversed(edges), reversed(starts), strict=True):
            block = _Block(call, lo, hi)
            carry = block.clear(grads.add(block, block.clear(start), grad_y, carry))

    def like(gradient: Tensor, original: Tensor | None) -> Tensor | None:
        return None if original is None else gradient.flatten().to(original.dtype)

    initial_state = way.initial_state
    return WayGradients(
        u=grads.u,
        delta=grads.delta,
        A=call.parameter_to_caller(grads.A).to(way.A.dtype),
        B=call.projection_to_caller(grads.B, way.B),
        C=call.projection_to_caller(grads.C, way.C),
        D=like(grads.D, way.D),
        delta_bias=like(grads.delta_bias, way.delta_bias),
        initial_state=(
            None
            if initial_state is None
            else _new_gradient(initial_state).copy_(call.state_to_caller(carry))
        ),
    ), grads.z


def _compute_dtype(u: Tensor) -> torch.dtype:
    return torch.float64 if u.dtype == torch.float64 else torch.float32


def _num_groups(B: Tensor, C: Tensor) -> int:
    return next((x.shape[1] for x in (B, C) if x.dim() == 4), 1)


def _num_segments(time: int) -> int:
    return (time + SEGMENT_FRAMES - 1) // SEGMENT_FRAMES


class _Call:
    """The arguments of one way in the layout of the blocks, and how to cut and write them."""

    def __init__(self, arguments: ScanArguments, way: Way):
        _, self.z, self.softplus, self.lengths = arguments
        self.way = way
        self.batch, self.dim, self.time = way.u.shape
        self.groups, self.num_state = _num_groups(way.B, way.C), way.A.shape[1]
        self.channels = self.dim // self.groups
        self.dtype = _compute_dtype(way.u)
        self.A = self.parameter(way.A)
        self.D, self.delta_bias = (
            None if x is None else x.to(self.dtype).reshape(self.groups, self.channels)
            for x in (way.D, way.delta_bias)
        )
        self.valid = valid_frames(self.lengths, self.time)
        on_cpu = way.u.device.type == "cpu"
        most = _CPU_BLOCK_ELEMENTS if on_cpu else _DEVICE_BLOCK_ELEMENTS
        per_frame = max(1, self.batch * self.dim * self.num_state)
        self.block_frames = max(1, min(most // per_frame, math.isqrt(self.time), SEGMENT_FRAMES))

    def segments(self) -> list[int]:
        """Segments in scan order."""
        order = list(range(_num_segments(self.time)))
        return order[::-1] if self.way.reverse else order

    def blocks(self, segment: int) -> list[tuple[int, int]]:
        """First frame and end of each block of a segment, in scan order; none crosses a reset."""
        lo, end = segment * SEGMENT_FRAMES, min((segment + 1) * SEGMENT_FRAMES, self.time)
        cuts = {end, *range(lo, end, self.block_frames)}
        if self.way.reset_every is not None:
            cuts.update(
                range(
                    -(-lo // self.way.reset_every) * self.way.reset_every, end, self.way.reset_every
                )
            )
        edges = sorted(cuts)
        pairs = list(itertools.pairwise(edges))
        return pairs[::-1] if self.way.reverse else pairs

    def parameter(self, x_EN: Tensor) -> Tensor:
        """A per-channel parameter (dim, state) as (G, N, F)."""
        split = x_EN.to(self.dtype).reshape(self.groups, self.channels, self.num_state)
        return split.transpose(1, 2).contiguous()

    def parameter_to_caller(self, x_GNF: Tensor) -> Tensor:
        return x_GNF.transpose(1, 2).contiguous().view(self.dim, self.num_state)

    def state_from_caller(self, state: Tensor | None) -> Tensor:
        """A state (batch, dim, N) as (B, G, N, F); zeros for None."""
        if state is None:
            return self.A.new_zeros(self.batch, self.groups, self.num_state, self.channels)
        split = state.to(self.dtype).reshape(self.batch, self.groups, self.channels, self.num_state)
        return split.transpose(2, 3).contiguous()

    def state_to_caller(self, state: Tensor) -> Tensor:
        # Never a view: an operator may not return its input.
        state = state.transpose(2, 3).clone(memory_format=torch.contiguous_format)
        return state.view(self.batch, self.dim, self.num_state)

    def read(self, x: Tensor, lo: int, hi: int) -> Tensor:
        """Frames lo .. hi of (batch, dim, time) as (P, B, G, F), zero in padding."""
        return self.mask(self._read_unmasked(x, lo, hi), lo, hi)

    def _read_unmasked(self, x: Tensor, lo: int, hi: int) -> Tensor:
        frames = x[:, :, lo:hi].permute(2, 0, 1).to(self.dtype).contiguous()
        return frames.view(hi - lo, self.batch, self.groups, self.channels)

    def step_sizes(self, lo: int, hi: int) -> tuple[Tensor, Tensor | None]:
        """dt as (P, B, G, F), zero in padding, and its derivative (None for 1)."""
        raw = self.read(self.way.delta, lo, hi)
        if self.delta_bias is not None:
            raw = raw + self.delta_bias
        if not self.softplus:
            return self.mask(raw, lo, hi), None
        return self.mask(F.softplus(raw), lo, hi), raw

    def projection(self, x: Tensor, lo: int, hi: int) -> Tensor:
        """B or C as (P, B, G, N), zero in padding, or as (G, N, F) where it is constant."""
        if x.dim() == 2:
            return self.parameter(x)
        frames = x[..., lo:hi].permute(3, 0, 1, 2).to(self.dtype).contiguous()
        return self.mask(frames, lo, hi)

    def projection_to_caller(self, gradient: Tensor, original: Tensor) -> Tensor:
        if original.dim() == 2:
            gradient = self.parameter_to_caller(gradient)
        return gradient.to(original.dtype)

    def mask(self, x: Tensor, lo: int, hi: int) -> Tensor:
        """``x`` (P, B, G, any) with zeros in padding, selected, not multiplied."""
        if self.valid is None:
            return x
        mask = self.valid[:, lo:hi].t()[..., None, None]
        return select(mask, x)

    def write(self, target: Tensor, x: Tensor, lo: int, hi: int) -> None:
        """Puts (P, B, G, F) into frames lo .. hi of ``target`` (batch, dim, time)."""
        target[:, :, lo:hi] = x.view(hi - lo, self.batch, self.dim).permute(1, 2, 0)


class _Block:
    """A few consecutive frames of a call, read once."""

    def __init__(self, call: _Call, lo: int, hi: int):
        self.call, self.lo, self.hi = call, lo, hi
        self.first, self.last = (hi - lo - 1, 0) if call.way.reverse else (0, hi - lo - 1)
        self.u = call.read(call.way.u, lo, hi)
        self.dt, self.raw_dt = call.step_sizes(lo, hi)
        self.B = call.projection(call.way.B, lo, hi)
        self.C = call.projection(call.way.C, lo, hi)
        self.decay = (self.dt.unsqueeze(-2) * call.A).exp_()
        self.dt_u = self.dt * self.u

    def clear(self, state: Tensor) -> Tensor:
        """``state`` without what may not enter this block (for gradients: may not leave it)."""
        call = self.call
        frame = self.hi - 1 if call.way.reverse else self.lo
        if not is_block_start(frame, call.time, call.way.reverse, call.way.reset_every):
            return state
        return clear_at_block_start(state, frame, call.way.reverse, call.lengths)

    def states(self, start: Tensor) -> Tensor:
        """States after every frame, (P, B, G, N, F)."""
        states = self.spread_states(self.dt_u, self.B)
        states[self.first].addcmul_(self.decay[self.first], start)
        for before, t in self._steps():
            states[t].addcmul_(self.decay[t], states[before])
        return states

    def state_gradients(self, out_grad: Tensor, carry: Tensor) -> Tensor:
        """Gradients at the states after every frame, given that of the state left behind."""
        grads = self.spread_states(out_grad, self.C)
        grads[self.last] += carry
        for t, after in reversed(self._steps()):
            grads[t].addcmul_(self.decay[after], grads[after])
        return grads

    def _steps(self) -> list[tuple[int, int]]:
        frames = range(self.hi - self.lo)
        order = frames[::-1] if self.call.way.reverse else frames
        return list(itertools.pairwise(order))

    def multiply_by_previous_(self, x: Tensor, states: Tensor, start: Tensor) -> Tensor:
        """``x`` times the states before every frame, in place."""
        if self.call.way.reverse:
            x[:-1] *= states[1:]
        else:
            x[1:] *= states[:-1]
        x[self.first] *= start
        return x

    def output(self, states: Tensor) -> Tensor:
        out = self.ungated_output(states)
        if self.call.z is not None:
            out *= F.silu(self.call.read(self.call.z, self.lo, self.hi))
        return self.call.mask(out, self.lo, self.hi)

    def ungated_output(self, states: Tensor) -> Tensor:
        out = self.sum_states(states, self.C)
        return out if self.call.D is None else out.addcmul_(self.call.D, self.u)

    @staticmethod
    def spread_states(x_PBGF: Tensor, projection: Tensor) -> Tensor:
        """Outer product with B or C: (P, B, G, N, F)."""
        if projection.dim() == 4:
            projection = projection.unsqueeze(-1)
        return x_PBGF.unsqueeze(-2) * projection

    @staticmethod
    def sum_states(x_PBGNF: Tensor, projection: Tensor) -> Tensor:
        """Weighted by B or C and summed over states: (P, B, G, F)."""
        if projection.dim() == 4:
            return torch.matmul(projection.unsqueeze(-2), x_PBGNF).squeeze(-2)
        return (x_PBGNF * projection).sum(-2)


class _Gradients:
    """Gradients of one call, gathered block by block."""

    def __init__(self, call: _Call):
        self.call = call
        self.u, self.delta = torch.empty_like(call.way.u), torch.empty_like(call.way.delta)
        self.z = None if call.z is None else torch.empty_like(call.z)
        self.A = torch.zeros_like(call.A)
        self.B, self.C = (
            torch.zeros_like(call.A) if x.dim() == 2 else torch.empty_like(x)
            for x in (call.way.B, call.way.C)
        )
        self.D = torch.zeros_like(call.A[:, 0])
        self.delta_bias = torch.zeros_like(call.A[:, 0])

    def add(self, block: _Block, start: Tensor, grad_y: Tensor, carry: Tensor) -> Tensor:
        """Adds one block; returns the gradient of the state that it started from."""
        call, lo, hi = self.call, block.lo, block.hi
        states = block.states(start)
        out_grad = call.read(grad_y, lo, hi)
        if call.z is not None:
            assert self.z is not None
            z = call.read(call.z, lo, hi)
            gate = torch.sigmoid(z)
            slope = gate * (1 + z * (1 - gate))
            call.write(self.z, block.ungated_output(states) * out_grad * slope, lo, hi)
            out_grad = out_grad * (z * gate)

        self._add_projection(self.C, call.way.C, states, out_grad, lo, hi)
        state_grad = block.state_gradients(out_grad, carry)
        self._add_projection(self.B, call.way.B, state_grad, block.dt_u, lo, hi)
        dt_u_grad = block.sum_states(state_grad, block.B)
        state_grad *= block.decay
        carry = state_grad[block.first].clone()
        # From here on what reaches the exponents dt A.
        exponent_grad = block.multiply_by_previous_(state_grad, states, start)
        dt_grad = (exponent_grad * call.A).sum(-2).addcmul_(dt_u_grad, block.u)
        self.A += exponent_grad.mul_(block.dt.unsqueeze(-2)).sum((0, 1))

        u_grad = dt_u_grad.mul_(block.dt)
        if call.D is not None:
            self.D += (out_grad * block.u).sum((0, 1))
            u_grad.addcmul_(call.D, out_grad)
        if block.raw_dt is not None:
            dt_grad *= torch.sigmoid(block.raw_dt)
        dt_grad = call.mask(dt_grad, lo, hi)
        self.delta_bias += dt_grad.sum((0, 1))
        call.write(self.u, u_grad, lo, hi)
        call.write(self.delta, dt_grad, lo, hi)
        return carry

    @staticmethod
    def _add_projection(
        target: Tensor, projection: Tensor, x_PBGNF: Tensor, weight_PBGF: Tensor, lo: int, hi: int
    ) -> None:
        if projection.dim() == 2:
            target += (x_PBGNF * weight_PBGF.unsqueeze(-2)).sum((0, 1))
        else:
            sums = torch.matmul(x_PBGNF, weight_PBGF.unsqueeze(-1)).squeeze(-1)
            target[..., lo:hi] = sums.permute(1, 2, 3, 0)
