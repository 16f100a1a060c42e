"""Triton kernels of the causal depthwise convolution.

Bound by memory: every input is needed by a few neighbouring frames, which find it in the nearest
cache, so a tile (frames, channels) loads each of its taps. The layout of the tile in threads
follows memory order, which may have channels or frames last. The backward computes what stood
before the activation again, for each tap, and leaves sums over a tile's frames for torch to add up:
no atomics, the same bits every time. Block sizes are not tuned by measurements.

``back`` is a distance in scan order, 0 for the current frame; ``position`` counts frames in scan
order from the start of their block of ``reset_every`` frames. A kernel is compiled once for all
numbers of frames.
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
def _locate(t, valid, block_frames, REVERSE: tl.constexpr):
    """`Tile` of the frames ``t``; a state enters the block scanned first and leaves the last."""
    block = t // block_frames
    final = tl.maximum(valid - 1, 0) // block_frames
    lo = block * block_frames
    hi = tl.minimum(lo + block_frames, valid)
    position = hi - 1 - t if REVERSE else t - lo
    if REVERSE:
        enters = block == final
        leaves = block == 0
    else:
        enters = block == 0
        leaves = block == final
    return Tile(t, position, hi - lo, enters, leaves, t < valid)


@triton.jit
def _pointers(sequence, t, channel):
    item = tl.program_id(2).to(tl.int64)
    of_channel = sequence.pointer + item * sequence.batch + channel.to(tl.int64) * sequence.channel
    return of_channel + t.to(tl.int64) * sequence.frame


@triton.jit
def _later(tile, back: tl.constexpr, REVERSE: tl.constexpr):
    """The tile of the frames scanned ``back`` after those of ``tile``, within their blocks."""
    position = tile.position + back
    t = tile.t - back if REVERSE else tile.t + back
    inside = tile.inside & (position < tile.num_positions)
    return Tile(t, position, tile.num_positions, tile.enters, tile.leaves, inside)


@triton.jit
def _load_tap(
    x, initial_state, tile, back: tl.constexpr, dim, channel, channel_mask, WIDTH: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """Inputs scanned ``back`` frames before those of the tile: of the block, or what entered it."""
    before = tile.position < back
    t = tile.t + back if REVERSE else tile.t - back
    mask = channel_mask & tile.inside & (tile.position >= back)
    values = tl.load(_pointers(x, t, channel), mask=mask, other=0.0).to(tl.float32)
    if initial_state is not None and back > 0:
        item = tl.program_id(2).to(tl.int64)
        entry = (item * dim + channel) * (WIDTH - 1) + (WIDTH - 1 - back) + tile.position
        entered = channel_mask & tile.inside & tile.enters & before
        values += tl.load(initial_state + entry, mask=entered, other=0.0)
    return values


@triton.jit
def _sum_taps(
    x, weight, bias_row, initial_state, tile, dim, channel, channel_mask, WIDTH: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """The convolution in front of its activation."""
    total = tl.zeros([tile.t.shape[0], channel.shape[1]], tl.float32) + bias_row
    for back in tl.static_range(WIDTH):
        taps = tl.load(weight + channel * WIDTH + (WIDTH - 1 - back), mask=channel_mask, other=0.0)
        total += taps * _load_tap(
            x, initial_state, tile, back, dim, channel, channel_mask, WIDTH, REVERSE
        )
    return total


@triton.jit
def _load_gradient(
    grad_y, x, weight, bias_row, initial_state, tile, dim, channel, channel_mask,
    WIDTH: tl.constexpr, REVERSE: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Gradient by what stands in front of the activation, 0 outside the blocks."""
    mask = channel_mask & tile.inside
    grad = tl.load(_pointers(grad_y, tile.t, channel), mask=mask, other=0.0).to(tl.float32)
    if SILU:
        total = _sum_taps(
            x, weight, bias_row, initial_state, tile, dim, channel, channel_mask, WIDTH, REVERSE
        )
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
    x, initial_state, state, valid, dim, channel, channel_mask, block_frames, WIDTH: tl.constexpr,
    ENTRIES: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The taps that a frame after the last block would see."""
    entry = tl.arange(0, ENTRIES)[:, None]
    final = tl.maximum(valid - 1, 0) // block_frames
    lo = (0 if REVERSE else final) * block_frames
    num_positions = tl.minimum(lo + block_frames, valid) - lo
    position = num_positions - (WIDTH - 1) + entry
    t = lo + num_positions - 1 - position if REVERSE else lo + position
    wanted = channel_mask & (entry < WIDTH - 1)
    values = tl.load(_pointers(x, t, channel), mask=wanted & (position >= 0), other=0.0)
    values = values.to(tl.float32)
    of_caller = (tl.program_id(2).to(tl.int64) * dim + channel) * (WIDTH - 1)
    if initial_state is not None:
        # Of a single block shorter than the taps, something that entered remains.
        remains = wanted & (position < 0) & (final == 0)
        entered = initial_state + of_caller + (WIDTH - 1) + position
        values += tl.load(entered, mask=remains, other=0.0)
    tl.store(state + of_caller + entry, values, mask=wanted)


@triton.jit(do_not_specialize=["time", "block_frames"])
def causal_conv1d_forward_kernel(
    x, weight, bias, initial_state, y, state, lengths, time, dim, block_frames,
    WIDTH: tl.constexpr, ENTRIES: tl.constexpr, REVERSE: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of channels, blocks of frames, batch).

    Args:
        x, y: `Sequence`.
        weight: (dim, width), contiguous float32 like bias (dim,) and initial_state (batch, dim,
            width-1).
        state: like initial_state, of any type.
        ENTRIES: power of two not below width - 1.
    """
    channel, channel_mask = _channels(dim)
    bias_row = _load_bias(bias, channel, channel_mask)
    valid = num_valid_frames(lengths, time)
    t = tl.program_id(1) * FRAMES + tl.arange(0, FRAMES)[:, None]
    tile = _locate(t, valid, block_frames, REVERSE)
    total = _sum_taps(
        x, weight, bias_row, initial_state, tile, dim, channel, channel_mask, WIDTH, REVERSE
    )
    if SILU:
        total *= sigmoid(total)
    total = tl.where(tile.inside, total, 0.0)
    tl.store(_pointers(y, t, channel), total, mask=channel_mask & (t < time))

    if WIDTH > 1:
        if tl.program_id(1) == 0:
            _store_state(
                x, initial_state, state, valid, dim, channel, channel_mask, block_frames, WIDTH,
                ENTRIES, REVERSE,
            )  # fmt: skip


