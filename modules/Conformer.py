"""SpeechBrain's Conformer encoder, made independent of what pads a batch."""

from speechbrain.lobes.models.transformer.Conformer import (
    ConformerEncoderLayer as SpeechBrainConformerEncoderLayer,
)
from speechbrain.lobes.models.transformer.Conformer import ConformerEncoderLayerStreamingContext
from speechbrain.nnet.activations import Swish
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig
from torch import Tensor, nn

from modules.convolution import ConvolutionModule, feed_forward_module
from modules.layer_stack import LayerStack, StreamingContext, Surroundings


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
            d_model, kernel_size, bias, activation, dropout, causal=causal
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

    def forward_streaming(
        self,
        x: Tensor,
        context: ConformerEncoderLayerStreamingContext,
        pos_embs: Tensor | None = None,
    ) -> tuple[Tensor, ConformerEncoderLayerStreamingContext]:
        """Applies the layer to the next chunk of a stream."""
        x, _ = super().forward_streaming(x, context, pos_embs)
        return x, context


class ConformerEncoder(LayerStack):
    """SpeechBrain's Conformer encoder over ``ConformerEncoderLayer``; parameters as there.

    Paper: arXiv:2005.08100.
    """

    layer_class = ConformerEncoderLayer

    def make_streaming_context(
        self, dynchunktrain_config: DynChunkTrainConfig | None
    ) -> StreamingContext:
        """Starts a stream.

        Raises:
            ValueError: the encoder is causal, or its left context is not finite: attention over all
                the past has no state of constant size.
        """
        if self.causal:
            raise ValueError(
                "A causal Conformer attends to all the past and cannot stream in constant memory; "
                "train with causal=False and chunks (DynChunkTrainConfig) instead."
            )
        if dynchunktrain_config is None or dynchunktrain_config.is_infinite_left_context():
            raise ValueError(
                "A Conformer streams in chunks over a finite left context; give a "
                "DynChunkTrainConfig(chunk_size, left_context_size) with both set."
            )
        num_left = dynchunktrain_config.left_context_size_frames()
        return StreamingContext(
            dynchunktrain_config, [layer.make_streaming_context(num_left) for layer in self.layers]
        )
