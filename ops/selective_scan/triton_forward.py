"""Triton kernel of the selective scan, forward: a thread carries a channel through a piece of time.

What bounds it. A frame of a channel with 16 states costs 16 exponentials, besides 4 for the step
size and the gate, and as many bytes as its inputs and output have: 16 in float32. On a Hopper GPU
the special function units need about as long for the former as the memory for the latter, and
everything else must fit beside them. So

- A thread owns a channel and keeps its states in registers: the sum over states needs no exchange,
  time no parallel scan. Channels are the lanes: memory with channels last is read in whole lines.
- The next frames are fetched while the present ones are computed.
- Where there are too few channels to fill the GPU, time is cut (`triton_pieces`).
- Both directions of a bidirectional layer run one after the other in the same program, over the
  same piece and through the same code. The second adds to what the first wrote, which is still in
  the caches: nothing is flipped, nothing is stored twice.
"""

# Triton's compiler has no unpacking within a tuple.
# ruff: noqa: RUF005

import triton
import triton.language as tl

from ops.selective_scan.triton_pieces import blocks_of_piece, entering_state, segment_of
from ops.selective_scan.triton_rows import (
    STEP,
    TILE,
    channels_of_program,
    either,
    load_parameter,
    load_rows,
    nearest_frame,
    packed_projection,
    place_in_scan,
    places_of_states,
    step_size,
    store_rows,
    store_zeros,
)
from ops.triton_sequences import LOG2E, num_valid_frames, sigmoid


