"""What the Triton kernels of the scan share: arguments, rows of frames, step sizes.

A tile of a (batch, dim, time) tensor is a tuple of rows, one per frame in scan order, each a block
(1, channels): frames are registers, never lanes, so that time needs no exchange between threads.

The direction is known at run time only, and so are lengths: a kernel of several thousand
instructions takes many seconds to compile, for each combination of what it is compiled for. Both
ways of a bidirectional scan therefore go through the same code, one after the other.

Tiles lie on multiples of their size in time, whatever the direction and wherever blocks of
``reset_every`` frames begin. Frames of a tile that lie outside the block at hand get a step size of
0, which hands the state on unchanged; instead of what they hold, the block's outermost frame is
read.
"""

# Triton's compiler has no unpacking within a tuple.
# ruff: noqa: RUF005

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ops.selective_scan.triton import TILE_FRAMES
from ops.triton_sequences import LOG2E, Sequence, num_valid_frames

# Frames between two kept states, and of a tile of the backward.
TILE = tl.constexpr(TILE_FRAMES)
# Frames that a scan unrolls, and fetches ahead. Divides TILE.
STEP = tl.constexpr(8)
# Lanes of a warp.
WARP = tl.constexpr(32)
# The last of a tuple of tuples: Triton 3.6 forgets the constants of the inner ones (a stride of 1)
# unless a constant of the outer one follows them.
END = 1


class WayPointers(NamedTuple):
    """One direction of a scan.

    A and constant B, C are (state, dim); time-varying B, C come from `pack_projection_kernel`; D
    and bias are (dim,), states (batch, tiles, state, dim), initial and last state (batch, state,
    dim). ``ends`` (batch, pieces, state + 1, dim) holds what `triton_pieces` explains: the state
    that each piece leaves, then its step sizes, added up. All of these are contiguous float32, or
    None.
    """

    u: Sequence
    delta: Sequence
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor | None
    bias: torch.Tensor | None
    states: torch.Tensor | None
    initial_state: torch.Tensor | None
    last_state: torch.Tensor | None
    ends: torch.Tensor
    end: int = END


@triton.jit
def channels_of_program(dim, num_groups, CHANNELS: tl.constexpr, FULL: tl.constexpr):
    """Group of the program, its channels (1, CHANNELS) and which of them exist (FULL: all)."""
    group_channels = dim // num_groups
    blocks = tl.cdiv(group_channels, CHANNELS)
    group = tl.program_id(0) // blocks
    within = (tl.program_id(0) % blocks) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    if CHANNELS < WARP:
        # See `places_of_states`; lanes that are left hold further states.
        within = tl.max_contiguous(within, [1, 1])
    # A mask known to be true leaves no trace in the code.
    exists = tl.full(within.shape, True, tl.int1) if FULL else within < group_channels
    return group, group * group_channels + within, exists


@triton.jit
def places_of_states(n, channel, dim, time):
    """Places (states, channels) in memory (state, dim).

    An access by four channels a thread would decide how threads compute. So the compiler does not
    learn that addresses are multiples of anything: ``time >> 31`` is 0, of which it knows nothing.
    """
    return n * dim + channel + (time >> 31)


@triton.jit
def either(first, second, is_second, BOTH: tl.constexpr):
    """Of two pointers or numbers that of the way at hand; without BOTH always the first."""
    picked = first
    if BOTH:
        picked = tl.where(is_second, second, first)
    return picked


@triton.jit
def load_parameter(first, second, is_second, channel, channel_mask, BOTH: tl.constexpr):
    """A parameter (dim,) of the way at hand for the program's channels; zeros if there is none."""
    row = tl.zeros(channel.shape, tl.float32)
    if first is not None:
        row = tl.load(
            either(first, second, is_second, BOTH) + channel, mask=channel_mask, other=0.0
        )
    return row


@triton.jit
def pointers_at(pointer, sequence, channel):
    """Pointers to frame 0 of the program's item and channels; ``sequence`` has the strides."""
    item = tl.program_id(2).to(tl.int64)
    return pointer + item * sequence.batch + channel.to(tl.int64) * sequence.channel


@triton.jit
def nearest_frame(t, lo, hi):
    """The frame of the block lo .. hi nearest to ``t``; the block's first where it is empty."""
    return tl.maximum(tl.minimum(t, hi - 1), lo)


