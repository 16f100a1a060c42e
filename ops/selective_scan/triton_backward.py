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

Where there are too few channels to fill the GPU, time is cut (`triton_pieces`).

About 26 instructions per state and frame are issued, 9 of them for the folding, which takes longer
than the memory needs for the same frame.
"""

# Triton's compiler has no unpacking within a tuple.
# ruff: noqa: RUF005

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ops.selective_scan.triton_pieces import blocks_of_piece, entering_state, segment_of
from ops.selective_scan.triton_rows import (
    END,
    TILE,
    WARP,
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
from ops.triton_sequences import LOG2E, Sequence, num_valid_frames, sigmoid


class WayGradientPointers(NamedTuple):
    """Where the gradients of a `WayPointers` go; contiguous float32 but for u and delta.

    Those of parameters stand in ``parts`` (batch, pieces, rows, dim) and remain to be added up over
    batch and pieces: A in as many rows as there are states, constant B and C likewise, D, bias. The
    last rows, again one for each state, carry the gradient of the state from tile to tile and end,
    in the piece that is scanned first, as the gradient of the initial state. Gradients of
    time-varying B and C stand in ``projections`` (one or both, batch, blocks of channels, state,
    time). ``last_state`` (batch, state, dim) is read, and so are ``ends``, which are those of
    `WayPointers` for the gradients of the states.
    """

    u: Sequence
    delta: Sequence
    parts: torch.Tensor
    projections: torch.Tensor | None
    last_state: torch.Tensor | None
    ends: torch.Tensor
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
def _repeat(row):
    rows = ()
    for _ in tl.static_range(TILE):
        rows = rows + (row,)
    return rows


@triton.jit
def _load_frames(first, start, lo, hi, reverse, NUM_STATE, CUT: tl.constexpr):
    """A state's entries of packed B or C for the frames of a tile, each (1, 1)."""
    sign = tl.where(reverse, -1, 1)
    entries = ()
    for j in tl.static_range(TILE):
        # Without cuts the distance is a constant and costs no address arithmetic.
        away = sign * (nearest_frame(start + sign * j, lo, hi) - start) if CUT else j
        entries = entries + (tl.load(first + away * NUM_STATE),)
    return entries


@triton.jit
def _load_state(
    n, A, grad_A, carry, tile_states, initial_state, dim, channel, channel_mask, has_kept, enters,
    NUM_STATE: tl.constexpr,
):  # fmt: skip
    """What a tile needs of a state, each (1, channels); zeros beyond the last state.

    Returns:
        Decay rate, state before the tile, gradient of the state after it, gradient of A so far.
    """
    mask = (n < NUM_STATE) & channel_mask
    of_parameter = n * dim + channel
    h = tl.load(tile_states + of_parameter, mask=mask & has_kept, other=0.0)
    if initial_state is not None:
        h += tl.load(initial_state + of_parameter, mask=mask & enters, other=0.0)
    return (
        tl.load(A + of_parameter, mask=mask, other=0.0),
        h,
        tl.load(carry + of_parameter, mask=mask, other=0.0),
        tl.load(grad_A + of_parameter, mask=mask, other=0.0),
    )


