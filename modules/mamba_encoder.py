"""Mamba encoder: mixers and feed-forward layers, no convolution module and no positions."""

from collections.abc import Collection, Mapping
from typing import Any

from speechbrain.nnet.normalization import LayerNorm
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig
from torch import Tensor, nn

from modules.convolution import FeedForward
from modules.layer_stack import LayerStack
from modules.lengths import valid_lengths
from modules.mamba import Mamba, MambaState
from modules.mamba_config import mixer_options
from modules.mamba_streaming import MambaStreamingContext, make_streaming_context


class MambaEncoderLayer(nn.Module):
    """x + Mamba(LN(x)), then x + FFN(LN(x)).

    Args:
        d_model: width of input and output.
        d_ffn: inner width of the feed-forward layer.
        activation: of the feed-forward layer.
        dropout: on both branches and inside the feed-forward layer.
        causal: no frame sees a later one.
        mamba_config: options of the mixer, see ``mixer_options``.
    """

    def __init__(
        self,
        d_model: int,
        d_ffn: int,
        activation: type[nn.Module] = nn.GELU,
        dropout: float = 0.0,
        causal: bool = False,
        mamba_config: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.mamba = Mamba(d_model=d_model, **mixer_options(mamba_config, causal))
        self.pos_ffn = FeedForward(
            d_ffn=d_ffn, input_size=d_model, dropout=dropout, activation=activation
        )
        self.norm1 = LayerNorm(d_model, eps=1e-6)
        self.norm2 = LayerNorm(d_model, eps=1e-6)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)

    def forward(
        self, x_BTD: Tensor, lengths_B: Tensor | None = None, chunk_size: int | None = None
    ) -> Tensor:
        """Applies the layer; ``chunk_size`` cuts the backward direction of the mixer."""
        chunk_size = chunk_size if self.mamba.bidirectional else None
        mixed_BTD = self.mamba(self.norm1(x_BTD), lengths_B, chunk_size=chunk_size)
        return self._fed_forward(x_BTD + self.dropout1(mixed_BTD))

    def forward_streaming(
        self, x_BTD: Tensor, state: MambaState | None
    ) -> tuple[Tensor, MambaState]:
        """Applies the layer to the next chunk of a stream; a causal layer takes any cutting."""
        chunk_size = x_BTD.shape[1] if self.mamba.bidirectional else None
        mixed_BTD, state = self.mamba(
            self.norm1(x_BTD), state=state, chunk_size=chunk_size, return_state=True
        )
        return self._fed_forward(x_BTD + self.dropout1(mixed_BTD)), state

    def _fed_forward(self, x_BTD: Tensor) -> Tensor:
        return x_BTD + self.dropout2(self.pos_ffn(self.norm2(x_BTD)))


class MambaEncoder(LayerStack, nn.Module):
    """A stack of ``MambaEncoderLayer`` and a closing LayerNorm; arguments as in ConmambaEncoder."""

    def __init__(
        self,
        num_layers: int,
        d_model: int,
        d_ffn: int,
        activation: type[nn.Module] = nn.GELU,
        dropout: float = 0.0,
        causal: bool = False,
        mamba_config: Mapping[str, Any] | None = None,
        layerdrop_prob: float = 0.0,
        gradient_checkpointing: bool = False,
    ):
        super().__init__()
        self.causal = causal
        self.layerdrop_prob = layerdrop_prob
        self.gradient_checkpointing = gradient_checkpointing
        self.layers = nn.ModuleList(
            MambaEncoderLayer(d_model, d_ffn, activation, dropout, causal, mamba_config)
            for _ in range(num_layers)
        )
        self.norm = LayerNorm(d_model, eps=1e-6)

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

        ``src_mask`` and ``pos_embs`` belong to attention and have no effect.
        """
        lengths_B = valid_lengths(src_key_padding_mask)
        chunk_size = None if dynchunktrain_config is None else dynchunktrain_config.chunk_size

        def run_layer(layer: nn.Module, x: Tensor) -> Tensor:
            return layer(x, lengths_B, chunk_size)

        return self.run_layers(src, run_layer, intermediate_layers)

    def make_streaming_context(
        self, dynchunktrain_config: DynChunkTrainConfig | None
    ) -> MambaStreamingContext:
        """Starts a stream; chunks are needed exactly where the encoder is not causal.

        Raises:
            ValueError: chunks are missing, or given to a causal encoder.
        """
        return make_streaming_context(
            dynchunktrain_config, self.causal, [None for _ in self.layers]
        )

    def forward_streaming(
        self, src: Tensor, context: MambaStreamingContext, pos_embs: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Encodes the next chunk and moves ``context`` on."""
        x_BTD = src
        for i, layer in enumerate(self.layers):
            x_BTD, context.layers[i] = layer.forward_streaming(x_BTD, context.layers[i])
        return self.norm(x_BTD), None
