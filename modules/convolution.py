"""Convolution module of Conformer and ConMamba, and the feed-forward module beside it."""

from typing import Any

import torch
import torch.nn.functional as F
from speechbrain.lobes.models.transformer.Conformer import (
    ConvolutionModule as SpeechBrainConvolutionModule,
)
from speechbrain.nnet.attention import PositionalwiseFeedForward
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig
from torch import Tensor, nn

from modules.overlapping_chunks import before_and_after
from modules.plain_layers import is_plain, runs_its_class
from ops import checks


class FeedForward(PositionalwiseFeedForward):
    """SpeechBrain's position-wise feed-forward, faster on a CPU.

    Left out are its two transpositions, which change nothing in the result and cost a copy of the
    input.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Applies the layer to ``x`` (..., d_model)."""
        return self.ffn(x)

    def step(self, x_BD: Tensor) -> Tensor:
        """Applies the layer to one frame of each item, without dropout."""
        inner, activation, _, outer = self.ffn
        return outer(activation(inner(x_BD)))


def feed_forward_module(
    d_model: int, d_ffn: int, dropout: float, activation: type[nn.Module]
) -> nn.Sequential:
    """LayerNorm, feed-forward, dropout: what Conformer layers halve and add to their input."""
    return nn.Sequential(
        nn.LayerNorm(d_model),
        FeedForward(d_ffn=d_ffn, input_size=d_model, dropout=dropout, activation=activation),
        nn.Dropout(dropout),
    )


def depthwise(
    x_BTD: Tensor,
    weight_D1W: Tensor,
    bias_D: Tensor | None,
    padding: int = 0,
    dilation: int = 1,
) -> Tensor:
    """Convolves every channel in time, after ``padding`` zeros at both ends."""
    groups = len(weight_D1W)
    x_BDT = x_BTD.transpose(1, 2)
    if not checks.is_on_cpu(x_BTD):
        y_BDT = F.conv1d(x_BDT, weight_D1W, bias_D, 1, padding, dilation, groups)
        return y_BDT.transpose(1, 2)
    # As an image of width 1 the frames are channels-last already, for which CPUs have a vectorised
    # depthwise kernel: six times faster than the one-dimensional convolution.
    y_BDT1 = F.conv2d(
        x_BDT.unsqueeze(-1),
        weight_D1W.unsqueeze(-1),
        bias_D,
        padding=(padding, 0),
        dilation=(dilation, 1),
        groups=groups,
    )
    return y_BDT1.squeeze(-1).transpose(1, 2)