@triton.jit
def _backward_way(
    first, second, first_grads, second_grads, is_second, z, grad_y, grad_z, valid, time, dim, group,
    num_groups, channel, channel_mask, reverse, block_frames, piece_frames, output_scale, add,
    NUM_STATE: tl.constexpr, STATES: tl.constexpr, BOTH: tl.constexpr, ADD: tl.constexpr,
    VARIABLE_B: tl.constexpr, VARIABLE_C: tl.constexpr, SOFTPLUS: tl.constexpr, CUT: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients over the program's piece; where ``add``, that of z on top of it."""
    piece = tl.program_id(1)
    COUNT: tl.constexpr = 16 * (VARIABLE_B + VARIABLE_C)
    sign = tl.where(reverse, -1, 1)
    item = tl.program_id(2).to(tl.int64)
    program = item * tl.num_programs(1) + tl.program_id(1)
    # Rows of the program's parts; see `WayGradientPointers`.
    C_FROM: tl.constexpr = NUM_STATE * (1 if VARIABLE_B else 2)
    D_FROM: tl.constexpr = C_FROM + (0 if VARIABLE_C else NUM_STATE)
    ROWS: tl.constexpr = D_FROM + 2 + NUM_STATE
    lane = tl.arange(0, WARP)[None, :]
    u = either(first.u.pointer, second.u.pointer, is_second, BOTH)
    delta = either(first.delta.pointer, second.delta.pointer, is_second, BOTH)
    A = either(first.A, second.A, is_second, BOTH)
    B = either(first.B, second.B, is_second, BOTH)
    C = either(first.C, second.C, is_second, BOTH)
    states = either(first.states, second.states, is_second, BOTH)
    grad_u = either(first_grads.u.pointer, second_grads.u.pointer, is_second, BOTH)
    grad_delta = either(first_grads.delta.pointer, second_grads.delta.pointer, is_second, BOTH)
    grad_A = either(first_grads.parts, second_grads.parts, is_second, BOTH) + program * ROWS * dim
    grad_D = grad_A + D_FROM * dim
    carry = grad_D + 2 * dim
    initial_state = None
    if first.initial_state is not None:
        initial_state = first.initial_state + item * NUM_STATE * dim
    D_row = load_parameter(first.D, second.D, is_second, channel, channel_mask, BOTH)
    bias_row = load_parameter(first.bias, second.bias, is_second, channel, channel_mask, BOTH)
    if VARIABLE_B:
        packed_B = packed_projection(B, group, num_groups, time, NUM_STATE)
    else:
        grad_B = grad_A + NUM_STATE * dim
    if VARIABLE_C:
        packed_C = packed_projection(C, group, num_groups, time, NUM_STATE)
    else:
        grad_C = grad_A + C_FROM * dim
    if COUNT > 0:
        projections = either(first_grads.projections, second_grads.projections, is_second, BOTH)

    # Sums that outlast a tile wait in memory.
    n_all = tl.arange(0, STATES)[:, None]
    all_mask = (n_all < NUM_STATE) & channel_mask
    of_parameters = places_of_states(n_all, channel, dim, time)
    nothing_yet = tl.zeros([STATES, WARP], tl.float32)
    tl.store(grad_A + of_parameters, nothing_yet, mask=all_mask)
    if not VARIABLE_B:
        tl.store(grad_B + of_parameters, nothing_yet, mask=all_mask)
    if not VARIABLE_C:
        tl.store(grad_C + of_parameters, nothing_yet, mask=all_mask)
    grad_D_row = tl.zeros([1, WARP], tl.float32)
    grad_bias_row = tl.zeros([1, WARP], tl.float32)
    nothing = tl.zeros([1, WARP], tl.float32)
    ends = either(first_grads.ends, second_grads.ends, is_second, BOTH)

    block_from, block_to = blocks_of_piece(piece, block_frames, piece_frames, valid)
    for b in range(block_to - block_from):
        # The block that is scanned first comes last, so that its carry remains.
        block = tl.where(reverse, block_from + b, block_to - 1 - b)
        segment = segment_of(block, piece, block_frames, piece_frames, valid, reverse)
        lo = segment.lo
        hi = segment.hi
        # Gradients of states run against the scan.
        turned = segment_of(block, piece, block_frames, piece_frames, valid, reverse == 0)
        enters = segment.enters
        leaves = turned.enters
        if BOTH:
            # Only the first way has states from and to somewhere else.
            enters = enters & (is_second == 0)
            leaves = leaves & (is_second == 0)
        g_all = nothing_yet
        if first_grads.last_state is not None:
            of_item = item * NUM_STATE * dim + of_parameters
            g_all = tl.load(first_grads.last_state + of_item, mask=all_mask & leaves, other=0.0)
        A2_all = tl.load(A + of_parameters, mask=all_mask, other=0.0) * LOG2E
        g_all = entering_state(
            g_all, A2_all, ends, piece, tl.num_programs(1), turned.distance, reverse == 0, dim,
            channel, of_parameters, all_mask, channel_mask, NUM_STATE,
        )  # fmt: skip
        tl.store(carry + of_parameters, g_all, mask=all_mask)

        tile_from = lo // TILE
        tile_to = tl.where(hi > lo, tl.cdiv(hi, TILE), tile_from)
        for i in range(tile_to - tile_from):
            # Carries and sums of the tile before are read by threads that did not write them.
            tl.debug_barrier()
            tile = tl.where(reverse, tile_from + i, tile_to - 1 - i)
            scanned_first = (i == tile_to - tile_from - 1) & (segment.distance == 0)
            start = tl.where(reverse, tile * TILE + TILE - 1, tile * TILE)
            # The tile of a block that is scanned first has none.
            kept_tile = item * (tl.cdiv(time, TILE) - 1) + tl.where(reverse, tile, tile - 1)
            tile_states = states + kept_tile * NUM_STATE * dim

            u_rows = load_rows(
                u, first.u, channel, channel_mask, start, lo, hi, reverse, TILE, WIDE
            )
            delta_rows = load_rows(
                delta, first.delta, channel, channel_mask, start, lo, hi, reverse, TILE, WIDE
            )
            g_rows = load_rows(
                grad_y.pointer, grad_y, channel, channel_mask, start, lo, hi, reverse, TILE, WIDE
            )
            if z is not None:
                z_rows = load_rows(
                    z.pointer, z, channel, channel_mask, start, lo, hi, reverse, TILE, WIDE
                )
            dt_rows = ()
            x_rows = ()
            dy_rows = ()
            for j in tl.static_range(TILE):
                t = start + sign * j
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
            has_kept = scanned_first == 0
            A_next, h_next, g_next, grad_A_next = _load_state(
                0, A, grad_A, carry, tile_states, initial_state, dim, channel, channel_mask,
                has_kept, scanned_first & enters, NUM_STATE,
            )  # fmt: skip
            place = place_in_scan(start, time, reverse)
            for n in range(NUM_STATE):
                A_n = A_next
                h = h_next
                g = g_next
                grad_A_n = grad_A_next
                A_next, h_next, g_next, grad_A_next = _load_state(
                    n + 1, A, grad_A, carry, tile_states, initial_state, dim, channel, channel_mask,
                    has_kept, scanned_first & enters, NUM_STATE,
                )  # fmt: skip
                of_parameter = n * dim + channel
                one = tl.zeros([1, 1], tl.int32) + n
                if VARIABLE_B:
                    B_first = packed_B + place * NUM_STATE + one
                    B_n = _load_frames(B_first, start, lo, hi, reverse, NUM_STATE, CUT)
                else:
                    B_n = _repeat(tl.load(B + of_parameter, mask=channel_mask, other=0.0))
                    grad_B_n = tl.load(grad_B + of_parameter, mask=channel_mask, other=0.0)
                if VARIABLE_C:
                    C_first = packed_C + place * NUM_STATE + one
                    C_n = _load_frames(C_first, start, lo, hi, reverse, NUM_STATE, CUT)
                else:
                    C_n = _repeat(tl.load(C + of_parameter, mask=channel_mask, other=0.0))
                    grad_C_n = tl.load(grad_C + of_parameter, mask=channel_mask, other=0.0)

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
                tl.store(carry + of_parameter, g, mask=channel_mask)
                tl.store(grad_A + of_parameter, grad_A_n, mask=channel_mask)
                if not VARIABLE_B:
                    tl.store(grad_B + of_parameter, grad_B_n, mask=channel_mask)
                if not VARIABLE_C:
                    tl.store(grad_C + of_parameter, grad_C_n, mask=channel_mask)
                if COUNT > 0:
                    frame = start + sign * (lane % TILE)
                    kind = (lane // TILE).to(tl.int64) * tl.num_programs(2)
                    part = (kind + item) * tl.num_programs(0) + tl.program_id(0)
                    of_sum = (part * NUM_STATE + n) * time + frame
                    wanted = (lane < COUNT) & (frame >= lo) & (frame < hi)
                    sums = _fold(B_sums + C_sums, lane, COUNT)
                    tl.store(projections + of_sum, sums, mask=wanted)

            # Loaded again: in registers they would have displaced the loop's.
            u_rows = load_rows(
                u, first.u, channel, channel_mask, start, lo, hi, reverse, TILE, WIDE
            )
            delta_rows = load_rows(
                delta, first.delta, channel, channel_mask, start, lo, hi, reverse, TILE, WIDE
            )
            grad_u_rows = ()
            grad_delta_rows = ()
            for j in tl.static_range(TILE):
                t = start + sign * j
                inside = (t >= lo) & (t < hi)
                dt, slope = step_size(delta_rows[j], bias_row, inside, SOFTPLUS)
                grad_delta_row = (u_rows[j] * by_x[j] + by_decay[j]) * slope
                # A row beyond the block repeats one that counts already.
                grad_delta_row = tl.where(inside, grad_delta_row, 0.0)
                grad_u_rows = grad_u_rows + (dt * by_x[j] + dy_rows[j] * D_row,)
                grad_delta_rows = grad_delta_rows + (grad_delta_row,)
                grad_bias_row += grad_delta_row
                grad_D_row += tl.where(inside, dy_rows[j] * u_rows[j], 0.0)
            store_rows(
                grad_u, first_grads.u, grad_u_rows, channel, channel_mask, start, lo, hi, reverse,
                TILE, WIDE,
            )  # fmt: skip
            store_rows(
                grad_delta, first_grads.delta, grad_delta_rows, channel, channel_mask, start, lo,
                hi, reverse, TILE, WIDE,
            )  # fmt: skip
            if z is not None:
                z_rows = load_rows(
                    z.pointer, z, channel, channel_mask, start, lo, hi, reverse, TILE, WIDE
                )
                g_rows = load_rows(
                    grad_y.pointer, grad_y, channel, channel_mask, start, lo, hi, reverse, TILE,
                    WIDE,
                )  # fmt: skip
                if ADD:
                    sum_rows = load_rows(
                        grad_z.pointer, grad_z, channel, channel_mask & add, start, lo, hi, reverse,
                        TILE, WIDE,
                    )  # fmt: skip
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
                    grad_z.pointer, grad_z, grad_z_rows, channel, channel_mask, start, lo, hi,
                    reverse, TILE, WIDE,
                )  # fmt: skip
    tl.store(grad_D + channel, grad_D_row, mask=channel_mask)
    tl.store(grad_D + dim + channel, grad_bias_row, mask=channel_mask)


@triton.jit
def _clear_projections(
    projections, time, lo, hi, KINDS: tl.constexpr, NUM_STATE: tl.constexpr
):  # fmt: skip
    """Zeros in the frames lo .. hi of the program's gradients of B and C."""
    if KINDS > 0:
        item = tl.program_id(2).to(tl.int64)
        for kind in range(KINDS):
            part = (kind * tl.num_programs(2) + item) * tl.num_programs(0) + tl.program_id(0)
            for start in range(lo, hi, WARP):
                t = start + tl.arange(0, WARP)
                for n in range(NUM_STATE):
                    zeros = tl.zeros([WARP], tl.float32)
                    tl.store(projections + (part * NUM_STATE + n) * time + t, zeros, mask=t < hi)


@triton.jit(
    do_not_specialize=[
        "time", "first_reverse", "second_reverse", "first_block_frames", "second_block_frames",
        "piece_frames", "add",
    ]
)  # fmt: skip
def selective_scan_backward_kernel(
    first, second, first_grads, second_grads, z, grad_y, grad_z, lengths, time, dim, num_groups,
    first_reverse, second_reverse, first_block_frames, second_block_frames, piece_frames, add,
    output_scale, NUM_STATE: tl.constexpr, STATES: tl.constexpr, FULL_CHANNELS: tl.constexpr,
    BOTH: tl.constexpr, ADD: tl.constexpr, VARIABLE_B: tl.constexpr, VARIABLE_C: tl.constexpr,
    SOFTPLUS: tl.constexpr, CUT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients of `selective_scan_forward_kernel`; grid and arguments as there.

    Args:
        first_grads: `WayGradientPointers` of the first way.
        second_grads: of the second if BOTH, else the first's again.
        grad_y: `Sequence`.
        grad_z: `Sequence` or None; ``add`` to what it holds.
    """
    group, channel, channel_mask = channels_of_program(dim, num_groups, WARP, FULL_CHANNELS)
    valid = num_valid_frames(lengths, time)
    for way in range(2 if BOTH else 1):
        is_second = way == 1
        if BOTH:
            # The second way reads what other threads of the program have written.
            tl.debug_barrier()
        _backward_way(
            first, second, first_grads, second_grads, is_second, z, grad_y, grad_z, valid, time,
            dim, group, num_groups, channel, channel_mask,
            either(first_reverse, second_reverse, is_second, BOTH) != 0,
            either(first_block_frames, second_block_frames, is_second, BOTH), piece_frames,
            output_scale, is_second | (add != 0), NUM_STATE, STATES, BOTH, ADD, VARIABLE_B,
            VARIABLE_C, SOFTPLUS, CUT, WIDE,
        )  # fmt: skip
    if lengths is not None:
        padding_from = tl.maximum(tl.program_id(1) * piece_frames, valid)
        padding_to = tl.minimum((tl.program_id(1) + 1) * piece_frames, time)
        for way in range(2 if BOTH else 1):
            grad_u = either(first_grads.u.pointer, second_grads.u.pointer, way == 1, BOTH)
            grad_delta = either(
                first_grads.delta.pointer, second_grads.delta.pointer, way == 1, BOTH
            )
            projections = None
            if first_grads.projections is not None:
                projections = either(
                    first_grads.projections, second_grads.projections, way == 1, BOTH
                )
            _clear_projections(
                projections, time, padding_from, padding_to, VARIABLE_B + VARIABLE_C, NUM_STATE
            )
            store_zeros(grad_u, first_grads.u, channel, channel_mask, padding_from, padding_to)
            store_zeros(
                grad_delta, first_grads.delta, channel, channel_mask, padding_from, padding_to
            )
        if grad_z is not None:
            store_zeros(grad_z.pointer, grad_z, channel, channel_mask, padding_from, padding_to)
