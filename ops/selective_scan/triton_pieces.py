"""Cuts time into pieces that run at once: where a piece lies, and what enters it.

A thread that carries a channel through thousands of frames leaves most of a GPU idle. So a program
takes a piece of some hundred frames, and a launch before it finds for every piece the state that
its own frames leave behind, from nothing, and the sum of its step sizes, whose exponential is all
that remains of what entered. From those of the pieces before its own each program then puts the
state together that enters: a step of a scan per piece instead of per frame. That first launch
repeats the exponentials of the scan, and little else of it.

The gradient of the state runs through the pieces the other way round, by the same kernel.

Pieces lie on multiples of their size in time, which is a multiple of TILE; where the state is reset
every so many frames, a piece can hold several blocks and a block several pieces. Of a block and a
piece the frames they share are the segment.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ops.selective_scan.triton_rows import (
    STEP,
    channels_of_program,
    either,
    load_parameter,
    load_rows,
    nearest_frame,
    packed_projection,
    place_in_scan,
    places_of_states,
    step_size,
)
from ops.triton_sequences import LOG2E, num_valid_frames, sigmoid


class Segment(NamedTuple):
    """The frames lo .. hi that a block and a piece share.

    ``distance`` counts the pieces of the block that are scanned before this one; what comes from
    outside ``enters`` here, if there are none and the block is the first one.
    """

    lo: torch.Tensor
    hi: torch.Tensor
    distance: torch.Tensor
    enters: torch.Tensor


@triton.jit
def segment_of(block, piece, block_frames, piece_frames, valid, reverse):
    """`Segment`, scanned in ``reverse`` or not."""
    block_lo = block * block_frames
    block_hi = tl.minimum(block_lo + block_frames, valid)
    lo = tl.maximum(block_lo, piece * piece_frames)
    hi = tl.minimum(block_hi, (piece + 1) * piece_frames)
    scanned_first = tl.where(reverse, tl.maximum(block_hi - 1, block_lo), block_lo)
    distance = tl.abs(piece - scanned_first // piece_frames)
    final_block = tl.maximum(valid - 1, 0) // block_frames
    enters = (block == tl.where(reverse, final_block, 0)) & (distance == 0)
    return Segment(lo, hi, distance, enters)


@triton.jit
def blocks_of_piece(piece, block_frames, piece_frames, valid):
    """The blocks from .. to with valid frames in the piece; the first piece has at least one."""
    lo = piece * piece_frames
    hi = tl.minimum(lo + piece_frames, valid)
    block_from = lo // block_frames
    block_to = tl.where(hi > lo, tl.cdiv(hi, block_frames), block_from + (piece == 0).to(tl.int32))
    return block_from, block_to


@triton.jit
def entering_state(
    entered, A2, ends, piece, num_pieces, distance, reverse, dim, channel, of_parameter, state_mask,
    channel_mask, NUM_STATE: tl.constexpr,
):  # fmt: skip
    """The state (states, channels) in front of a piece, ``entered`` in front of the block."""
    h = entered
    item = tl.program_id(2).to(tl.int64)
    for i in range(distance):
        away = distance - i
        row = item * num_pieces + tl.where(reverse, piece + away, piece - away)
        ends_of_piece = ends + row * (NUM_STATE + 1) * dim
        end = tl.load(ends_of_piece + of_parameter, mask=state_mask, other=0.0)
        step = tl.load(ends_of_piece + NUM_STATE * dim + channel, mask=channel_mask, other=0.0)
        h = tl.exp2(step * A2) * h + end
    return h


@triton.jit(
    do_not_specialize=[
        "time", "first_reverse", "second_reverse", "first_block_frames", "second_block_frames",
        "piece_frames",
    ]
)  # fmt: skip
def selective_scan_ends_kernel(
    first, second, z, grad_y, lengths, time, dim, num_groups, first_reverse, second_reverse,
    first_block_frames, second_block_frames, piece_frames, output_scale,
    NUM_STATE: tl.constexpr, STATES: tl.constexpr, CHANNELS: tl.constexpr,
    FULL_CHANNELS: tl.constexpr, BOTH: tl.constexpr, VARIABLE: tl.constexpr,
    SOFTPLUS: tl.constexpr, CUT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What the frames of each piece leave behind. Grid (blocks of channels, pieces * ways, batch).

    Args:
        first: `WayPointers`, whose ``ends`` are written.
        second: another if BOTH, else the first again.
        z: `Sequence` or None.
        grad_y: `Sequence`; None for the states. If given, the gradients of the states: ``reverse``
            is then the opposite of the way's, ``initial_state`` the gradient of the last state.
        VARIABLE: whether B, or for gradients C, varies over time.
    """
    group, channel, channel_mask = channels_of_program(dim, num_groups, CHANNELS, FULL_CHANNELS)
    valid = num_valid_frames(lengths, time)
    item = tl.program_id(2).to(tl.int64)
    num_pieces = tl.cdiv(time, piece_frames)
    piece = tl.program_id(1) % num_pieces
    is_second = tl.program_id(1) >= num_pieces
    reverse = either(first_reverse, second_reverse, is_second, BOTH) != 0
    block_frames = either(first_block_frames, second_block_frames, is_second, BOTH)
    sign = tl.where(reverse, -1, 1)
    n = tl.arange(0, STATES)[:, None]
    state_mask = (n < NUM_STATE) & channel_mask
    of_parameter = places_of_states(n, channel, dim, time)
    delta = either(first.delta.pointer, second.delta.pointer, is_second, BOTH)
    A = either(first.A, second.A, is_second, BOTH)
    A2 = tl.load(A + of_parameter, mask=state_mask, other=0.0) * LOG2E
    bias_row = load_parameter(first.bias, second.bias, is_second, channel, channel_mask, BOTH)
    if grad_y is None:
        inputs = first.u
        x = either(first.u.pointer, second.u.pointer, is_second, BOTH)
        projection = either(first.B, second.B, is_second, BOTH)
    else:
        inputs = grad_y
        x = grad_y.pointer
        projection = either(first.C, second.C, is_second, BOTH)
    if VARIABLE:
        projection = packed_projection(projection, group, num_groups, time, NUM_STATE) + n
    else:
        P_t = tl.load(projection + of_parameter, mask=state_mask, other=0.0)

    # The block that is scanned last of those in the piece; nobody asks for the last piece.
    piece_to = tl.minimum((piece + 1) * piece_frames, valid)
    ending = tl.where(reverse, piece * piece_frames, tl.maximum(piece_to - 1, 0))
    block = ending // block_frames
    segment = segment_of(block, piece, block_frames, piece_frames, valid, reverse)
    lo = segment.lo
    wanted = tl.where(reverse, piece > 0, (piece + 1) * piece_frames < valid)
    hi = tl.where(wanted, segment.hi, lo)
    h = tl.zeros([STATES, CHANNELS], tl.float32)
    if first.initial_state is not None:
        enters = segment.enters & wanted
        if BOTH:
            enters = enters & (is_second == 0)
        of_item = item * NUM_STATE * dim + of_parameter
        h = tl.load(first.initial_state + of_item, mask=state_mask & enters, other=0.0)
    step_row = tl.zeros([1, CHANNELS], tl.float32)

    step_from = lo // STEP
    step_to = tl.where(hi > lo, tl.cdiv(hi, STEP), step_from)
    start = tl.where(reverse, step_to * STEP - 1, step_from * STEP)
    next_x = load_rows(x, inputs, channel, channel_mask, start, lo, hi, reverse, STEP, WIDE)
    next_delta = load_rows(
        delta, first.delta, channel, channel_mask, start, lo, hi, reverse, STEP, WIDE
    )
    next_z = next_x
    if z is not None:
        next_z = load_rows(z.pointer, z, channel, channel_mask, start, lo, hi, reverse, STEP, WIDE)
    for _ in range(step_to - step_from):
        x_rows = next_x
        delta_rows = next_delta
        z_rows = next_z
        after = start + sign * STEP
        next_x = load_rows(x, inputs, channel, channel_mask, after, lo, hi, reverse, STEP, WIDE)
        next_delta = load_rows(
            delta, first.delta, channel, channel_mask, after, lo, hi, reverse, STEP, WIDE
        )
        next_z = next_x
        if z is not None:
            next_z = load_rows(
                z.pointer, z, channel, channel_mask, after, lo, hi, reverse, STEP, WIDE
            )
        # Packed memory is in the order in which the way is scanned.
        if grad_y is None:
            place = place_in_scan(start, time, reverse)
        else:
            place = place_in_scan(start, time, reverse == 0)
        for j in tl.static_range(STEP):
            t = start + sign * j
            inside = (t >= lo) & (t < hi)
            if VARIABLE:
                away = sign * (nearest_frame(t, lo, hi) - start) if CUT else j
                if grad_y is not None:
                    away = -away
                entry = projection + place * NUM_STATE + away * NUM_STATE
                P_t = tl.load(entry, mask=n < NUM_STATE, other=0.0)
            dt, _ = step_size(delta_rows[j], bias_row, inside, SOFTPLUS)
            step_row += dt
            decay = tl.exp2(dt * A2)
            if grad_y is None:
                h = decay * h + (dt * x_rows[j]) * P_t
            else:
                dy = x_rows[j] * output_scale
                if z is not None:
                    dy *= z_rows[j] * sigmoid(z_rows[j])
                h = decay * (h + tl.where(inside, dy, 0.0) * P_t)
        start = after
    row = item * num_pieces + piece
    ends = either(first.ends, second.ends, is_second, BOTH)
    ends += row * (NUM_STATE + 1) * dim
    tl.store(ends + of_parameter, h, mask=state_mask)
    tl.store(ends + NUM_STATE * dim + channel, step_row, mask=channel_mask)
