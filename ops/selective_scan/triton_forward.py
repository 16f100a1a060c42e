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
- Both directions of a bidirectional layer run one after the other in the same program. The second
  adds to what the first wrote: nothing is flipped, nothing is stored twice.

The block sizes come from this arithmetic and from the compiled code; they have not been tuned by
measurements.
"""

# Triton's compiler has no unpacking within a tuple.
# ruff: noqa: RUF005

import triton
import triton.language as tl

from ops.selective_scan.triton_rows import (
    LOG2E,
    TILE,
    channels_of_program,
    load_parameter,
    load_rows,
    nearest_frame,
    num_valid_frames,
    packed_projection,
    sigmoid,
    step_size,
    store_rows,
    store_zeros,
)

# Frames that are unrolled, and fetched ahead. Divides TILE.
STEP = tl.constexpr(8)


@triton.jit
def _scan_way(
    way, z, y, valid, time, dim, group, num_groups, channel, channel_mask, block_from, block_to,
    output_scale, NUM_STATE: tl.constexpr, STATES: tl.constexpr, REVERSE: tl.constexpr,
    ADD: tl.constexpr, VARIABLE_B: tl.constexpr, VARIABLE_C: tl.constexpr, SOFTPLUS: tl.constexpr,
    CUT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Scans the blocks block_from .. block_to of an item; with ADD on top of what ``y`` holds."""
    SIGN: tl.constexpr = -1 if REVERSE else 1
    item = tl.program_id(2).to(tl.int64)
    n = tl.arange(0, STATES)[:, None]
    state_mask = (n < NUM_STATE) & channel_mask
    of_parameter = n * dim + channel
    of_item = item * NUM_STATE * dim + of_parameter
    A2 = tl.load(way.A + of_parameter, mask=state_mask, other=0.0) * LOG2E
    D_row = load_parameter(way.D, channel, channel_mask)
    bias_row = load_parameter(way.bias, channel, channel_mask)
    if VARIABLE_B:
        B = packed_projection(way.B, group, num_groups, time, NUM_STATE) + n
    else:
        B_t = tl.load(way.B + of_parameter, mask=state_mask, other=0.0)
    if VARIABLE_C:
        C = packed_projection(way.C, group, num_groups, time, NUM_STATE) + n
    else:
        C_t = tl.load(way.C + of_parameter, mask=state_mask, other=0.0)

    final_block = tl.maximum(valid - 1, 0) // way.block_frames
    block_to = tl.minimum(block_to, final_block + 1)
    for block in range(block_from, block_to):
        lo = block * way.block_frames
        hi = tl.minimum(lo + way.block_frames, valid)
        h = tl.zeros([STATES, channel.shape[1]], tl.float32)
        if way.initial_state is not None:
            enters = block == (final_block if REVERSE else 0)
            h = tl.load(way.initial_state + of_item, mask=state_mask & enters, other=0.0)

        step_from = lo // STEP
        step_to = tl.where(hi > lo, tl.cdiv(hi, STEP), step_from)
        start = step_to * STEP - 1 if REVERSE else step_from * STEP
        next_u = load_rows(way.u, channel, channel_mask, start, lo, hi, STEP, SIGN, WIDE)
        next_delta = load_rows(way.delta, channel, channel_mask, start, lo, hi, STEP, SIGN, WIDE)
        next_z = next_u
        if z is not None:
            next_z = load_rows(z, channel, channel_mask, start, lo, hi, STEP, SIGN, WIDE)
        for i in range(step_to - step_from):
            u_rows = next_u
            delta_rows = next_delta
            z_rows = next_z
            after = start + SIGN * STEP
            next_u = load_rows(way.u, channel, channel_mask, after, lo, hi, STEP, SIGN, WIDE)
            next_delta = load_rows(
                way.delta, channel, channel_mask, after, lo, hi, STEP, SIGN, WIDE
            )
            next_z = next_u
            if z is not None:
                next_z = load_rows(z, channel, channel_mask, after, lo, hi, STEP, SIGN, WIDE)
            if ADD:
                y_rows = load_rows(y, channel, channel_mask, start, lo, hi, STEP, SIGN, WIDE)
            if way.states is not None:
                edge = start + 1 if REVERSE else start
                if (edge % TILE == 0) & (i > 0):
                    tile = item * (tl.cdiv(time, TILE) - 1) + start // TILE - (0 if REVERSE else 1)
                    kept_states = way.states + tile * NUM_STATE * dim
                    tl.store(kept_states + of_parameter, h, mask=state_mask)

            rows = ()
            for j in tl.static_range(STEP):
                t = start + SIGN * j
                # Without cuts the distance is a constant and costs no address arithmetic.
                away = nearest_frame(t, lo, hi) - start if CUT else SIGN * j
                if VARIABLE_B:
                    B_start = B + start * NUM_STATE
                    B_t = tl.load(B_start + away * NUM_STATE, mask=n < NUM_STATE, other=0.0)
                if VARIABLE_C:
                    C_start = C + start * NUM_STATE
                    C_t = tl.load(C_start + away * NUM_STATE, mask=n < NUM_STATE, other=0.0)
                dt, _ = step_size(delta_rows[j], bias_row, (t >= lo) & (t < hi), SOFTPLUS)
                h = tl.exp2(dt * A2) * h + (dt * u_rows[j]) * B_t
                row = (tl.sum(h * C_t, axis=0, keep_dims=True) + D_row * u_rows[j]) * output_scale
                if z is not None:
                    row *= z_rows[j] * sigmoid(z_rows[j])
                if ADD:
                    row += y_rows[j]
                rows = rows + (row,)
            store_rows(y, rows, channel, channel_mask, start, lo, hi, STEP, SIGN, WIDE)
            start = after
        leaves = block == (0 if REVERSE else final_block)
        tl.store(way.last_state + of_item, h, mask=state_mask & leaves)