@triton.jit
def _scan_way(
    first, second, is_second, z, y, valid, time, dim, group, num_groups, channel, channel_mask,
    reverse, block_frames, piece_frames, output_scale, add, NUM_STATE: tl.constexpr,
    STATES: tl.constexpr, BOTH: tl.constexpr, ADD: tl.constexpr, VARIABLE_B: tl.constexpr,
    VARIABLE_C: tl.constexpr, SOFTPLUS: tl.constexpr, CUT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Scans the program's piece of an item; where ``add``, on top of ``y``."""
    piece = tl.program_id(1)
    sign = tl.where(reverse, -1, 1)
    item = tl.program_id(2).to(tl.int64)
    n = tl.arange(0, STATES)[:, None]
    state_mask = (n < NUM_STATE) & channel_mask
    of_parameter = places_of_states(n, channel, dim, time)
    of_item = item * NUM_STATE * dim + of_parameter
    u = either(first.u.pointer, second.u.pointer, is_second, BOTH)
    delta = either(first.delta.pointer, second.delta.pointer, is_second, BOTH)
    A = either(first.A, second.A, is_second, BOTH)
    B = either(first.B, second.B, is_second, BOTH)
    C = either(first.C, second.C, is_second, BOTH)
    last_state = either(first.last_state, second.last_state, is_second, BOTH)
    A2 = tl.load(A + of_parameter, mask=state_mask, other=0.0) * LOG2E
    D_row = load_parameter(first.D, second.D, is_second, channel, channel_mask, BOTH)
    bias_row = load_parameter(first.bias, second.bias, is_second, channel, channel_mask, BOTH)
    if VARIABLE_B:
        B = packed_projection(B, group, num_groups, time, NUM_STATE) + n
    else:
        B_t = tl.load(B + of_parameter, mask=state_mask, other=0.0)
    if VARIABLE_C:
        C = packed_projection(C, group, num_groups, time, NUM_STATE) + n
    else:
        C_t = tl.load(C + of_parameter, mask=state_mask, other=0.0)

    ends = either(first.ends, second.ends, is_second, BOTH)
    block_from, block_to = blocks_of_piece(piece, block_frames, piece_frames, valid)
    for block in range(block_from, block_to):
        segment = segment_of(block, piece, block_frames, piece_frames, valid, reverse)
        lo = segment.lo
        hi = segment.hi
        h = tl.zeros([STATES, channel.shape[1]], tl.float32)
        if first.initial_state is not None:
            enters = segment.enters
            if BOTH:
                # Only the first way has states from and to somewhere else.
                enters = enters & (is_second == 0)
            h = tl.load(first.initial_state + of_item, mask=state_mask & enters, other=0.0)
        h = entering_state(
            h, A2, ends, piece, tl.num_programs(1), segment.distance, reverse, dim, channel,
            of_parameter, state_mask, channel_mask, NUM_STATE,
        )  # fmt: skip

        step_from = lo // STEP
        step_to = tl.where(hi > lo, tl.cdiv(hi, STEP), step_from)
        start = tl.where(reverse, step_to * STEP - 1, step_from * STEP)
        next_u = load_rows(u, first.u, channel, channel_mask, start, lo, hi, reverse, STEP, WIDE)
        next_delta = load_rows(
            delta, first.delta, channel, channel_mask, start, lo, hi, reverse, STEP, WIDE
        )
        next_z = next_u
        if z is not None:
            next_z = load_rows(
                z.pointer, z, channel, channel_mask, start, lo, hi, reverse, STEP, WIDE
            )
        for i in range(step_to - step_from):
            u_rows = next_u
            delta_rows = next_delta
            z_rows = next_z
            after = start + sign * STEP
            next_u = load_rows(
                u, first.u, channel, channel_mask, after, lo, hi, reverse, STEP, WIDE
            )
            next_delta = load_rows(
                delta, first.delta, channel, channel_mask, after, lo, hi, reverse, STEP, WIDE
            )
            next_z = next_u
            if z is not None:
                next_z = load_rows(
                    z.pointer, z, channel, channel_mask, after, lo, hi, reverse, STEP, WIDE
                )
            if ADD:
                y_rows = load_rows(
                    y.pointer, y, channel, channel_mask & add, start, lo, hi, reverse, STEP, WIDE
                )
            if first.states is not None:
                states = either(first.states, second.states, is_second, BOTH)
                edge = tl.where(reverse, start + 1, start)
                if (edge % TILE == 0) & ((i > 0) | (segment.distance > 0)):
                    tile = item * (tl.cdiv(time, TILE) - 1)
                    tile += tl.where(reverse, start // TILE, start // TILE - 1)
                    kept_states = states + tile * NUM_STATE * dim
                    tl.store(kept_states + of_parameter, h, mask=state_mask)

            rows = ()
            place = place_in_scan(start, time, reverse)
            for j in tl.static_range(STEP):
                t = start + sign * j
                # Without cuts the distance is a constant and costs no address arithmetic.
                away = sign * (nearest_frame(t, lo, hi) - start) if CUT else j
                if VARIABLE_B:
                    B_start = B + place * NUM_STATE
                    B_t = tl.load(B_start + away * NUM_STATE, mask=n < NUM_STATE, other=0.0)
                if VARIABLE_C:
                    C_start = C + place * NUM_STATE
                    C_t = tl.load(C_start + away * NUM_STATE, mask=n < NUM_STATE, other=0.0)
                dt, _ = step_size(delta_rows[j], bias_row, (t >= lo) & (t < hi), SOFTPLUS)
                h = tl.exp2(dt * A2) * h + (dt * u_rows[j]) * B_t
                row = (tl.sum(h * C_t, axis=0, keep_dims=True) + D_row * u_rows[j]) * output_scale
                if z is not None:
                    row *= z_rows[j] * sigmoid(z_rows[j])
                if ADD:
                    row += y_rows[j]
                rows = rows + (row,)
            store_rows(
                y.pointer, y, rows, channel, channel_mask, start, lo, hi, reverse, STEP, WIDE
            )
            start = after
        # Where a scan the other way round would begin.
        turned = segment_of(block, piece, block_frames, piece_frames, valid, reverse == 0)
        tl.store(last_state + of_item, h, mask=state_mask & turned.enters)


@triton.jit(
    do_not_specialize=[
        "time", "first_reverse", "second_reverse", "first_block_frames", "second_block_frames",
        "piece_frames", "add",
    ]
)  # fmt: skip
def selective_scan_forward_kernel(
    first, second, z, y, lengths, time, dim, num_groups, first_reverse, second_reverse,
    first_block_frames, second_block_frames, piece_frames, add, output_scale,
    NUM_STATE: tl.constexpr, STATES: tl.constexpr, CHANNELS: tl.constexpr,
    FULL_CHANNELS: tl.constexpr, BOTH: tl.constexpr, ADD: tl.constexpr, VARIABLE_B: tl.constexpr,
    VARIABLE_C: tl.constexpr, SOFTPLUS: tl.constexpr, CUT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One way, or the sum of two. Grid (blocks of channels, pieces, batch).

    Args:
        first: `WayPointers`.
        second: another if BOTH, with the same strides and the same parts as the first but for the
            initial state, which only the first has; else the first again.
        z: `Sequence` or None.
        y: `Sequence`.
        lengths: int64 (batch,) or None.
        first_block_frames: frames after which the first way begins anew.
        piece_frames: frames of a piece; of a single piece ``ends`` are not read.
        add: nonzero to add to what ``y`` holds, which needs ADD; the second way always does.
        output_scale: factor of the output.
    """
    group, channel, channel_mask = channels_of_program(dim, num_groups, CHANNELS, FULL_CHANNELS)
    valid = num_valid_frames(lengths, time)
    for way in range(2 if BOTH else 1):
        is_second = way == 1
        if BOTH:
            # The second way reads what other threads of the program have written.
            tl.debug_barrier()
        _scan_way(
            first, second, is_second, z, y, valid, time, dim, group, num_groups, channel,
            channel_mask, either(first_reverse, second_reverse, is_second, BOTH) != 0,
            either(first_block_frames, second_block_frames, is_second, BOTH), piece_frames,
            output_scale, is_second | (add != 0), NUM_STATE, STATES, BOTH, ADD, VARIABLE_B,
            VARIABLE_C, SOFTPLUS, CUT, WIDE,
        )  # fmt: skip
    if lengths is not None:
        padding_from = tl.maximum(tl.program_id(1) * piece_frames, valid)
        padding_to = tl.minimum((tl.program_id(1) + 1) * piece_frames, time)
        store_zeros(y.pointer, y, channel, channel_mask, padding_from, padding_to)
