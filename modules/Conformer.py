"""SpeechBrain's Conformer encoder, made independent of what pads a batch."""

from collections.abc import Collection

from speechbrain.lobes.models.transformer.Conformer import (
    ConformerEncoder as SpeechBrainConformerEncoder,
)
from speechbrain.lobes.models.transformer.Conformer import (
    ConformerEncoderLayer as SpeechBrainConformerEncoderLayer,
)
from speechbrain.lobes.models.transformer.Conformer import ConformerEncoderStreamingContext
from speechbrain.nnet.activations import Swish
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig
from torch import Tensor, nn

from modules.convolution import ConvolutionModule, feed_forward_module
from modules.layer_stack import LayerStack


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


class ConformerEncoder(LayerStack, SpeechBrainConformerEncoder):
    """SpeechBrain's Conformer encoder over ``ConformerEncoderLayer``; parameters as there.

    Paper: arXiv:2005.08100.
    """

    def __init__(
        self,
        num_layers: int,
        d_model: int,
        d_ffn: int,
        nhead: int,
        kernel_size: int = 31,
        activation: type[nn.Module] = Swish,
        bias: bool = True,
        dropout: float = 0.0,
        causal: bool = False,
        attention_type: str = "RelPosMHAXL",
        layerdrop_prob: float = 0.0,
        gradient_checkpointing: bool = False,
    ):
        # Its layers would be SpeechBrain's: none are made there.
        super().__init__(
            num_layers=0,
            d_model=d_model,
            d_ffn=d_ffn,
            nhead=nhead,
            attention_type=attention_type,
            layerdrop_prob=layerdrop_prob,
        )
        self.causal = causal
        self.gradient_checkpointing = gradient_checkpointing
        self.layers = nn.ModuleList(
            ConformerEncoderLayer(
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
            for _ in range(num_layers)
        )

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        pos_embs: Tensor | None = None,
        dynchunktrain_config: DynChunkTrainConfig | None = None,
        intermediate_layers: Collection[int] = (),
    ) -> tuple[Tensor, list[Tensor]]:
        """Encodes ``src`` (batch, time, d_model); see ``LayerStack.run_layers`` for the results.

        Args:
            src_mask: (time, time), True where a frame (row) may not see another (column).
            src_key_padding_mask: (batch, time), True where a frame is padding.
            pos_embs: relative positions (1, 2 time - 1, d_model), wanted by RelPosMHAXL.
            dynchunktrain_config: chunks for the convolutions; ``src_mask`` cuts the attention.
        """

        def run_layer(layer: nn.Module, x: Tensor) -> Tensor:
            x, _ = layer(
                x,
                src_mask=src_mask,
                src_key_padding_mask=src_key_padding_mask,
                pos_embs=pos_embs,
                dynchunktrain_config=dynchunktrain_config,
            )
            return x

        return self.run_layers(src, run_layer, intermediate_layers)

    def make_streaming_context(
        self, dynchunktrain_config: DynChunkTrainConfig | None
    ) -> ConformerEncoderStreamingContext:
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
        return super().make_streaming_context(dynchunktrain_config)
