"""Triton kernel of the selective scan, backward: one state at a time over a tile of frames.

The forward kept the state in front of every tile. The tiles are taken in opposite order. Within a
tile the loop runs over states: it recomputes a state over 16 frames, holds its values and decays in
registers and goes back over them, so that every decay is computed once and nothing is exchanged
for sums over states, which accumulate per frame in registers.

Gradients of time-varying B and C are sums over channels, that is over lanes. The 32 sums of a state
(16 frames of B, 16 of C) fold into one another in 31 exchanges, where one after the other would
take 160, and end as one row in memory. Every block of 32 channels leaves its own part, which
torch adds up: no atomics, the same bits every time. The parts together are twice (state / 32) times
the size of the input.

Where there are too few channels to fill the GPU, SPLIT warps of a program share the states.

About 27 instructions per state and frame are issued, 9 of them for the folding, which takes longer
than the memory needs for the same frame. Not tuned by measurements.
"""

# Triton's compiler has no unpacking within a tuple.
# ruff: noqa: RUF005

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ops.selective_scan.triton_rows import (
    END,
    LOG2E,
    TILE,
    WARP,
    Sequence,
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


class WayGradientPointers(NamedTuple):
    """Where the gradients of a `WayPointers` go; contiguous float32 but for u and delta.

    Those of parameters remain to be added up over their first two axes, batch and programs in time:
    A, constant B and C (batch, programs, state, dim), D and bias (batch, programs, dim). Those of
    time-varying B and C stand in ``projections`` (one or both, batch, blocks of channels, state,
    time), where frames beyond an item's length are left as they are. ``carry`` (batch, programs,
    state, dim) ends, in the program that holds the block scanned first, as the gradient of the
    initial state. ``last_state`` (batch, state, dim) is read.
    """

    u: Sequence
    delta: Sequence
    A: torch.Tensor
    B: torch.Tensor | None
    C: torch.Tensor | None
    D: torch.Tensor
    bias: torch.Tensor
    projections: torch.Tensor | None
    carry: torch.Tensor
    last_state: torch.Tensor | None
    end: int = END


@triton.jit
def _halve(values, lane, DISTANCE: tl.constexpr):
    """Half as many values: of a pair, each lane keeps one and gets its partner's part of it."""
    upper = (lane & DISTANCE) != 0
    halves = ()
    for i in tl.static_range(DISTANCE):
        low = values[i]
        high = values[i + DISTANCE]
        given = tl.where(upper, low, high)
        partner = tl.broadcast_to(lane ^ DISTANCE, given.shape)
        halves = halves + (tl.where(upper, high, low) + tl.gather(given, partner, 1),)
    return halves


@triton.jit
def _fold(values, lane, COUNT: tl.constexpr):
    """Sums of COUNT (16 or 32) rows over their 32 lanes: lane i gets the sum of row i % COUNT."""
    if COUNT == 32:
        values = _halve(values, lane, 16)
    values = _halve(values, lane, 8)
    values = _halve(values, lane, 4)
    values = _halve(values, lane, 2)
    values = _halve(values, lane, 1)
    total = values[0]
    if COUNT == 16:
        total += tl.gather(total, tl.broadcast_to(lane ^ 16, total.shape), 1)
    return total


@triton.jit
def _join_pairs(values, DISTANCE: tl.constexpr):
    joined = ()
    for i in tl.static_range(DISTANCE):
        joined = joined + (tl.join(values[i], values[i + DISTANCE]),)
    return joined


@triton.jit
def _split_pairs(values, DISTANCE: tl.constexpr):
    low = ()
    high = ()
    for i in tl.static_range(DISTANCE):
        first, second = tl.split(values[i])
        low = low + (first,)
        high = high + (second,)
    return low + high


@triton.jit
def _sum_splits(rows, SPLIT: tl.constexpr):
    """Sums of a tile's rows (SPLIT, channels) over the warps, as (1, channels) in each of them."""
    if SPLIT > 1:
        # Together, for a sum over warps takes two barriers.
        joined = _join_pairs(_join_pairs(_join_pairs(_join_pairs(rows, 8), 4), 2), 1)
        total = (tl.sum(joined[0], axis=0, keep_dims=True),)
        rows = _split_pairs(_split_pairs(_split_pairs(_split_pairs(total, 1), 2), 4), 8)
    return rows


@triton.jit
def _repeat(row):
    rows = ()
    for _ in tl.static_range(TILE):
        rows = rows + (row,)
    return rows


@triton.jit
def _load_frames(first, start, lo, hi, mask, SIGN: tl.constexpr, NUM_STATE, CUT: tl.constexpr):
    """A state's entries of packed B or C for the frames of a tile, each (SPLIT, 1)."""
    entries = ()
    for j in tl.static_range(TILE):
        # Without cuts the distance is a constant and costs no address arithmetic.
        away = nearest_frame(start + SIGN * j, lo, hi) - start if CUT else SIGN * j
        entries = entries + (tl.load(first + away * NUM_STATE, mask=mask, other=0.0),)
    return entries


@triton.jit
def _load_state(
    first_state, way, grads, program, tile, dim, channel, channel_mask, scanned_first, enters,
    NUM_STATE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """What a tile needs of SPLIT states: each (SPLIT, channels).

    Returns:
        Decay rate, state before the tile, gradient of the state after it, gradient of A so far.
    """
    n = first_state + tl.arange(0, SPLIT)[:, None]
    mask = (n < NUM_STATE) & channel_mask
    of_parameter = n * dim + channel
    kept = way.states + tile * NUM_STATE * dim + of_parameter
    h = tl.load(kept, mask=mask & (not scanned_first), other=0.0)
    if way.initial_state is not None:
        of_item = tl.program_id(2).to(tl.int64) * NUM_STATE * dim + of_parameter
        begins = mask & scanned_first & enters
        h += tl.load(way.initial_state + of_item, mask=begins, other=0.0)
    of_program = program * NUM_STATE * dim + of_parameter
    return (
        tl.load(way.A + of_parameter, mask=mask, other=0.0),
        h,
        tl.load(grads.carry + of_program, mask=mask, other=0.0),
        tl.load(grads.A + of_program, mask=mask, other=0.0),
    )


@triton.jit
def _backward_way(
    way, grads, z, grad_y, grad_z, valid, time, dim, group, num_groups, channel, channel_mask,
    block_from, block_to, output_scale, NUM_STATE: tl.constexpr, SPLIT: tl.constexpr,
    REVERSE: tl.constexpr, ADD: tl.constexpr, VARIABLE_B: tl.constexpr, VARIABLE_C: tl.constexpr,
    SOFTPLUS: tl.constexpr, CUT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients over the blocks block_from .. block_to; that of z on top of it with ADD."""
    SIGN: tl.constexpr = -1 if REVERSE else 1
    COUNT: tl.constexpr = 16 * (VARIABLE_B + VARIABLE_C)
    item = tl.program_id(2).to(tl.int64)
    program = item * tl.num_programs(1) + tl.program_id(1)
    lane = tl.arange(0, WARP)[None, :]
    D_row = load_parameter(way.D, channel, channel_mask)
    bias_row = load_parameter(way.bias, channel, channel_mask)
    if VARIABLE_B:
        B = packed_projection(way.B, group, num_groups, time, NUM_STATE)
    if VARIABLE_C:
        C = packed_projection(way.C, group, num_groups, time, NUM_STATE)

    # Sums that outlast a tile wait in memory.
    nothing = tl.zeros([SPLIT, WARP], tl.float32)
    for first_state in range(0, NUM_STATE, SPLIT):
        n = first_state + tl.arange(0, SPLIT)[:, None]
        mask = (n < NUM_STATE) & channel_mask
        of_program = (program * NUM_STATE + n) * dim + channel
        tl.store(grads.A + of_program, nothing, mask=mask)
        if not VARIABLE_B:
            tl.store(grads.B + of_program, nothing, mask=mask)
        if not VARIABLE_C:
            tl.store(grads.C + of_program, nothing, mask=mask)
    grad_D_row = tl.zeros([1, WARP], tl.float32)
    grad_bias_row = tl.zeros([1, WARP], tl.float32)

    final_block = tl.maximum(valid - 1, 0) // way.block_frames
    block_to = tl.minimum(block_to, final_block + 1)
    for b in range(block_to - block_from):
        # The block that is scanned first comes last, so that its carry remains.
        block = block_from + b if REVERSE else block_to - 1 - b
        lo = block * way.block_frames
        hi = tl.minimum(lo + way.block_frames, valid)
        enters = block == (final_block if REVERSE else 0)
        leaves = block == (0 if REVERSE else final_block)
        for first_state in range(0, NUM_STATE, SPLIT):
            n = first_state + tl.arange(0, SPLIT)[:, None]
            mask = (n < NUM_STATE) & channel_mask
            g = nothing
            if grads.last_state is not None:
                of_item = (item * NUM_STATE + n) * dim + channel
                g = tl.load(grads.last_state + of_item, mask=mask & leaves, other=0.0)
            tl.store(grads.carry + (program * NUM_STATE + n) * dim + channel, g, mask=mask)

        tile_from = lo // TILE
        tile_to = tl.where(hi > lo, tl.cdiv(hi, TILE), tile_from)
        for i in range(tile_to - tile_from):
            # Carries and sums of the tile before are read by threads that did not write them.
            tl.debug_barrier()
            tile = tile_from + i if REVERSE else tile_to - 1 - i
            scanned_first = i == tile_to - tile_from - 1
            start = tile * TILE + (TILE - 1 if REVERSE else 0)
            # The tile that is scanned first has none.
            kept_tile = item * (tl.cdiv(time, TILE) - 1) + tile - (0 if REVERSE else 1)

            u_rows = load_rows(way.u, channel, channel_mask, start, lo, hi, TILE, SIGN, WIDE)
            delta_rows = load_rows(
                way.delta, channel, channel_mask, start, lo, hi, TILE, SIGN, WIDE
            )
            g_rows = load_rows(grad_y, channel, channel_mask, start, lo, hi, TILE, SIGN, WIDE)
            if z is not None:
                z_rows = load_rows(z, channel, channel_mask, start, lo, hi, TILE, SIGN, WIDE)
            dt_rows = ()
            x_rows = ()
            dy_rows = ()
            for j in tl.static_range(TILE):
                t = start + SIGN * j
                inside = (t >= lo) & (t < hi)
                dt, _ = step_size(delta_rows[j], bias_row, inside, SOFTPLUS)
                dy = g_rows[j] * output_scale
                if z is not None:
                    dy *= z_rows[j] * sigmoid(z_rows[j])
                dt_rows = dt_rows + (dt,)
                x_rows = x_rows + (dt * u_rows[j],)
                dy_rows = dy_rows + (tl.where(inside, dy, 0.0),)

            # Per frame the sums over states of the gradients by dt u and, through the decay, by dt,
            # and of the output.
            by_x = _repeat(nothing)
            by_decay = _repeat(nothing)
            outputs = _repeat(nothing)
            A_next, h_next, g_next, grad_A_next = _load_state(
                0, way, grads, program, kept_tile, dim, channel, channel_mask, scanned_first,
                enters, NUM_STATE, SPLIT,
            )  # fmt: skip
            for first_state in range(0, NUM_STATE, SPLIT):
                A_n = A_next
                h = h_next
                g = g_next
                grad_A_n = grad_A_next
                A_next, h_next, g_next, grad_A_next = _load_state(
                    first_state + SPLIT, way, grads, program, kept_tile, dim, channel, channel_mask,
                    scanned_first, enters, NUM_STATE, SPLIT,
                )  # fmt: skip
                n = first_state + tl.arange(0, SPLIT)[:, None]
                mask = (n < NUM_STATE) & channel_mask
                of_parameter = n * dim + channel
                of_program = program * NUM_STATE * dim + of_parameter
                if VARIABLE_B:
                    B_first = B + start * NUM_STATE + n
                    B_n = _load_frames(B_first, start, lo, hi, n < NUM_STATE, SIGN, NUM_STATE, CUT)
                else:
                    B_n = _repeat(tl.load(way.B + of_parameter, mask=mask, other=0.0))
                    grad_B_n = tl.load(grads.B + of_program, mask=mask, other=0.0)
                if VARIABLE_C:
                    C_first = C + start * NUM_STATE + n
                    C_n = _load_frames(C_first, start, lo, hi, n < NUM_STATE, SIGN, NUM_STATE, CUT)
                else:
                    C_n = _repeat(tl.load(way.C + of_parameter, mask=mask, other=0.0))
                    grad_C_n = tl.load(grads.C + of_program, mask=mask, other=0.0)

                # Entry j is the state in front of frame j.
                h_rows = (h,)
                decay_rows = ()
                A2 = A_n * LOG2E
                for j in tl.static_range(TILE):
                    decay = tl.exp2(dt_rows[j] * A2)
                    h = decay * h + x_rows[j] * B_n[j]
                    decay_rows = decay_rows + (decay,)
                    h_rows = h_rows + (h,)

                B_sums = ()
                C_sums = ()
                new_by_x = ()
                new_by_decay = ()
                new_outputs = ()
                for j in tl.static_range(TILE - 1, -1, -1):
                    g += dy_rows[j] * C_n[j]
                    if VARIABLE_C:
                        C_sums = (dy_rows[j] * h_rows[j + 1],) + C_sums
                    else:
                        grad_C_n += dy_rows[j] * h_rows[j + 1]
                    if VARIABLE_B:
                        B_sums = (g * x_rows[j],) + B_sums
                    else:
                        grad_B_n += g * x_rows[j]
                    new_by_x = (by_x[j] + g * B_n[j],) + new_by_x
                    if z is not None:
                        new_outputs = (outputs[j] + h_rows[j + 1] * C_n[j],) + new_outputs
                    g *= decay_rows[j]
                    through_decay = g * h_rows[j]
                    new_by_decay = (by_decay[j] + through_decay * A_n,) + new_by_decay
                    grad_A_n += through_decay * dt_rows[j]
                by_x = new_by_x
                by_decay = new_by_decay
                if z is not None:
                    outputs = new_outputs
                tl.store(grads.carry + of_program, g, mask=mask)
                tl.store(grads.A + of_program, grad_A_n, mask=mask)
                if not VARIABLE_B:
                    tl.store(grads.B + of_program, grad_B_n, mask=mask)
                if not VARIABLE_C:
                    tl.store(grads.C + of_program, grad_C_n, mask=mask)
                if COUNT > 0:
                    frame = start + SIGN * (lane % TILE)
                    kind = (lane // TILE).to(tl.int64) * tl.num_programs(2)
                    part = (kind + item) * tl.num_programs(0) + tl.program_id(0)
                    of_sum = (part * NUM_STATE + n) * time + frame
                    wanted = (n < NUM_STATE) & (lane < COUNT) & (frame >= lo) & (frame < hi)
                    sums = _fold(B_sums + C_sums, lane, COUNT)
                    tl.store(grads.projections + of_sum, sums, mask=wanted)

            by_x = _sum_splits(by_x, SPLIT)
            by_decay = _sum_splits(by_decay, SPLIT)
            # Loaded again: in registers they would have displaced the loop's.
            u_rows = load_rows(way.u, channel, channel_mask, start, lo, hi, TILE, SIGN, WIDE)
            delta_rows = load_rows(
                way.delta, channel, channel_mask, start, lo, hi, TILE, SIGN, WIDE
            )
            grad_u_rows = ()
            grad_delta_rows = ()
            for j in tl.static_range(TILE):
                t = start + SIGN * j
                inside = (t >= lo) & (t < hi)
                dt, slope = step_size(delta_rows[j], bias_row, inside, SOFTPLUS)
                grad_delta_row = (u_rows[j] * by_x[j] + by_decay[j]) * slope
                # A row beyond the block repeats one that counts already.
                grad_delta_row = tl.where(inside, grad_delta_row, 0.0)
                grad_u_rows = grad_u_rows + (dt * by_x[j] + dy_rows[j] * D_row,)
                grad_delta_rows = grad_delta_rows + (grad_delta_row,)
                grad_bias_row += grad_delta_row
                grad_D_row += tl.where(inside, dy_rows[j] * u_rows[j], 0.0)
            store_rows(grads.u, grad_u_rows, channel, channel_mask, start, lo, hi, TILE, SIGN, WIDE)
            store_rows(
                grads.delta,
                grad_delta_rows,
                channel,
                channel_mask,
                start,
                lo,
                hi,
                TILE,
                SIGN,
                WIDE,
            )
            if z is not None:
                outputs = _sum_splits(outputs, SPLIT)
                z_rows = load_rows(z, channel, channel_mask, start, lo, hi, TILE, SIGN, WIDE)
                g_rows = load_rows(grad_y, channel, channel_mask, start, lo, hi, TILE, SIGN, WIDE)
                if ADD:
                    sum_rows = load_rows(
                        grad_z, channel, channel_mask, start, lo, hi, TILE, SIGN, WIDE
                    )
                grad_z_rows = ()
                for j in tl.static_range(TILE):
                    gate = sigmoid(z_rows[j])
                    gate *= 1.0 + z_rows[j] * (1.0 - gate)
                    grad_gate = g_rows[j] * output_scale
                    grad_z_row = grad_gate * (outputs[j] + D_row * u_rows[j]) * gate
                    if ADD:
                        grad_z_row += sum_rows[j]
                    grad_z_rows = grad_z_rows + (grad_z_row,)
                store_rows(
                    grad_z, grad_z_rows, channel, channel_mask, start, lo, hi, TILE, SIGN, WIDE
                )
    tl.store(grads.D + program * dim + channel, grad_D_row, mask=channel_mask)
    tl.store(grads.bias + program * dim + channel, grad_bias_row, mask=channel_mask)


@triton.jit
def selective_scan_backward_kernel(
    first, second, first_grads, second_grads, z, grad_y, grad_z, lengths, time, dim, num_groups,
    blocks_per_program, NUM_STATE: tl.constexpr, SPLIT: tl.constexpr, FULL_CHANNELS: tl.constexpr,
    REVERSE: tl.constexpr, SECOND_REVERSE: tl.constexpr, VARIABLE_B: tl.constexpr,
    VARIABLE_C: tl.constexpr, SECOND_VARIABLE_B: tl.constexpr, SECOND_VARIABLE_C: tl.constexpr,
    BOTH: tl.constexpr, SOFTPLUS: tl.constexpr, CUT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients of `selective_scan_forward_kernel`; grid and arguments as there.

    Args:
        first_grads: `WayGradientPointers` of the first way.
        second_grads: of the second if BOTH, else None.
        grad_y: `Sequence`.
        grad_z: `Sequence` or None.
    """
    group, channel, channel_mask = channels_of_program(dim, num_groups, WARP, FULL_CHANNELS)
    valid = num_valid_frames(lengths, time)
    block_from = tl.program_id(1) * blocks_per_program
    block_to = tl.minimum(block_from + blocks_per_program, tl.cdiv(time, first.block_frames))
    _backward_way(
        first, first_grads, z, grad_y, grad_z, valid, time, dim, group, num_groups, channel,
        channel_mask, block_from, block_to, 0.5 if BOTH else 1.0, NUM_STATE, SPLIT,
        REVERSE, False, VARIABLE_B, VARIABLE_C, SOFTPLUS, CUT, WIDE,
    )  # fmt: skip
    if BOTH:
        # The second way reads what other threads of the program have written.
        tl.debug_barrier()
        _backward_way(
            second, second_grads, z, grad_y, grad_z, valid, time, dim, group, num_groups, channel,
            channel_mask, 0, tl.cdiv(time, second.block_frames), 0.5, NUM_STATE, SPLIT,
            SECOND_REVERSE, True, SECOND_VARIABLE_B, SECOND_VARIABLE_C, SOFTPLUS, CUT, WIDE,
        )  # fmt: skip
    if lengths is not None:
        padding_from = tl.maximum(block_from * first.block_frames, valid)
        padding_to = tl.minimum(block_to * first.block_frames, time)
        store_zeros(first_grads.u, channel, channel_mask, padding_from, padding_to)
        store_zeros(first_grads.delta, channel, channel_mask, padding_from, padding_to)
        if grad_z is not None:
            store_zeros(grad_z, channel, channel_mask, padding_from, padding_to)
        if BOTH:
            store_zeros(second_grads.u, channel, channel_mask, padding_from, padding_to)
            store_zeros(second_grads.delta, channel, channel_mask, padding_from, padding_to)
