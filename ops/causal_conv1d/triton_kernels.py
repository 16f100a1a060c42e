"""Triton kernels of the causal depthwise convolution.

Bound by memory: every input is needed by a few neighbouring frames, which find it in the nearest
cache, so a tile (frames, channels) loads each of its taps. The layout of the tile in threads
follows memory order, which may have channels or frames last. The backward computes what stood
before the activation again, for each tap, and leaves sums over a tile's frames for torch to add up:
no atomics, the same bits every time. Block sizes are not tuned by measurements.

``back`` is a distance in scan order, 0 for the current frame; ``position`` counts frames in scan
order from the start of their block of ``reset_every`` frames. A kernel is compiled once for all
numbers of frames and both directions. Two directions over the same input go through a program one
after the other: the second finds the input in the caches, and their gradients of it add up there.
"""

# What is decided when a kernel is compiled must not share a condition with what it decides itself.
# ruff: noqa: SIM102

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ops.triton_sequences import num_valid_frames, sigmoid

FRAMES = tl.constexpr(64)
CHANNELS = tl.constexpr(32)


class Tile(NamedTuple):
    """Where some frames (frames, 1) stand in their blocks."""

    t: torch.Tensor
    position: torch.Tensor
    num_positions: torch.Tensor
    enters: torch.Tensor
    leaves: torch.Tensor
    inside: torch.Tensor


@triton.jit
def _locate(t, valid, block_frames, reverse):
    """`Tile` of the frames ``t``; a state enters the block scanned first and leaves the last."""
    block = t // block_frames
    final = tl.maximum(valid - 1, 0) // block_frames
    lo = block * block_frames
    hi = tl.minimum(lo + block_frames, valid)
    position = tl.where(reverse, hi - 1 - t, t - lo)
    enters = block == tl.where(reverse, final, 0)
    leaves = block == tl.where(reverse, 0, final)
    return Tile(t, position, hi - lo, enters, leaves, t < valid)


@triton.jit
def _either(first, second, is_second, BOTH: tl.constexpr):
    """Of two pointers or numbers that of the way at hand; without BOTH always the first."""
    picked = first
    if BOTH:
        picked = tl.where(is_second, second, first)
    return picked


@triton.jit
def _pointers(sequence, t, channel, pointer):
    """Pointers into ``pointer``, a sequence with the strides of ``sequence``."""
    item = tl.program_id(2).to(tl.int64)
    of_channel = pointer + item * sequence.batch + channel.to(tl.int64) * sequence.channel
    return of_channel + t.to(tl.int64) * sequence.frame


@triton.jit
def _later(tile, back: tl.constexpr, reverse):
    """The tile of the frames scanned ``back`` after those of ``tile``, within their blocks."""
    position = tile.position + back
    t = tile.t + tl.where(reverse, -back, back)
    inside = tile.inside & (position < tile.num_positions)
    return Tile(t, position, tile.num_positions, tile.enters, tile.leaves, inside)


