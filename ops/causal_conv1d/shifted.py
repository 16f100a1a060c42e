"""The backend called ``torch``: one multiply-add per tap over the whole input, on any device.

Inside, channels stand last, and the input is extended by the ``width - 1`` frames that come before
the first one in scan order. The backward keeps the arguments alone and computes the rest again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.causal_conv1d.arguments import ConvArguments
from ops.frames import select, valid_frames
from ops.native import without_views


def unavailable() -> str | None:
    """Why this backend cannot be used on this machine: never."""
    return None


def unsupported(_arguments: ConvArguments) -> str | None:
    """Why a call does not fit: every call does."""
    return None


def conv(arguments: ConvArguments) -> tuple[Tensor, Tensor]:
    """`reference.conv`, vectorised over time; differentiable once."""
    return _Convolution.apply(*arguments)


def conv_forward(arguments: ConvArguments) -> tuple[Tensor, Tensor]:
    """`conv` without autograd."""
    x, weight, bias, activation, _, _, initial_state, _ = arguments
    timeline = _Timeline(arguments)
    extended = timeline.extend(x, initial_state)
    y = timeline.before_activation(extended, weight, bias)
    y = timeline.mask(y if activation is None else F.silu(y))
    state = timeline.last_state(extended)
    return y.to(x.dtype).transpose(1, 2), state.to(x.dtype).transpose(1, 2).contiguous()


def conv_backward(
    grad_y: Tensor,
    grad_state: Tensor | None,
    arguments: ConvArguments,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, weight, bias and initial_state; None where absent."""
    x, weight, bias, activation, _, _, initial_state, _ = arguments
    width = weight.shape[1]
    timeline = _Timeline(arguments)
    extended = timeline.extend(x, initial_state)
    grad = timeline.mask(grad_y.transpose(1, 2).to(extended.dtype))
    if activation is not None:
        before = timeline.before_activation(extended, weight, bias)
        gate = torch.sigmoid(before)
        grad = grad * gate * (1 + before * (1 - gate))

    taps = weight.to(extended.dtype)
    grad_extended = torch.zeros_like(extended)
    grad_taps = []
    for lag in range(width):
        reaching = timeline.reaching(grad, lag)
        grad_taps.append((reaching * timeline.lagged(extended, lag)).sum((0, 1)))
        timeline.lagged(grad_extended, lag).addcmul_(reaching, taps[:, width - 1 - lag])
    if grad_state is not None:
        timeline.add_last_state(grad_extended, grad_state.transpose(1, 2).to(extended.dtype))

    grad_x = timeline.mask(timeline.inputs(grad_extended)).to(x.dtype).transpose(1, 2)
    grad_weight = torch.stack(grad_taps[::-1], dim=1).to(weight.dtype)
    grad_bias = None if bias is None else grad.sum((0, 1)).to(bias.dtype)
    grad_initial = None
    if initial_state is not None:
        grad_initial = timeline.initial_state(grad_extended).transpose(1, 2)
        grad_initial = grad_initial.to(initial_state.dtype).contiguous()
    return grad_x, grad_weight, grad_bias, grad_initial


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        x, weight, bias, activation, lengths, reverse, initial_state, reset_every = arguments
        ctx.save_for_backward(x, weight, bias, lengths, initial_state)
        ctx.activation, ctx.reverse, ctx.reset_every = activation, reverse, reset_every
        return without_views(*conv_forward(ConvArguments(*arguments)))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y, grad_state):
        x, weight, bias, lengths, initial_state = ctx.saved_tensors
        arguments = ConvArguments(
            x, weight, bias, ctx.activation, lengths, ctx.reverse, initial_state, ctx.reset_every
        )
        grad_x, grad_weight, grad_bias, grad_initial = conv_backward(grad_y, grad_state, arguments)
        return grad_x, grad_weight, grad_bias, None, None, None, grad_initial, None