class ConvolutionModule(SpeechBrainConvolutionModule):
    """SpeechBrain's Conformer convolution module whose taps do not read padding.

    SpeechBrain masks the output only; here the input of the depthwise convolution is masked too, so
    that the last frames of an item do not depend on what follows it in a batch. Parameters and
    their names are SpeechBrain's.

    Raises:
        ValueError: an even ``kernel_size`` of a module that is not causal, whose output would have
            a frame less.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.kernel_size % 2 == 0 and not self.causal:
            raise ValueError(
                f"kernel_size is {self.kernel_size}; a convolution that sees as many frames ahead "
                "as behind needs an odd one."
            )

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        dynchunktrain_config: DynChunkTrainConfig | None = None,
    ) -> Tensor:
        """Convolves ``x`` (batch, time, d_model).

        Args:
            mask: (batch, time, 1), True where a frame is padding.
            dynchunktrain_config: cuts time into chunks; a frame then sees those before its own
                chunk as far as the taps reach, its chunk, and nothing behind it. A causal module
                sees nothing behind a frame anyway.
        """
        gated_BTD = self._gated(x, mask)
        if dynchunktrain_config is None or self.causal:
            # A causal module is padded at both ends as well; what the right end gives is cut off.
            out = self._depthwise(gated_BTD, self.padding)[:, : x.shape[1]]
        else:
            out = self._depthwise_in_chunks(gated_BTD, dynchunktrain_config.chunk_size)
        return self._after(out, mask)

    @torch.no_grad()
    def forward_in_pieces(self, x_BTD: Tensor, piece_frames: int) -> Tensor:
        """``forward(x_BTD)`` in memory for a piece, each convolved with what its taps reach."""
        y_BTD = torch.empty_like(x_BTD)
        frames = x_BTD.shape[1]
        for start in range(0, frames, piece_frames):
            stop = min(start + piece_frames, frames)
            first = max(start - self.padding, 0)
            last = stop if self.causal else min(stop + self.padding, frames)
            piece_BTD = self.forward(x_BTD[:, first:last])
            y_BTD[:, start:stop] = piece_BTD[:, start - first : stop - first]
        return y_BTD

    def forward_streaming(
        self,
        x: Tensor,
        left_BPD: Tensor,
        mask: Tensor | None = None,
        num_frames_B: Tensor | None = None,
        ahead: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Convolves the next chunks of streams: ``forward`` over the streams, cut at chunks' ends.

        Args:
            x: a chunk (batch, time, d_model), or for every row of ``left_BPD`` so many, one after
                the other; of a causal module any number of frames.
            left_BPD: what the previous call returned; zeros (batch, padding, d_model) before it.
            mask: as in ``forward``.
            num_frames_B: how many frames of each row are not padding, integers; None means all.
            ahead: frames at the end of a chunk that the next one begins with.

        Returns:
            the output, and the last inputs of the depthwise convolution before what comes next.
        """
        gated_BTD, own = self._gated(x, mask), x.shape[1] - ahead
        num_own_B = None if num_frames_B is None else num_frames_B.clamp(max=own)
        left_BPD, last_BPD = before_and_after(left_BPD, gated_BTD[:, :own], num_own_B)
        seen_BLD = torch.cat([left_BPD, gated_BTD], dim=1)
        padded_BLD = seen_BLD if self.causal else F.pad(seen_BLD, (0, 0, 0, self.padding))
        out = self._after(self._depthwise(padded_BLD), mask)
        return out, last_BPD

    def _after(self, x_BTD: Tensor, mask: Tensor | None) -> Tensor:
        x_BTD = self.after_conv(x_BTD)
        return x_BTD if mask is None else x_BTD.masked_fill(mask, 0.0)

    def _gated(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x, pointwise = self.layer_norm(x), self.bottleneck[0]
        if is_plain(pointwise) and runs_its_class(self.bottleneck):
            gated_BTD = F.glu(F.linear(x, pointwise.weight.squeeze(-1), pointwise.bias))
        else:
            gated_BTD = self.bottleneck(x.transpose(1, 2)).transpose(1, 2)
        return gated_BTD if mask is None else gated_BTD.masked_fill(mask, 0.0)

    def _depthwise(self, x_BTD: Tensor, padding: int = 0) -> Tensor:
        """The depthwise convolution behind ``padding`` zeros, at most its own, at both ends."""
        if is_plain(self.conv) and isinstance(self.conv, nn.Conv1d):
            (dilation,) = self.conv.dilation
            return depthwise(x_BTD, self.conv.weight, self.conv.bias, padding, dilation)
        y_BTD = self.conv(x_BTD.transpose(1, 2)).transpose(1, 2)
        surplus = self.padding - padding
        return y_BTD[:, surplus : y_BTD.shape[1] - surplus]

    def _depthwise_in_chunks(self, x_BTD: Tensor, chunk_size: int) -> Tensor:
        batch, frames, width = x_BTD.shape
        filler = -frames % chunk_size
        padded = F.pad(x_BTD, (0, 0, self.padding, filler))
        # One row per chunk: its left context, its frames, zeros where the future would be.
        chunks = padded.unfold(1, self.padding + chunk_size, chunk_size).transpose(2, 3)
        rows = F.pad(chunks.flatten(0, 1), (0, 0, 0, self.padding))
        return self._depthwise(rows).reshape(batch, frames + filler, width)[:, :frames]
