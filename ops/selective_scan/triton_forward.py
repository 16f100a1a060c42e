"""Triton kernel of the selective scan, forward: a thread carries a channel through time.

What bounds it. A frame of a channel with 16 states costs 16 exponentials, besides 4 for the step
size and the gate, and as many bytes as its inputs and output have: 16 in float32. On a Hopper GPU
the special function units need about as long for the former as the memory for the latter, and
everything else must fit beside them. So

- A thread owns a channel and keeps its states in registers: the sum over states needs no exchange,
  time no parallel scan, every decay is computed once. Channels are the lanes: memory with channels
  last is read in whole lines.
- The next frames are fetched while the present ones are computed.
- Where there are too few channels to fill the GPU, a program takes fewer than 32 and spreads the
  states over the lanes that are left.
- Both directions of a bidirectional layer run one after the other in the same program and through
  the same code. The second adds to what the first wrote: nothing is flipped, nothing is stored
  twice.

The block sizes come from this arithmetic and from the compiled code; they have not been tuned by
measurements.
"""

# Triton's compiler has no unpacking within a tuple.
# ruff: noqa: RUF005

import triton
import triton.language as tl

from ops.selective_scan.triton_rows import (
    TILE,
    channels_of_program,
    either,
    load_parameter,
    load_rows,
    nearest_frame,
    packed_projection,
    place_in_scan,
    step_size,
    store_rows,
    store_zeros,
)
from ops.triton_sequences import LOG2E, num_valid_frames, sigmoid

# Frames that are unrolled, and fetched ahead. Divides TILE.
STEP = tl.constexpr(8)


@triton.jit
def _scan_way(
    first, second, is_second, z, y, valid, time, dim, group, num_groups, channel, channel_mask,
    reverse, block_frames, block_from, block_to, output_scale, add, NUM_STATE: tl.constexpr,
    STATES: tl.constexpr, BOTH: tl.constexpr, ADD: tl.constexpr, VARIABLE_B: tl.constexpr,
    VARIABLE_C: tl.constexpr, SOFTPLUS: tl.constexpr, CUT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Scans the blocks block_from .. block_to of an item; where ``add``, on top of ``y``."""
    sign = tl.where(reverse, -1, 1)
    item = tl.program_id(2).to(tl.int64)
    n = tl.arange(0, STATES)[:, None]
    state_mask = (n < NUM_STATE) & channel_mask
    of_parameter = n * dim + channel
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

    final_block = tl.maximum(valid - 1, 0) // block_frames
    block_to = tl.minimum(block_to, final_block + 1)
    for block in range(block_from, block_to):
        lo = block * block_frames
        hi = tl.minimum(lo + block_frames, valid)
        h = tl.zeros([STATES, channel.shape[1]], tl.float32)
        if first.initial_state is not None:
            enters = block == tl.where(reverse, final_block, 0)
            if BOTH:
                enters = enters & (is_second == 0)
            h = tl.load(first.initial_state + of_item, mask=state_mask & enters, other=0.0)

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
                if (edge % TILE == 0) & (i > 0):
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
        leaves = block == tl.where(reverse, 0, final_block)
        tl.store(last_state + of_item, h, mask=state_mask & leaves)


@triton.jit(
    do_not_specialize=[
        "time", "first_reverse", "second_reverse", "first_block_frames", "second_block_frames",
        "blocks_per_program", "add",
    ]
)  # fmt: skip
def selective_scan_forward_kernel(
    first, second, z, y, lengths, time, dim, num_groups, first_reverse, second_reverse,
    first_block_frames, second_block_frames, blocks_per_program, add, output_scale,
    NUM_STATE: tl.constexpr, STATES: tl.constexpr, CHANNELS: tl.constexpr,
    FULL_CHANNELS: tl.constexpr, BOTH: tl.constexpr, ADD: tl.constexpr, VARIABLE_B: tl.constexpr,
    VARIABLE_C: tl.constexpr, SOFTPLUS: tl.constexpr, CUT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One way, or the sum of two. Grid (blocks of channels, programs in time, batch).

    Args:
        first: `WayPointers`.
        second: another if BOTH, with the same strides and the same parts as the first but for the
            initial state, which only the first has; else the first again.
        z: `Sequence` or None.
        y: `Sequence`.
        lengths: int64 (batch,) or None.
        first_block_frames: frames after which the first way begins anew.
        blocks_per_program: how many of these blocks a program takes; all of them if BOTH.
        add: nonzero to add to what ``y`` holds, which needs ADD; the second way always does.
        output_scale: factor of the output.
    """
    group, channel, channel_mask = channels_of_program(dim, num_groups, CHANNELS, FULL_CHANNELS)
    valid = num_valid_frames(lengths, time)
    block_from = tl.program_id(1) * blocks_per_program
    block_to = tl.minimum(block_from + blocks_per_program, tl.cdiv(time, first_block_frames))
    for way in range(2 if BOTH else 1):
        is_second = way == 1
        if BOTH:
            # The second way reads what other threads of the program have written.
            tl.debug_barrier()
        block_frames = either(first_block_frames, second_block_frames, is_second, BOTH)
        _scan_way(
            first, second, is_second, z, y, valid, time, dim, group, num_groups, channel,
            channel_mask, either(first_reverse, second_reverse, is_second, BOTH) != 0, block_frames,
            block_from, either(block_to, tl.cdiv(time, block_frames), is_second, BOTH),
            output_scale, is_second | (add != 0), NUM_STATE, STATES, BOTH, ADD, VARIABLE_B,
            VARIABLE_C, SOFTPLUS, CUT, WIDE,
        )  # fmt: skip
    if lengths is not None:
        padding_from = tl.maximum(block_from * first_block_frames, valid)
        padding_to = tl.minimum(block_to * first_block_frames, time)
        store_zeros(y.pointer, y, channel, channel_mask, padding_from, padding_to)