@triton.jit
def _split_columns(tile, FRAMES: tl.constexpr):
    """The columns of a tile (channels, FRAMES), 8 or 16 of them, as rows."""
    parts = (tile,)
    for level in tl.static_range(4):
        if FRAMES >> level > 1:
            halves = ()
            for i in tl.static_range(1 << level):
                part = tl.reshape(parts[i], [tile.shape[0], 2, FRAMES >> (level + 1)])
                low, high = tl.split(tl.permute(part, [0, 2, 1]))
                halves = halves + (low, high)
            parts = halves
    rows = ()
    for i in tl.static_range(FRAMES):
        rows = rows + (tl.reshape(parts[i], [1, tile.shape[0]]),)
    return rows


@triton.jit
def _join_columns(rows, FRAMES: tl.constexpr):
    """Rows as a tile (channels, FRAMES)."""
    parts = ()
    for i in tl.static_range(FRAMES):
        parts = parts + (tl.reshape(rows[i], [rows[i].shape[1], 1]),)
    for level in tl.static_range(4):
        if FRAMES >> level > 1:
            pairs = ()
            for i in tl.static_range(FRAMES >> (level + 1)):
                low = parts[2 * i]
                pair = tl.permute(tl.join(low, parts[2 * i + 1]), [0, 2, 1])
                pairs = pairs + (tl.reshape(pair, [low.shape[0], 2 << level]),)
            parts = pairs
    return parts[0]


@triton.jit
def _turn(rows, reverse, FRAMES: tl.constexpr):
    """Rows in the order of time as rows in scan order, or the other way round."""
    turned = ()
    for i in tl.static_range(FRAMES):
        turned = turned + (tl.where(reverse, rows[FRAMES - 1 - i], rows[i]),)
    return turned


