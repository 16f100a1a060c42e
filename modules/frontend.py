"""Convolutional front end: a quarter of the frames come out, each item padded at its own end."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

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
from modules.stream_state import last_frames

PADDINGS = ("same", "causal")
# What more of them have between two convolutions has left the caches by the second one.
_STREAMS_AT_ONCE = 8


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
        self,
        x: Tensor,
        before: Tensor,
        num_frames_B: Tensor | None,
        num_early: int,
        is_first_B: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Convolves the next frames of streams; a causal convolution alone can.

        Args:
            x: (batch, time, frequency[, channel]), as many frames as strides.
            before: the frames of the call before that are still read, zeros before the first.
            num_frames_B: how many frames of each row count, integers; None means all.
            num_early: how many of the first frames lie before the beginning
            is_first_B: in these rows; they are zero, whatever stands there.

        Returns:
            a frame per stride, and the frames that the next call reads.
        """
        seen, kept = torch.cat([before, _with_channel(x)], dim=1), before.shape[1]
        seen[:, kept : kept + num_early].masked_fill_(is_first_B[:, None, None, None], 0.0)
        # Of a kernel shorter than its stride the first frames of a stride are not read.
        unread = max(self.stride_frames - self.reach_frames, 0)
        return self._convolve(seen[:, unread:]), last_frames(seen, kept, num_frames_B)

    @property
    def num_kept_frames(self) -> int:
        """Frames before the next one that are still read, in a stream."""
        return max(self.reach_frames - self.stride_frames, 0)

    def out_bins(self, bins: int) -> int:
        """Frequencies that come out of so many."""
        read = self.dilation[0] * (self.kernel_size[0] - 1)
        return (bins + 2 * self.pad_frequency - read - 1) // self.stride[0] + 1

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
        left_BLFC = _frames(x_BTFC, torch.minimum(before_L, last_B1))
        right_BRFC = _frames(x_BTFC, (last_B1 - 1 - behind_R).clamp(min=0))
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
        return [layer for layer in self._layers() if isinstance(layer, Conv2d)]

    @torch.no_grad()
    def forward_in_pieces(self, feats_BTM: Tensor, piece_frames: int) -> Iterator[Tensor]:
        """``forward(feats_BTM)`` piece by piece, in memory for a piece.

        Args:
            feats_BTM: features, all of them valid.
            piece_frames: feature frames of a piece, about.
        """
        stride, num_out = self.stride_frames, self.out_frames(feats_BTM.shape[1])
        step = max(1, piece_frames // stride)
        # More output frames than the taps of all layers reach.
        margin = sum(layer.reach_frames for layer in self._convolutions())
        for start in range(0, num_out, step):
            first = max(start - margin, 0)
            stop = (start + step + margin) * stride
            out_BTFC = self.forward(feats_BTM[:, first * stride : stop])
            yield out_BTFC[:, start - first : start - first + step]

    def check_streaming(self) -> None:
        """Checks that the front end can stream.

        Raises:
            ValueError: it has residual blocks, or sees the future.
        """
        if any(block.reduce_conv is not None for block in self.values()):
            raise ValueError("A front end with residual blocks cannot stream; set residuals=False.")
        if any(layer.padding != "causal" for layer in self._convolutions()):
            raise ValueError(
                "A front end that sees the future cannot stream; train one with padding='causal'."
            )

    def initial_state(self, batch_size: int, bins: int) -> tuple[Tensor, ...]:
        """For each convolution the frames that it still reads, of streams before their first.

        Args:
            bins: mel bins of the features.

        Raises:
            ValueError: the front end cannot stream.
        """
        self.check_streaming()
        states, channels = [], 1
        for layer in self._convolutions():
            weight = layer.conv.weight
            states.append(weight.new_zeros(batch_size, layer.num_kept_frames, bins, channels))
            bins, channels = layer.out_bins(bins), layer.conv.out_channels
        return tuple(states)

    def forward_streaming(
        self,
        feats_BTM: Tensor,
        state: Sequence[Tensor],
        is_first_B: Tensor,
        num_frames_B: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The next frames of streams, what ``forward`` gives over the whole of each.

        Output frame t reads nothing behind feature ``stride_frames`` t. So the first chunk of a
        stream begins ``stride_frames - 1`` frames before its features do, with anything in them.

        Args:
            feats_BTM: ``stride_frames`` feature frames for each frame that comes out.
            state: from ``initial_state``, or what the previous call returned.
            is_first_B: rows whose streams begin with this call.
            num_frames_B: how many of the frames that come out count, in each row; None means all.

        Returns:
            the frames (batch, time, frequency, channel), and the next state.
        """
        if len(feats_BTM) > _STREAMS_AT_ONCE:
            parts = [
                self.forward_streaming(feats_BTM[rows], [s[rows] for s in state], *others)
                for rows, *others in _parts(is_first_B, num_frames_B)
            ]
            states_of_parts = zip(*(kept for _, kept in parts), strict=True)
            return torch.cat([out for out, _ in parts]), tuple(map(torch.cat, states_of_parts))
        x, stride = feats_BTM, self.stride_frames
        before, states = iter(state), []
        for layer in self._layers():
            if not isinstance(layer, Conv2d):
                x = layer(x)
                continue
            counted_B = None if num_frames_B is None else num_frames_B * stride
            x, kept = layer.forward_streaming(x, next(before), counted_B, stride - 1, is_first_B)
            states.append(kept)
            stride //= layer.stride_frames
        return x, tuple(states)

    def _layers(self) -> list[nn.Module]:
        return [layer for block in self.values() for layer in block.convs.values()]


def _parts(is_first_B: Tensor, num_frames_B: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Rows to be convolved together, and what is theirs of the arguments."""
    for start in range(0, len(is_first_B), _STREAMS_AT_ONCE):
        rows = slice(start, start + _STREAMS_AT_ONCE)
        yield rows, is_first_B[rows], None if num_frames_B is None else num_frames_B[rows]


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


def _frames(x_BTFC: Tensor, index_BL: Tensor) -> Tensor:
    """Frames of each item; unlike indexing, a GPU sorts nothing for its gradient."""
    index = index_BL[:, :, None, None].expand(-1, -1, *x_BTFC.shape[2:])
    return x_BTFC.gather(1, index)


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