@triton.jit
def _store_initial_gradient(
    grad_y, grad_state, x, weight, bias_row, initial_state, grad_initial_state, valid, dim, channel,
    channel_mask, block_frames, WIDTH: tl.constexpr, ENTRIES: tl.constexpr, REVERSE: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """What the first frames in scan order owe to the initial state."""
    entry = tl.arange(0, ENTRIES)[:, None]
    final = tl.maximum(valid - 1, 0) // block_frames
    lo = (final if REVERSE else 0) * block_frames
    num_positions = tl.minimum(lo + block_frames, valid) - lo
    wanted = channel_mask & (entry < WIDTH - 1)
    total = tl.zeros([ENTRIES, CHANNELS], tl.float32)
    for position in tl.static_range(WIDTH - 1):
        # The frame at this position sees entry j through tap j - position.
        frame = tl.zeros([1, 1], tl.int32) + lo
        frame += num_positions - 1 - position if REVERSE else position
        place = _locate(frame, valid, block_frames, REVERSE)
        exists = place.position * 0 + position < num_positions
        seen = Tile(frame, place.position, place.num_positions, place.enters, place.leaves, exists)
        grad = _load_gradient(
            grad_y, x, weight, bias_row, initial_state, seen, dim, channel, channel_mask, WIDTH,
            REVERSE, SILU,
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


@triton.jit(do_not_specialize=["time", "block_frames"])
def causal_conv1d_backward_kernel(
    grad_y, grad_state, x, weight, bias, initial_state, grad_x, grad_parameters, grad_initial_state,
    lengths, time, dim, block_frames,
    WIDTH: tl.constexpr, ENTRIES: tl.constexpr, REVERSE: tl.constexpr, SILU: tl.constexpr,
    ADD: tl.constexpr,
):  # fmt: skip
    """Gradients of `causal_conv1d_forward_kernel`; grid and arguments as there.

    Args:
        grad_state: (batch, dim, width-1) or None.
        grad_parameters: (batch, blocks of frames, width + 1, dim): parts of the gradients of the
            taps and of the bias.
        grad_initial_state: (batch, dim, width-1) or None.
        ADD: whether grad_x is added to what is there.
    """
    channel, channel_mask = _channels(dim)
    bias_row = _load_bias(bias, channel, channel_mask)
    valid = num_valid_frames(lengths, time)
    item = tl.program_id(2).to(tl.int64)
    of_caller = (item * dim + channel) * (WIDTH - 1)
    t = tl.program_id(1) * FRAMES + tl.arange(0, FRAMES)[:, None]
    tile = _locate(t, valid, block_frames, REVERSE)

    part = item * tl.num_programs(1) + tl.program_id(1)
    parts = grad_parameters + part * (WIDTH + 1) * dim + channel
    total = tl.zeros([FRAMES, CHANNELS], tl.float32)
    for back in tl.static_range(WIDTH):
        later = _later(tile, back, REVERSE)
        grad = _load_gradient(
            grad_y, x, weight, bias_row, initial_state, later, dim, channel, channel_mask, WIDTH,
            REVERSE, SILU,
        )  # fmt: skip
        taps = tl.load(weight + channel * WIDTH + (WIDTH - 1 - back), mask=channel_mask, other=0.0)
        total += taps * grad
        if back == 0:
            tl.store(parts + WIDTH * dim, tl.sum(grad, 0, keep_dims=True), mask=channel_mask)
            for tap in tl.static_range(WIDTH):
                values = _load_tap(
                    x, initial_state, tile, WIDTH - 1 - tap, dim, channel, channel_mask, WIDTH,
                    REVERSE,
                )  # fmt: skip
                sums = tl.sum(grad * values, 0, keep_dims=True)
                tl.store(parts + tap * dim, sums, mask=channel_mask)
    if grad_state is not None:
        entry = (WIDTH - 1) - (tile.num_positions - tile.position)
        mask = channel_mask & tile.inside & tile.leaves & (entry >= 0)
        total += tl.load(grad_state + of_caller + entry, mask=mask, other=0.0)
    if ADD:
        pointers = _pointers(grad_x, t, channel)
        total += tl.load(pointers, mask=channel_mask & (t < time), other=0.0).to(tl.float32)
    tl.store(_pointers(grad_x, t, channel), total, mask=channel_mask & (t < time))

    if grad_initial_state is not None:
        if tl.program_id(1) == 0:
            _store_initial_gradient(
                grad_y, grad_state, x, weight, bias_row, initial_state, grad_initial_state, valid,
                dim, channel, channel_mask, block_frames, WIDTH, ENTRIES, REVERSE, SILU,
            )  # fmt: skip