@triton.jit
def load_rows(
    pointer, sequence, channel, mask, start, lo, hi, reverse,
    FRAMES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """FRAMES rows in float32 from frame ``start`` on in scan order; ``sequence`` has the strides.

    Args:
        mask: like ``channel``; rows are zero where it is false.
    """
    if channel.shape[1] == WARP:
        # As one tile, whose threads follow memory order, then dealt out.
        earliest = start - tl.where(reverse, FRAMES - 1, 0)
        t = nearest_frame(earliest + tl.arange(0, FRAMES)[None, :], lo, hi)
        frame = (t.to(tl.int64) if WIDE else t) * sequence.frame
        pointers = pointers_at(pointer, sequence, tl.trans(channel)) + frame
        tile = tl.load(pointers, mask=tl.trans(mask), other=0.0)
        rows = _turn(_split_columns(tile.to(tl.float32), FRAMES), reverse, FRAMES)
    else:
        # With lanes left over, the threads of a tile would not agree with those of the states.
        first = pointers_at(pointer, sequence, channel)
        sign = tl.where(reverse, -1, 1)
        rows = ()
        for j in tl.static_range(FRAMES):
            t = nearest_frame(start + sign * j, lo, hi)
            row = first + (t.to(tl.int64) if WIDE else t) * sequence.frame
            rows = rows + (tl.load(row, mask=mask, other=0.0).to(tl.float32),)
    return rows


@triton.jit
def store_rows(
    pointer, sequence, rows, channel, channel_mask, start, lo, hi, reverse,
    FRAMES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Writes those of the rows that lie within lo .. hi; see `load_rows`."""
    if channel.shape[1] == WARP:
        earliest = start - tl.where(reverse, FRAMES - 1, 0)
        t = earliest + tl.arange(0, FRAMES)[None, :]
        frame = (t.to(tl.int64) if WIDE else t) * sequence.frame
        pointers = pointers_at(pointer, sequence, tl.trans(channel)) + frame
        tile = _join_columns(_turn(rows, reverse, FRAMES), FRAMES)
        tl.store(pointers, tile, mask=tl.trans(channel_mask) & (t >= lo) & (t < hi))
    else:
        first = pointers_at(pointer, sequence, channel)
        sign = tl.where(reverse, -1, 1)
        for j in tl.static_range(FRAMES):
            t = start + sign * j
            row = first + (t.to(tl.int64) if WIDE else t) * sequence.frame
            tl.store(row, rows[j], mask=channel_mask & (t >= lo) & (t < hi))


@triton.jit
def store_zeros(pointer, sequence, channel, channel_mask, lo, hi):
    """Zeros in the frames lo .. hi."""
    row = pointers_at(pointer, sequence, channel) + lo.to(tl.int64) * sequence.frame
    zeros = tl.zeros(channel.shape, tl.float32)
    for _ in range(lo, hi):
        tl.store(row, zeros, mask=channel_mask)
        row += sequence.frame


@triton.jit
def step_size(delta, bias, inside, SOFTPLUS: tl.constexpr):
    """The step size of a row and its derivative with respect to delta; 0 outside the block."""
    x = delta + bias
    if SOFTPLUS:
        # log(1 + exp(x)) = max(x, 0) + log1p(e), log1p(e) = 2 artanh(e / (2 + e)): small step sizes
        # keep their digits, which log(1 + e) would lose. The argument is at most 1/3, where seven
        # terms of the series are enough.
        e = tl.exp2(tl.abs(x) * -LOG2E)
        s = e / (2.0 + e)
        q = s * s
        series = 1.0 + q * (
            1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13)))))
        )
        dt = tl.maximum(x, 0.0) + 2.0 * s * series
        slope = tl.where(x >= 0.0, 1.0, e) / (1.0 + e)
    else:
        dt = x
        slope = tl.full(x.shape, 1.0, tl.float32)
    return tl.where(inside, dt, 0.0), tl.where(inside, slope, 0.0)


@triton.jit
def packed_frames(time):
    """Frames that a packed projection has room for."""
    return tl.cdiv(time, TILE) * TILE


@triton.jit
def packed_projection(packed, group, num_groups, time, NUM_STATE: tl.constexpr):
    """Where B or C of the program's item and group begins in packed memory."""
    item = tl.program_id(2).to(tl.int64)
    return packed + (item * num_groups + group) * packed_frames(time) * NUM_STATE


@triton.jit
def place_in_scan(t, time, reverse):
    """Where frame ``t`` stands in packed memory, which is in scan order."""
    return tl.where(reverse, packed_frames(time) - 1 - t, t)


@triton.jit(do_not_specialize=["time", "reversed_kinds"])
def pack_projections_kernel(
    source_0, source_1, source_2, source_3, packed, lengths, time, reversed_kinds, num_groups,
    stride_batch, stride_group, stride_state, stride_frame, NUM_STATE: tl.constexpr,
    STATES: tl.constexpr, FRAMES: tl.constexpr, KINDS: tl.constexpr,
):  # fmt: skip
    """B and C (batch, groups, state, time) to float32 (kinds, batch, groups, tiles * TILE, state).

    Frames stand in scan order, so that those of a tile lie at constant distances in either
    direction, and a thread reads the states of a frame as vectors. Padding becomes zero, which
    spares the scans a mask. Grid (blocks of FRAMES, groups * KINDS, batch).

    Args:
        source_0: the first of KINDS tensors of the same type and strides.
        reversed_kinds: bit i is set where source i is scanned in reverse.
    """
    item = tl.program_id(2).to(tl.int64)
    group = tl.program_id(1) % num_groups
    kind = tl.program_id(1) // num_groups
    source = source_0
    if KINDS > 1:
        source = tl.where(kind == 1, source_1, source)
    if KINDS > 2:
        source = tl.where(kind == 2, source_2, source)
    if KINDS > 3:
        source = tl.where(kind == 3, source_3, source)
    place = tl.program_id(0) * FRAMES + tl.arange(0, FRAMES)[None, :]
    t = place_in_scan(place, time, ((reversed_kinds >> kind) & 1) != 0)
    n = tl.arange(0, STATES)[:, None]
    source += item * stride_batch + group.to(tl.int64) * stride_group
    values = tl.load(
        source + n.to(tl.int64) * stride_state + t.to(tl.int64) * stride_frame,
        mask=(n < NUM_STATE) & (t >= 0) & (t < num_valid_frames(lengths, time)),
        other=0.0,
    )
    row = (kind * tl.num_programs(2) + item) * num_groups + group
    target = packed + (row * packed_frames(time) + place) * NUM_STATE + n
    tl.store(target, values, mask=(n < NUM_STATE) & (place < packed_frames(time)))