@triton.jit
def _load_tap(
    x, initial_state, has_initial, tile, back: tl.constexpr, dim, channel, channel_mask, reverse,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Inputs scanned ``back`` frames before those of the tile: of the block, or what entered it."""
    before = tile.position < back
    t = tile.t + tl.where(reverse, back, -back)
    mask = channel_mask & tile.inside & (tile.position >= back)
    values = tl.load(_pointers(x, t, channel, x.pointer), mask=mask, other=0.0).to(tl.float32)
    if initial_state is not None and back > 0:
        item = tl.program_id(2).to(tl.int64)
        entry = (item * dim + channel) * (WIDTH - 1) + (WIDTH - 1 - back) + tile.position
        entered = channel_mask & tile.inside & tile.enters & before & has_initial
        values += tl.load(initial_state + entry, mask=entered, other=0.0)
    return values


@triton.jit
def _sum_taps(
    x, weight, bias_row, initial_state, has_initial, tile, dim, channel, channel_mask, reverse,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """The convolution in front of its activation."""
    total = tl.zeros([tile.t.shape[0], channel.shape[1]], tl.float32) + bias_row
    for back in tl.static_range(WIDTH):
        taps = tl.load(weight + channel * WIDTH + (WIDTH - 1 - back), mask=channel_mask, other=0.0)
        total += taps * _load_tap(
            x, initial_state, has_initial, tile, back, dim, channel, channel_mask, reverse, WIDTH
        )
    return total


@triton.jit
def _load_gradient(
    pointer, grad_y, x, weight, bias_row, initial_state, has_initial, tile, dim, channel,
    channel_mask, reverse, WIDTH: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Gradient by what stands in front of the activation, 0 outside the blocks.

    Args:
        pointer: of the way's gradient; ``grad_y`` has the strides.
    """
    mask = channel_mask & tile.inside
    pointers = _pointers(grad_y, tile.t, channel, pointer)
    grad = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    if SILU:
        total = _sum_taps(
            x, weight, bias_row, initial_state, has_initial, tile, dim, channel, channel_mask,
            reverse, WIDTH,
        )  # fmt: skip
        gate = sigmoid(total)
        grad *= gate * (1.0 + total * (1.0 - gate))
    return grad


@triton.jit
def _channels(dim):
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    return channel, channel < dim


@triton.jit
def _load_bias(bias, channel, channel_mask):
    row = tl.zeros([1, CHANNELS], tl.float32)
    if bias is not None:
        row = tl.load(bias + channel, mask=channel_mask, other=0.0)
    return row


@triton.jit
def _store_state(
    x, initial_state, has_initial, state, valid, dim, channel, channel_mask, block_frames, reverse,
    WIDTH: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """The taps that a frame after the last block would see."""
    entry = tl.arange(0, ENTRIES)[:, None]
    final = tl.maximum(valid - 1, 0) // block_frames
    lo = tl.where(reverse, 0, final) * block_frames
    num_positions = tl.minimum(lo + block_frames, valid) - lo
    position = num_positions - (WIDTH - 1) + entry
    t = lo + tl.where(reverse, num_positions - 1 - position, position)
    wanted = channel_mask & (entry < WIDTH - 1)
    values = tl.load(_pointers(x, t, channel, x.pointer), mask=wanted & (position >= 0), other=0.0)
    values = values.to(tl.float32)
    of_caller = (tl.program_id(2).to(tl.int64) * dim + channel) * (WIDTH - 1)
    if initial_state is not None:
        # Of a single block shorter than the taps, something that entered remains.
        remains = wanted & (position < 0) & (final == 0) & has_initial
        entered = initial_state + of_caller + (WIDTH - 1) + position
        values += tl.load(entered, mask=remains, other=0.0)
    tl.store(state + of_caller + entry, values, mask=wanted)


@triton.jit(
    do_not_specialize=["time", "block_frames", "second_block_frames", "reverse", "second_reverse"]
)
def causal_conv1d_forward_kernel(
    x, weight, bias, initial_state, y, state, second_weight, second_bias, second_y, second_state,
    lengths, time, dim, block_frames, second_block_frames, reverse, second_reverse,
    WIDTH: tl.constexpr, ENTRIES: tl.constexpr, SILU: tl.constexpr, BOTH: tl.constexpr,
):  # fmt: skip
    """One way, or two over the same input. Grid (blocks of channels, blocks of frames, batch).

    Args:
        x, y: `Sequence`.
        weight: (dim, width), contiguous float32 like bias (dim,) and initial_state (batch, dim,
            width-1).
        state: like initial_state, of any type.
        second_weight: of the second way if BOTH, else the first's again, like all that is second;
            ``second_y`` has the strides of ``y``. The initial state is the first way's.
        ENTRIES: power of two not below width - 1.
    """
    channel, channel_mask = _channels(dim)
    valid = num_valid_frames(lengths, time)
    t = tl.program_id(1) * FRAMES + tl.arange(0, FRAMES)[:, None]
    for way in range(2 if BOTH else 1):
        is_second = way == 1
        turned = _either(reverse, second_reverse, is_second, BOTH) != 0
        frames = _either(block_frames, second_block_frames, is_second, BOTH)
        taps = _either(weight, second_weight, is_second, BOTH)
        if bias is None:
            bias_row = _load_bias(None, channel, channel_mask)
        else:
            bias_row = _load_bias(
                _either(bias, second_bias, is_second, BOTH), channel, channel_mask
            )
        tile = _locate(t, valid, frames, turned)
        total = _sum_taps(
            x, taps, bias_row, initial_state, way == 0, tile, dim, channel, channel_mask, turned,
            WIDTH,
        )  # fmt: skip
        if SILU:
            total *= sigmoid(total)
        total = tl.where(tile.inside, total, 0.0)
        target = _either(y.pointer, second_y, is_second, BOTH)
        tl.store(_pointers(y, t, channel, target), total, mask=channel_mask & (t < time))

        if WIDTH > 1:
            if tl.program_id(1) == 0:
                _store_state(
                    x, initial_state, way == 0, _either(state, second_state, is_second, BOTH),
                    valid, dim, channel, channel_mask, frames, turned, WIDTH, ENTRIES,
                )  # fmt: skip


@triton.jit
def _store_initial_gradient(
    grad_y, grad_state, x, weight, bias_row, initial_state, grad_initial_state, valid, dim, channel,
    channel_mask, block_frames, reverse, WIDTH: tl.constexpr, ENTRIES: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """What the first frames in scan order owe to the initial state, which is the first way's."""
    entry = tl.arange(0, ENTRIES)[:, None]
    final = tl.maximum(valid - 1, 0) // block_frames
    lo = tl.where(reverse, final, 0) * block_frames
    num_positions = tl.minimum(lo + block_frames, valid) - lo
    wanted = channel_mask & (entry < WIDTH - 1)
    total = tl.zeros([ENTRIES, CHANNELS], tl.float32)
    for position in tl.static_range(WIDTH - 1):
        # The frame at this position sees entry j through tap j - position.
        frame = tl.zeros([1, 1], tl.int32) + lo
        frame += tl.where(reverse, num_positions - 1 - position, position)
        place = _locate(frame, valid, block_frames, reverse)
        exists = place.position * 0 + position < num_positions
        seen = Tile(frame, place.position, place.num_positions, place.enters, place.leaves, exists)
        grad = _load_gradient(
            grad_y.pointer, grad_y, x, weight, bias_row, initial_state, True, seen, dim, channel,
            channel_mask, reverse, WIDTH, SILU,
        )  # fmt: skip
        taps = tl.load(
            weight + channel * WIDTH + (entry - position),
            mask=wanted & (entry >= position),
            other=0.0,
        )
        total += taps * grad
    of_caller = (tl.program_id(2).to(tl.int64) * dim + channel) * (WIDTH - 1)
    if grad_state is not None:
        # Of a single block shorter than the taps, something that entered remains.
        left = entry - num_positions
        mask = wanted & (left >= 0) & (final == 0)
        total += tl.load(grad_state + of_caller + left, mask=mask, other=0.0)
    tl.store(grad_initial_state + of_caller + entry, total, mask=wanted)


@triton.jit(
    do_not_specialize=["time", "block_frames", "second_block_frames", "reverse", "second_reverse"]
)
def causal_conv1d_backward_kernel(
    grad_y, grad_state, x, weight, bias, initial_state, grad_x, grad_parameters, grad_initial_state,
    second_grad_y, second_weight, second_bias, second_grad_parameters, lengths, time, dim,
    block_frames, second_block_frames, reverse, second_reverse,
    WIDTH: tl.constexpr, ENTRIES: tl.constexpr, SILU: tl.constexpr, BOTH: tl.constexpr,
):  # fmt: skip
    """Gradients of `causal_conv1d_forward_kernel`; grid and arguments as there.

    Args:
        grad_state: (batch, dim, width-1), of the first way's, or None.
        grad_x: the sum over ways.
        grad_parameters: (batch, blocks of frames, width + 1, dim): parts of the gradients of the
            taps and of the bias.
        grad_initial_state: (batch, dim, width-1) or None.
    """
    channel, channel_mask = _channels(dim)
    valid = num_valid_frames(lengths, time)
    item = tl.program_id(2).to(tl.int64)
    of_caller = (item * dim + channel) * (WIDTH - 1)
    t = tl.program_id(1) * FRAMES + tl.arange(0, FRAMES)[:, None]
    part = item * tl.num_programs(1) + tl.program_id(1)
    of_part = part * (WIDTH + 1) * dim + channel
    total = tl.zeros([FRAMES, CHANNELS], tl.float32)
    for way in range(2 if BOTH else 1):
        is_second = way == 1
        has_initial = way == 0
        turned = _either(reverse, second_reverse, is_second, BOTH) != 0
        frames = _either(block_frames, second_block_frames, is_second, BOTH)
        weight_way = _either(weight, second_weight, is_second, BOTH)
        grad_pointer = _either(grad_y.pointer, second_grad_y, is_second, BOTH)
        parts = _either(grad_parameters, second_grad_parameters, is_second, BOTH) + of_part
        if bias is None:
            bias_row = _load_bias(None, channel, channel_mask)
        else:
            bias_row = _load_bias(
                _either(bias, second_bias, is_second, BOTH), channel, channel_mask
            )
        tile = _locate(t, valid, frames, turned)
        for back in tl.static_range(WIDTH):
            later = _later(tile, back, turned)
            grad = _load_gradient(
                grad_pointer, grad_y, x, weight_way, bias_row, initial_state, has_initial, later,
                dim, channel, channel_mask, turned, WIDTH, SILU,
            )  # fmt: skip
            taps = tl.load(
                weight_way + channel * WIDTH + (WIDTH - 1 - back), mask=channel_mask, other=0.0
            )
            total += taps * grad
            if back == 0:
                tl.store(parts + WIDTH * dim, tl.sum(grad, 0, keep_dims=True), mask=channel_mask)
                for tap in tl.static_range(WIDTH):
                    values = _load_tap(
                        x, initial_state, has_initial, tile, WIDTH - 1 - tap, dim, channel,
                        channel_mask, turned, WIDTH,
                    )  # fmt: skip
                    sums = tl.sum(grad * values, 0, keep_dims=True)
                    tl.store(parts + tap * dim, sums, mask=channel_mask)
        if grad_state is not None:
            entry = (WIDTH - 1) - (tile.num_positions - tile.position)
            mask = channel_mask & tile.inside & tile.leaves & (entry >= 0) & has_initial
            total += tl.load(grad_state + of_caller + entry, mask=mask, other=0.0)
        if grad_initial_state is not None:
            if (tl.program_id(1) == 0) & has_initial:
                _store_initial_gradient(
                    grad_y, grad_state, x, weight_way, bias_row, initial_state, grad_initial_state,
                    valid, dim, channel, channel_mask, frames, turned, WIDTH, ENTRIES, SILU,
                )  # fmt: skip
    pointers = _pointers(grad_x, t, channel, grad_x.pointer)
    tl.store(pointers, total, mask=channel_mask & (t < time))