@triton.jit
def selective_scan_forward_kernel(
    first, second, z, y, lengths, time, dim, num_groups, blocks_per_program,
    NUM_STATE: tl.constexpr, STATES: tl.constexpr, CHANNELS: tl.constexpr,
    FULL_CHANNELS: tl.constexpr, REVERSE: tl.constexpr, SECOND_REVERSE: tl.constexpr,
    VARIABLE_B: tl.constexpr, VARIABLE_C: tl.constexpr, SECOND_VARIABLE_B: tl.constexpr,
    SECOND_VARIABLE_C: tl.constexpr, BOTH: tl.constexpr, SOFTPLUS: tl.constexpr,
    CUT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One way, or the mean of two. Grid (blocks of channels, programs in time, batch).

    Args:
        first: `WayPointers`.
        second: another if BOTH, else None; with it, a program takes all blocks. Triton 3.6 cannot
            ask a tuple that holds a None whether it is one.
        z: `Sequence` or None.
        y: `Sequence`.
        lengths: int64 (batch,) or None.
        blocks_per_program: how many blocks of ``first.block_frames`` a program takes.
    """
    group, channel, channel_mask = channels_of_program(dim, num_groups, CHANNELS, FULL_CHANNELS)
    valid = num_valid_frames(lengths, time)
    block_from = tl.program_id(1) * blocks_per_program
    block_to = tl.minimum(block_from + blocks_per_program, tl.cdiv(time, first.block_frames))
    _scan_way(
        first, z, y, valid, time, dim, group, num_groups, channel, channel_mask, block_from,
        block_to, 0.5 if BOTH else 1.0, NUM_STATE, STATES, REVERSE, False, VARIABLE_B,
        VARIABLE_C, SOFTPLUS, CUT, WIDE,
    )  # fmt: skip
    if BOTH:
        # The second way reads what other threads of the program have written.
        tl.debug_barrier()
        _scan_way(
            second, z, y, valid, time, dim, group, num_groups, channel, channel_mask, 0,
            tl.cdiv(time, second.block_frames), 0.5, NUM_STATE, STATES, SECOND_REVERSE, True,
            SECOND_VARIABLE_B, SECOND_VARIABLE_C, SOFTPLUS, CUT, WIDE,
        )  # fmt: skip
    if lengths is not None:
        padding_from = tl.maximum(block_from * first.block_frames, valid)
        padding_to = tl.minimum(block_to * first.block_frames, time)
        store_zeros(y, channel, channel_mask, padding_from, padding_to)
