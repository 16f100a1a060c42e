"""ConMamba encoder: the Conformer's layer with a Mamba mixer in the place of self-attention."""

from collections.abc import Mapping
from typing import Any

import torch
from speechbrain.nnet.normalization import LayerNorm
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig
from torch import Tensor, nn

from modules.convolution import ConvolutionModule, feed_forward_module
from modules.layer_stack import Surroundings, pieces_of
from modules.mamba import Mamba, MambaState
from modules.mamba_config import mixer_options
from modules.mamba_stack import MambaLayerStack
from modules.stream_state import StreamState, stream_state


@stream_state
class ConmambaLayerState(StreamState):
    """What a layer keeps between chunks of its streams.

    Args:
        mamba: state of the mixer.
        conv_BPD: last inputs of the depthwise convolution.
    """

    mamba: MambaState
    conv_BPD: Tensor


class ConmambaEncoderLayer(nn.Module):
    """One ConMamba layer: half feed-forward, Mamba, convolution, half feed-forward, LayerNorm.

    Args:
        d_model: width of input and output.
        d_ffn: inner width of the feed-forward modules.
        kernel_size: taps of the depthwise convolution.
        activation: of the feed-forward and convolution modules.
        bias: whether the convolution module has biases.
        dropout: in the feed-forward and convolution modules; there is none after the mixer.
        causal: no frame sees a later one.
        mamba_config: options of the mixer, see ``mixer_options``.

    Paper: arXiv:2407.09732.
    """

    def __init__(
        self,
        d_model: int,
        d_ffn: int,
        kernel_size: int = 31,
        activation: type[nn.Module] = nn.GELU,
        bias: bool = True,
        dropout: float = 0.0,
        causal: bool = False,
        mamba_config: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.mamba = Mamba(d_model=d_model, **mixer_options(mamba_config, causal))
        self.convolution_module = ConvolutionModule(
            d_model, kernel_size, bias, activation, dropout, causal=causal
        )
        self.ffn_module1 = feed_forward_module(d_model, d_ffn, dropout, activation)
        self.ffn_module2 = feed_forward_module(d_model, d_ffn, dropout, activation)
        self.norm1 = LayerNorm(d_model)
        self.norm2 = LayerNorm(d_model)

    def initial_state(
        self, batch_size: int, chunks: DynChunkTrainConfig | None
    ) -> ConmambaLayerState:
        """State of streams before their first frame."""
        mamba = self.mamba.initial_state(batch_size)
        shape = batch_size, self.convolution_module.padding, self.mamba.d_model
        return ConmambaLayerState(mamba, mamba.conv.new_zeros(shape))

    def forward(self, x_BTD: Tensor, surroundings: Surroundings) -> Tensor:
        """Applies the layer.

        The state of the mixer carries the whole past: ``left_context_size`` does not limit it.
        """
        return self.forward_streaming(x_BTD, surroundings, None)[0]

    def forward_streaming(
        self, x_BTD: Tensor, surroundings: Surroundings, state: ConmambaLayerState | None
    ) -> tuple[Tensor, ConmambaLayerState | None]:
        """Applies the layer to the next chunk of streams, or to whole utterances (None)."""
        padding_BT, lengths_B = surroundings.padding_BT, surroundings.lengths_B
        mask_BT1 = None if padding_BT is None else padding_BT.unsqueeze(-1)
        x_BTD = torch.add(x_BTD, self.ffn_module1(x_BTD), alpha=0.5)
        mixed_BTD, mamba = self.mamba(
            self.norm1(x_BTD),
            lengths_B,
            None if state is None else state.mamba,
            chunk_size=surroundings.chunk_size,
            return_state=True,
        )
        x_BTD = x_BTD + mixed_BTD
        if state is None:
            x_BTD = x_BTD + self.convolution_module(x_BTD, mask_BT1, surroundings.chunks)
        else:
            convolved_BTD, conv_BPD = self.convolution_module.forward_streaming(
                x_BTD, state.conv_BPD, mask_BT1, lengths_B
            )
            x_BTD, state = x_BTD + convolved_BTD, ConmambaLayerState(mamba, conv_BPD)
        x_BTD = torch.add(x_BTD, self.ffn_module2(x_BTD), alpha=0.5)
        return self.norm2(x_BTD), state

    def forward_in_pieces(self, x_BTD: Tensor, piece_frames: int) -> Tensor:
        """Applies the layer to a whole recording in memory for a piece; changes ``x_BTD``."""
        pieces = pieces_of(x_BTD, piece_frames)
        for piece_BTD in pieces:
            piece_BTD += 0.5 * self.ffn_module1(piece_BTD)
        x_BTD += self.mamba.forward_in_pieces(x_BTD, piece_frames, before=self.norm1)
        x_BTD += self.convolution_module.forward_in_pieces(x_BTD, piece_frames)
        for piece_BTD in pieces:
            piece_BTD.copy_(self.norm2(piece_BTD + 0.5 * self.ffn_module2(piece_BTD)))
        return x_BTD


class ConmambaEncoder(MambaLayerStack):
    """A stack of ConMamba layers and a closing LayerNorm."""

    layer_class = ConmambaEncoderLayer
