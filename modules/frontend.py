"""Convolutional front end: a quarter of the frames come out, each item padded at its own end."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from speechbrain.lobes.models.convolution import ConvolutionFrontEnd as SpeechBrainFrontEnd
from speechbrain.nnet.CNN import Conv2d as SpeechBrainConv2d
from speechbrain.nnet.CNN import get_padding_elem
from speechbrain.nnet.normalization import LayerNorm
from torch import Tensor, nn

from modules.dropout import replace_dropout
from modules.lengths import IntOrTensor, padding_mask
from modules.plain_layers import is_plain

PADDINGS = ("same", "causal")


@dataclass(frozen=True)
class ConvStreamState:
    """What one convolution keeps between chunks of a stream.

    Args:
        frames_BTFC: frames that later outputs still read, the left edge included once attached.
        num_seen: frames of the stream so far.
        has_left_edge: whether the padding before frame 0 is attached.
    """

    frames_BTFC: Tensor
    num_seen: int
    has_left_edge: bool


@dataclass(frozen=True)
class FrontEndState:
    """What the front end keeps between chunks: one entry per convolution, constant in size."""

    convs: tuple[ConvStreamState, ...]


class Conv2d(SpeechBrainConv2d):
    """SpeechBrain's Conv2d over (batch, time, frequency, channel), padded at each item's own end.

    Parameters and their names are SpeechBrain's. ``padding="same"`` reflects in time at frame 0 and
    at the item's last valid frame; ``"causal"`` puts zeros before frame 0 and nothing behind.
    Frequency is reflected either way. An item too short for a reflection repeats its outer frame.
    """

    def __init__(self, *args, input_shape=None, padding: str = "same", **kwargs):
        super().__init__(*args, input_shape=input_shape, padding=padding, **kwargs)
        (kernel_F, kernel_T), (stride_F, stride_T) = self.kernel_size, self.stride
        dilation_F, dilation_T = self.dilation
        # SpeechBrain passes the channel count as the length; the amounts do not depend on it.
        self.pad_frequency, _ = get_padding_elem(self.in_channels, stride_F, kernel_F, dilation_F)
        self.reach_frames = dilation_T * (kernel_T - 1) + 1
        self.stride_frames = stride_T
        if padding == "causal":
            self.pad_left, self.pad_right = self.reach_frames - 1, 0
        else:
            self.pad_left, self.pad_right = get_padding_elem(
                self.in_channels, stride_T, kernel_T, dilation_T
            )

    def forward(self, x: Tensor, num_frames_B: Tensor | None = None) -> Tensor:
        """Convolves ``x`` (batch, time, frequency[, channel]); padded frames come out arbitrary."""
        return self._convolve(self._padded_in_time(_with_channel(x), num_frames_B))

    def out_frames(self, num_frames: IntOrTensor) -> IntOrTensor:
        """Frames that come out of ``num_frames``."""
        padded = num_frames + self.pad_left + self.pad_right
        return (padded - self.reach_frames) // self.stride_frames + 1

    def forward_streaming(
        self, x: Tensor, state: ConvStreamState | None, final: bool
    ) -> tuple[Tensor, ConvStreamState]:
        """Gives the frames that ``x``, the next frames of a stream, complete, possibly none.

        The same values as ``forward`` over the whole stream, whose end is where ``final`` is given.
        """
        frames = _with_channel(x)
        num_seen, has_left_edge = frames.shape[1], False
        if state is not None:
            frames = torch.cat([state.frames_BTFC, frames], dim=1)
            num_seen, has_left_edge = num_seen + state.num_seen, state.has_left_edge
        if not has_left_edge:
            if self.padding == "causal":
                frames = F.pad(frames, (0, 0, 0, 0, self.pad_left, 0))
            elif num_seen > self.pad_left or (final and num_seen):
                mirrored = [min(i, num_seen - 1) for i in range(self.pad_left, 0, -1)]
                frames = torch.cat([frames[:, mirrored], frames], dim=1)
            else:
                return self._no_frames(frames), ConvStreamState(frames, num_seen, False)
        if final and num_seen:
            # Stream frame t stands at t + offset of the buffer.
            offset = frames.shape[1] - num_seen
            sources = [max(num_seen - 2 - i, 0) + offset for i in range(self.pad_right)]
            # A source already dropped belongs to an edge that no output reads.
            frames = torch.cat([frames, frames[:, [max(i, 0) for i in sources]]], dim=1)
        num_out = max((frames.shape[1] - self.reach_frames) // self.stride_frames + 1, 0)
        consumed = num_out * self.stride_frames
        y_BTFC = self._convolve(frames) if num_out else self._no_frames(frames)
        return y_BTFC, ConvStreamState(frames[:, consumed:], num_seen, True)

    def _convolve(self, x_BTFC: Tensor) -> Tensor:
        if self.pad_frequency:
            x_BTFC = reflect_frequency(x_BTFC, self.pad_frequency)
        # Seen as (batch, channel, time, frequency) this memory is channels-last: what convolution
        # libraries prefer, and the LayerNorm behind finds frequency and channel side by side.
        x_BCTF = x_BTFC.permute(0, 3, 1, 2)
        if not is_plain(self.conv):
            return self.conv(x_BCTF.transpose(2, 3)).permute(0, 3, 2, 1)
        conv = cast(nn.Conv2d, self.conv)
        y_BCTF = F.conv2d(
            x_BCTF,
            conv.weight.transpose(2, 3),
            conv.bias,
            stride=self.stride[::-1],
            dilation=self.dilation[::-1],
            groups=conv.groups,
        )
        return y_BCTF.permute(0, 2, 3, 1)

    def _no_frames(self, x_BTFC: Tensor) -> Tensor:
        bins = (
            x_BTFC.shape[2] + 2 * self.pad_frequency - self.dilation[0] * (self.kernel_size[0] - 1)
        )
        out_bins = (bins - 1) // self.stride[0] + 1
        return x_BTFC.new_zeros(x_BTFC.shape[0], 0, out_bins, self.conv.out_channels)

    def _padded_in_time(self, x_BTFC: Tensor, num_frames_B: Tensor | None) -> Tensor:
        if self.padding == "causal":
            return F.pad(x_BTFC, (0, 0, 0, 0, self.pad_left, 0))
        batch, frames = x_BTFC.shape[:2]
        if num_frames_B is None:
            num_frames_B = x_BTFC.new_full((batch,), frames, dtype=torch.long)
        rows_B1 = torch.arange(batch, device=x_BTFC.device)[:, None]
        before_L = torch.arange(self.pad_left, 0, -1, device=x_BTFC.device)
        behind_R = torch.arange(self.pad_right, device=x_BTFC.device)
        last_B1 = (num_frames_B - 1).clamp(min=0)[:, None]
        left_BLFC = x_BTFC[rows_B1, torch.minimum(before_L, last_B1)]
        right_BRFC = x_BTFC[rows_B1, (last_B1 - 1 - behind_R).clamp(min=0)]
        space_for_right = F.pad(x_BTFC, (0, 0, 0, 0, 0, self.pad_right))
        padded_BTFC = torch.cat([left_BLFC, space_for_right], dim=1)
        padded_BTFC[rows_B1, self.pad_left + num_frames_B[:, None] + behind_R] = right_BRFC
        return padded_BTFC


class ConvolutionFrontEnd(SpeechBrainFrontEnd):
    """SpeechBrain's convolutional front end whose output depends on an item's own frames alone.

    Parameters and their names are SpeechBrain's, so its weights load. The defaults are the
    published front end: two 3x3 convolutions of stride 2, which make 80 mel bins at 100 frames a
    second 20 x 32 values at 25.

    Args:
        input_shape: (batch, time, mel bins) of the input, ``None`` where it varies.
        padding: "same" reflects at both ends in time; "causal" makes an output frame independent of
            all later input frames.
        dilations: of each block; ``None``: 1.
        Others as in SpeechBrain's class, a value for each block.

    Raises:
        ValueError: ``padding`` is neither "same" nor "causal", or a block lacks a value.
    """

    def __init__(
        self,
        input_shape: Sequence[int | None],
        num_blocks: int = 2,
        num_layers_per_block: int = 1,
        out_channels: Sequence[int] = (64, 32),
        kernel_sizes: Sequence[int] = (3, 3),
        strides: Sequence[int] = (2, 2),
        dilations: Sequence[int] | None = None,
        residuals: Sequence[bool] = (False, False),
        activation: Callable[[], nn.Module] = nn.LeakyReLU,
        norm: type[nn.Module] | None = LayerNorm,
        dropout: float = 0.1,
        conv_bias: bool = True,
        padding: str = "same",
        conv_init: str | None = None,
    ):
        if padding not in PADDINGS:
            raise ValueError(f"padding is {padding!r}; known are {', '.join(PADDINGS)}.")
        dilations = dilations or (1,) * num_blocks
        of_each_block = {
            "out_channels": out_channels,
            "kernel_sizes": kernel_sizes,
            "strides": strides,
            "dilations": dilations,
            "residuals": residuals,
        }
        for name, values in of_each_block.items():
            if len(values) != num_blocks:
                raise ValueError(
                    f"{name} has {len(values)} values for num_blocks={num_blocks}: one each."
                )
        super().__init__(
            input_shape=input_shape,
            num_blocks=num_blocks,
            num_layers_per_block=num_layers_per_block,
            out_channels=out_channels,
            kernel_sizes=kernel_sizes,
            strides=strides,
            dilations=dilations,
            residuals=residuals,
            conv_module=Conv2d,
            activation=activation,
            norm=norm,
            dropout=dropout,
            conv_bias=conv_bias,
            padding=padding,
            conv_init=conv_init,
        )
        replace_dropout(self)

    def forward(self, feats_BTM: Tensor, num_frames_B: Tensor | None = None) -> Tensor:
        """Subsampled frames (batch, time, frequency, channel), zero beyond each item's own.

        Args:
            feats_BTM: features, padded with anything.
            num_frames_B: integer feature frames per item; ``None``: all.
        """
        x = feats_BTM
        if num_frames_B is not None:
            padding_BT = padding_mask(num_frames_B, feats_BTM.shape[1])
            # What stands there has no effect on the output, but would have one on the gradient of
            # the weights if it were NaN.
            x = x.masked_fill(padding_BT.unsqueeze(-1), 0.0)
        for block in self.values():
            block_input, block_frames_B = x, num_frames_B
            x, num_frames_B = _run(block.convs, x, num_frames_B)
            if block.reduce_conv is not None:
                x = block.drop(x + _run(block.reduce_conv, block_input, block_frames_B)[0])
        if num_frames_B is not None:
            x = x.masked_fill(padding_mask(num_frames_B, x.shape[1])[:, :, None, None], 0.0)
        return x

    def out_frames(self, num_feature_frames: IntOrTensor) -> IntOrTensor:
        """Frames that come out of so many feature frames (int or integer tensor)."""
        for convolution in self._convolutions():
            num_feature_frames = convolution.out_frames(num_feature_frames)
        return num_feature_frames

    @property
    def stride_frames(self) -> int:
        """Feature frames from one frame that comes out to the next."""
        return math.prod(convolution.stride_frames for convolution in self._convolutions())

    def _convolutions(self) -> list[Conv2d]:
        layers = [layer for block in self.values() for layer in block.convs.values()]
        return [layer for layer in layers if isinstance(layer, Conv2d)]

    def forward_streaming(
        self, feats_BTM: Tensor, state: FrontEndState | None = None, final: bool = False
    ) -> tuple[Tensor, FrontEndState]:
        """The next frames of a stream: all that ``feats_BTM`` completes, in any cutting.

        Args:
            feats_BTM: the next feature frames of every stream, any number of them.
            state: what the previous call returned; ``None`` starts a stream.
            final: these are the last frames. The reflection at the end needs to know.

        Returns:
            the frames (batch, time, frequency, channel), possibly none, and the next state.

        Raises:
            ValueError: the front end has residual blocks, which cannot stream.
        """
        if any(block.reduce_conv is not None for block in self.values()):
            raise ValueError("A front end with residual blocks cannot stream; set residuals=False.")
        layers = [layer for block in self.values() for layer in block.convs.values()]
        no_states = [None] * len(self._convolutions())
        old_states = iter(state.convs if state is not None else no_states)
        new_states = []
        x = feats_BTM
        for layer in layers:
            if isinstance(layer, Conv2d):
                x, conv_state = layer.forward_streaming(x, next(old_states), final)
                new_states.append(conv_state)
            else:
                x = layer(x)
        return x, FrontEndState(tuple(new_states))


class _ReflectFrequency(torch.autograd.Function):
    """Reflection at both ends of the frequency axis, in one pass over memory each way.

    torch's own goes through the other memory format and back: a tenth of a training step.
    """

    @staticmethod
    def forward(x_BTFC: Tensor, amount: int) -> Tensor:
        bins = x_BTFC.shape[2]
        shape = (*x_BTFC.shape[:2], bins + 2 * amount, x_BTFC.shape[3])
        padded = x_BTFC.new_empty(shape)
        padded[:, :, amount : amount + bins] = x_BTFC
        for i in range(1, amount + 1):
            padded[:, :, amount - i] = x_BTFC[:, :, i]
            padded[:, :, amount + bins - 1 + i] = x_BTFC[:, :, bins - 1 - i]
        return padded

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.amount = inputs[1]

    @staticmethod
    def backward(ctx, grad_padded: Tensor):
        amount = ctx.amount
        bins = grad_padded.shape[2] - 2 * amount
        grad_BTFC = grad_padded[:, :, amount : amount + bins].clone()
        for i in range(1, amount + 1):
            grad_BTFC[:, :, i] += grad_padded[:, :, amount - i]
            grad_BTFC[:, :, bins - 1 - i] += grad_padded[:, :, amount + bins - 1 + i]
        return grad_BTFC, None


def reflect_frequency(x_BTFC: Tensor, amount: int) -> Tensor:
    """``x`` (batch, time, frequency, channel) with ``amount`` bins mirrored at either end."""
    return _ReflectFrequency.apply(x_BTFC, amount)


def _with_channel(x: Tensor) -> Tensor:
    return x.unsqueeze(-1) if x.dim() == 3 else x


def _run(layers: nn.ModuleDict, x: Tensor, num_frames_B: Tensor | None):
    for layer in layers.values():
        if isinstance(layer, Conv2d):
            x = layer(x, num_frames_B)
            num_frames_B = None if num_frames_B is None else layer.out_frames(num_frames_B)
        else:
            x = layer(x)
    return x, num_frames_B
