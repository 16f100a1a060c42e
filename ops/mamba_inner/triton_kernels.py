"""Triton kernels around the scan of a mixer: what torch would do in dozens of small launches."""

import triton
import triton.language as tl

from ops.triton_sequences import LOG2E


@triton.jit
def _pick(first, second, is_second, BOTH: tl.constexpr):
    picked = first
    if BOTH:
        picked = tl.where(is_second, second, first)
    return picked


@triton.jit
def prepare_parameters_kernel(
    first_A_log, second_A_log, first_x_proj, second_x_proj, first_dt_proj, second_dt_proj, A,
    x_proj, dt_proj, inner, rank, NUM_STATE: tl.constexpr, BOTH: tl.constexpr, CAST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Decay rates with channels last, and both projections in the type of the activations.

    Grid (blocks, ways, 3 if CAST else 1).

    Args:
        first_A_log: (inner, state), first_x_proj (rank + 2 state, inner), first_dt_proj (inner,
            rank), and those of the second way if BOTH; all contiguous.
        A: (ways, state, inner) float32.
        x_proj, dt_proj: like the parameters, with ways in front; read if CAST.
    """
    way = tl.program_id(1)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(2) == 0:
        count = inner * NUM_STATE
        source = _pick(first_A_log, second_A_log, way == 1, BOTH)
        # Places in the result, so that writing is in order.
        n = place // inner
        channel = place % inner
        A_log = tl.load(source + channel * NUM_STATE + n, mask=place < count, other=0.0)
        tl.store(A + way * count + place, -tl.exp2(A_log * LOG2E), mask=place < count)
    if CAST:
        if tl.program_id(2) == 1:
            count = (rank + 2 * NUM_STATE) * inner
            source = _pick(first_x_proj, second_x_proj, way == 1, BOTH)
            values = tl.load(source + place, mask=place < count, other=0.0)
            tl.store(x_proj + way * count + place, values, mask=place < count)
        if tl.program_id(2) == 2:
            count = inner * rank
            source = _pick(first_dt_proj, second_dt_proj, way == 1, BOTH)
            values = tl.load(source + place, mask=place < count, other=0.0)
            tl.store(dt_proj + way * count + place, values, mask=place < count)


@triton.jit(do_not_specialize=["time", "num_blocks"])
def collect_projections_kernel(
    parts, grad_projected, time, num_blocks, width, first_column, NUM_STATE: tl.constexpr,
    STATES: tl.constexpr, FRAMES: tl.constexpr,
):  # fmt: skip
    """Gradients of B and C, added up over blocks of channels.

    Grid (blocks of FRAMES, 2 * ways, batch).

    Args:
        parts: (ways, 2, batch, blocks of channels, state, time), contiguous.
        grad_projected: (ways, batch, time, width), whose columns from ``first_column`` on are
            written: those of B, then those of C.
    """
    item = tl.program_id(2).to(tl.int64)
    batch = tl.num_programs(2)
    way = tl.program_id(1) // 2
    kind = tl.program_id(1) % 2
    t = tl.program_id(0) * FRAMES + tl.arange(0, FRAMES)[None, :]
    n = tl.arange(0, STATES)[:, None]
    mask = (n < NUM_STATE) & (t < time)
    row = (way * 2 + kind) * batch + item
    total = tl.zeros([STATES, FRAMES], tl.float32)
    for block in range(num_blocks):
        part = (row * num_blocks + block) * NUM_STATE
        total += tl.load(parts + (part + n) * time + t, mask=mask, other=0.0)
    column = first_column + kind * NUM_STATE + n
    target = ((way * batch + item) * time + t) * width + column
    tl.store(grad_projected + target, total, mask=mask)


@triton.jit
def _sum_rows(parts, num_parts, stride, channel, channel_mask, ROWS: tl.constexpr):
    """The sum of (num_parts, ...) at the given channels, in the same order every time."""
    total = tl.zeros([ROWS, channel.shape[1]], tl.float32)
    row = tl.arange(0, ROWS)[:, None]
    for start in range(0, num_parts, ROWS):
        part = (start + row).to(tl.int64)
        mask = (part < num_parts) & channel_mask
        total += tl.load(parts + part * stride + channel, mask=mask, other=0.0)
    return tl.sum(total, 0, keep_dims=True)


@triton.jit(do_not_specialize=["num_parts", "num_conv_parts"])
def collect_parameters_kernel(
    parts, conv_parts, A, grad_A_log, grad_D, grad_bias, grad_conv_weight, grad_conv_bias, inner,
    num_parts, num_conv_parts, NUM_STATE: tl.constexpr, WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gradients of the parameters of every way, added up.

    Grid (blocks of CHANNELS, ways, NUM_STATE + 2 + WIDTH + 1).

    Args:
        parts: (ways, num_parts, rows, inner), those of the scan: A's states, D, bias and others.
        conv_parts: (ways, conv_parts, WIDTH + 1, inner), the taps' and the bias'.
        A: (ways, state, inner), the decay rates: A = -exp(A_log) multiplies their gradient.
        grad_A_log: (ways, inner, state); grad_D, grad_bias, grad_conv_bias (ways, inner);
            grad_conv_weight (ways, inner, WIDTH).
    """
    way = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    mask = channel < inner
    # Behind those of D and the bias stand carries, one for each state.
    stride = (2 * NUM_STATE + 2) * inner
    rows = parts + way * num_parts * stride + row * inner
    if row < NUM_STATE:
        total = _sum_rows(rows, num_parts, stride, channel, mask, ROWS)
        total *= tl.load(A + (way * NUM_STATE + row) * inner + channel, mask=mask, other=0.0)
        tl.store(grad_A_log + (way * inner + channel) * NUM_STATE + row, total, mask=mask)
    elif row < NUM_STATE + 2:
        is_bias = row == NUM_STATE + 1
        total = _sum_rows(rows, num_parts, stride, channel, mask, ROWS)
        of_channels = tl.where(is_bias, grad_bias, grad_D)
        tl.store(of_channels + way * inner + channel, total, mask=mask)
    else:
        tap = row - NUM_STATE - 2
        of_part = (WIDTH + 1) * inner
        taps = conv_parts + way * num_conv_parts * of_part + tap * inner
        total = _sum_rows(taps, num_conv_parts, of_part, channel, mask, ROWS)
        is_tap = tap < WIDTH
        of_taps = grad_conv_weight + (way * inner + channel) * WIDTH + tap
        tl.store(of_taps, total, mask=mask & is_tap)
        tl.store(grad_conv_bias + way * inner + channel, total, mask=mask & (tap == WIDTH))