class _Timeline:
    """Where the frames of one call stand in the extended input (batch, width - 1 + time, dim).

    Forward, the extension stands before the first frame; in reverse, after the last one.
    """

    def __init__(self, arguments: ConvArguments):
        x, lengths = arguments.x, arguments.lengths
        self.time, self.width = x.shape[-1], arguments.weight.shape[1]
        self.reverse, self.reset_every = arguments.reverse, arguments.reset_every
        self.valid = valid_frames(lengths, self.time)
        self.device = x.device
        if lengths is None:
            lengths = torch.full((x.shape[0],), self.time, device=x.device)
        self.lengths = lengths[:, None]

    def mask(self, x: Tensor) -> Tensor:
        """``x`` (batch, time, dim) with zeros in padding, selected, not multiplied."""
        if self.valid is None:
            return x
        return select(self.valid.unsqueeze(-1), x)

    def extend(self, x: Tensor, initial_state: Tensor | None) -> Tensor:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        frames = self.mask(x.transpose(1, 2).to(dtype))
        edge = self.width - 1
        extended = F.pad(frames, (0, 0, 0, edge) if self.reverse else (0, 0, edge, 0))
        if initial_state is None:
            return extended
        return extended.scatter(
            1, self._initial_positions(extended), initial_state.transpose(1, 2).to(dtype)
        )

    def inputs(self, extended: Tensor) -> Tensor:
        return self.lagged(extended, 0)

    def initial_state(self, extended: Tensor) -> Tensor:
        return extended.gather(1, self._initial_positions(extended))

    def lagged(self, extended: Tensor, lag: int) -> Tensor:
        """For every frame the one scanned ``lag`` frames before it; a view."""
        lo = lag if self.reverse else self.width - 1 - lag
        return extended[:, lo : lo + self.time]

    def reaching(self, x: Tensor, lag: int) -> Tensor:
        """``x`` (batch, time, dim) with zeros where ``lag`` frames back is another block."""
        if self.reset_every is None or lag == 0:
            return x
        frames = torch.arange(self.time, device=self.device)
        # What comes before an item's first frame in scan order belongs to that frame's block.
        if self.reverse:
            source = torch.minimum(frames + lag, self.lengths - 1)
        else:
            source = (frames - lag).clamp(min=0)[None]
        same = source // self.reset_every == frames // self.reset_every
        return select(same.unsqueeze(-1), x)

    def before_activation(self, extended: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        taps = weight.to(extended.dtype)
        y = self.lagged(extended, 0) * taps[:, -1]
        for lag in range(1, self.width):
            source = self.reaching(self.lagged(extended, lag), lag)
            y = y.addcmul_(source, taps[:, self.width - 1 - lag])
        return y if bias is None else y.add_(bias.to(extended.dtype))

    def last_state(self, extended: Tensor) -> Tensor:
        state = extended.gather(1, self._last_positions(extended))
        if self.reset_every is None:
            return state
        return select(self._in_last_block(self.reset_every), state)

    def add_last_state(self, grad_extended: Tensor, grad_state: Tensor) -> None:
        if self.reset_every is not None:
            grad_state = select(self._in_last_block(self.reset_every), grad_state)
        grad_extended.scatter_add_(1, self._last_positions(grad_extended), grad_state)

    def _initial_positions(self, extended: Tensor) -> Tensor:
        """Positions of the initial state, oldest frame first."""
        slots = torch.arange(self.width - 1, device=self.device)[None]
        if self.reverse:
            slots = self.lengths + slots.flip(-1)
        return self._index(slots, extended)

    def _last_positions(self, extended: Tensor) -> Tensor:
        """Positions of the last ``width - 1`` inputs, oldest frame first."""
        slots = torch.arange(self.width - 1, device=self.device)[None]
        slots = slots.flip(-1) if self.reverse else self.lengths + slots
        return self._index(slots, extended)

    @staticmethod
    def _index(slots: Tensor, extended: Tensor) -> Tensor:
        return slots.unsqueeze(-1).expand(extended.shape[0], -1, extended.shape[2])

    def _in_last_block(self, reset_every: int) -> Tensor:
        """Which of the last ``width - 1`` inputs the last block scanned holds."""
        slots = torch.arange(self.width - 1, device=self.device)[None]
        one_block = self.lengths <= reset_every
        if self.reverse:
            inside = slots.flip(-1) < reset_every
        else:
            frames = self.lengths - (self.width - 1) + slots
            start = (self.lengths - 1) // reset_every * reset_every
            inside = frames >= start
        return (one_block | inside).unsqueeze(-1)
