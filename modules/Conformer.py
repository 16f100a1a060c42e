"""SpeechBrain's Conformer encoder, made independent of what pads a batch."""

import torch
from speechbrain.lobes.models.transformer.Conformer import (
    ConformerEncoderLayer as SpeechBrainConformerEncoderLayer,
)
from speechbrain.nnet.activations import Swish
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig
from torch import Tensor, nn

from modules.convolution import ConvolutionModule, feed_forward_module
from modules.layer_stack import LayerStack, Surroundings
from modules.stream_state import StreamState, last_frames, stream_state


@stream_state
class ConformerLayerState(StreamState):
    """What a layer keeps between chunks of its streams.

    Args:
        left_BLD: the last frames before its attention, the newest last.
        num_left_B: how many of them are frames of the stream.
        conv_BPD: last inputs of the depthwise convolution.
    """

    left_BLD: Tensor
    num_left_B: Tensor
    conv_BPD: Tensor


class ConformerEncoderLayer(SpeechBrainConformerEncoderLayer):
    """SpeechBrain's Conformer layer with a convolution module that does not read padding."""

    def __init__(
        self,
        d_model: int,
        d_ffn: int,
        nhead: int,
        kernel_size: int = 31,
        activation: type[nn.Module] = Swish,
        bias: bool = True,
        dropout: float = 0.0,
        causal: bool = False,
        attention_type: str = "RelPosMHAXL",
        causal_convolution: bool = False,
    ):
        super().__init__(
            d_model=d_model,
            d_ffn=d_ffn,
            nhead=nhead,
            kernel_size=kernel_size,
            activation=activation,
            bias=bias,
            dropout=dropout,
            causal=causal,
            attention_type=attention_type,
        )
        self.convolution_module = ConvolutionModule(
            d_model, kernel_size, bias, activation, dropout, causal=causal or causal_convolution
        )
        self.ffn_module1 = feed_forward_module(d_model, d_ffn, dropout, activation)
        self.ffn_module2 = feed_forward_module(d_model, d_ffn, dropout, activation)

    def forward(self, x: Tensor, surroundings: Surroundings) -> Tensor:
        """Applies the layer to ``x`` (batch, time, d_model)."""
        x, _ = super().forward(
            x,
            src_mask=surroundings.src_mask,
            src_key_padding_mask=surroundings.padding_BT,
            pos_embs=surroundings.pos_embs,
            dynchunktrain_config=surroundings.chunks,
        )
        return x

    def initial_state(self, batch_size: int, chunks: DynChunkTrainConfig) -> ConformerLayerState:
        """State of streams before their first frame."""
        weight = self.norm1.norm.weight
        num_left, width = chunks.left_context_size_frames(), len(weight)
        return ConformerLayerState(
            weight.new_zeros(batch_size, num_left, width),
            weight.new_zeros(batch_size, dtype=torch.long),
            weight.new_zeros(batch_size, self.convolution_module.padding, width),
        )

    def forward_streaming(
        self, x_BTD: Tensor, surroundings: Surroundings, state: ConformerLayerState
    ) -> tuple[Tensor, ConformerLayerState]:
        """Applies the layer to the next chunk of streams."""
        padding_BT, lengths_B = surroundings.padding_BT, surroundings.lengths_B
        frames, num_left = x_BTD.shape[1], state.left_BLD.shape[1]
        x_BTD = x_BTD + 0.5 * self.ffn_module1(x_BTD)
        seen_BLD = torch.cat([state.left_BLD, x_BTD], dim=1)
        places_L = torch.arange(num_left, device=x_BTD.device)
        unseen_BL = places_L < num_left - state.num_left_B[:, None]
        present_BT = torch.zeros_like(x_BTD[..., 0], dtype=torch.bool)
        unseen_BL = torch.cat([unseen_BL, present_BT if padding_BT is None else padding_BT], 1)
        # A row that is held may see no frame at all, which attention answers with NaN.
        unseen_BL &= ~unseen_BL.all(dim=1, keepdim=True)
        normed_BLD = self.norm1(seen_BLD)
        # SpeechBrain's attention wants as many queries as keys.
        attended_BLD, _ = self.mha_layer(
            normed_BLD,
            normed_BLD,
            normed_BLD,
            key_padding_mask=unseen_BL,
            pos_embs=surroundings.pos_embs,
        )
        x_BTD = x_BTD + attended_BLD[:, num_left:]
        mask_BT1 = None if padding_BT is None else padding_BT.unsqueeze(-1)
        convolved_BTD, conv_BPD = self.convolution_module.forward_streaming(
            x_BTD, state.conv_BPD, mask_BT1, lengths_B
        )
        x_BTD = x_BTD + convolved_BTD
        num_new_B = frames if lengths_B is None else lengths_B
        next_state = ConformerLayerState(
            last_frames(seen_BLD, num_left, lengths_B),
            (state.num_left_B + num_new_B).clamp(max=num_left),
            conv_BPD,
        )
        return self.norm2(x_BTD + 0.5 * self.ffn_module2(x_BTD)), next_state


class ConformerEncoder(LayerStack):
    """SpeechBrain's Conformer encoder over ``ConformerEncoderLayer``; parameters as there.

    Paper: arXiv:2005.08100.
    """

    layer_class = ConformerEncoderLayer

    def check_streaming(self, chunks: DynChunkTrainConfig | None) -> None:
        """Checks that there are chunks with a finite left context.

        Raises:
            ValueError: the encoder is causal, or its left context is not finite: attention over all
                the past has no state of constant size.
        """
        if self.causal:
            raise ValueError(
                "A causal Conformer attends to all the past and cannot stream in constant memory; "
                "train with causal=False and chunks (DynChunkTrainConfig) instead."
            )
        if chunks is None or chunks.is_infinite_left_context():
            raise ValueError(
                "A Conformer streams in chunks over a finite left context; give a "
                "DynChunkTrainConfig(chunk_size, left_context_size) with both set."
            )
