"""ConMamba encoder: the Conformer's layer with a Mamba mixer in the place of self-attention."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from speechbrain.nnet.normalization import LayerNorm
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig
from torch import Tensor, nn

from modules.convolution import ConvolutionModule, feed_forward_module
from modules.layer_stack import LayerStack
from modules.lengths import valid_lengths
from modules.mamba import Mamba, MambaState
from modules.mamba_config import mixer_options
from modules.mamba_streaming import MambaStreamingContext, make_streaming_context


@dataclass(frozen=True)
class ConmambaLayerState:
    """What a layer keeps between chunks of a stream: constant in size.

    Args:
        mamba: state of the mixer.
        conv_BPD: last inputs of the depthwise convolution.
    """

    mamba: MambaState | None = None
    conv_BPD: Tensor | None = None


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

    def forward(
        self,
        x_BTD: Tensor,
        src_key_padding_mask: Tensor | None = None,
        lengths_B: Tensor | None = None,
        dynchunktrain_config: DynChunkTrainConfig | None = None,
    ) -> Tensor:
        """Applies the layer.

        Args:
            src_key_padding_mask: (batch, time), True where a frame is padding.
            lengths_B: the same as frame counts.
            dynchunktrain_config: chunks behind which a frame sees nothing. The state of the mixer
                carries the whole past: ``left_context_size`` does not limit it.
        """
        mask_BT1 = None if src_key_padding_mask is None else src_key_padding_mask.unsqueeze(-1)
        chunk_size = None
        if dynchunktrain_config is not None and self.mamba.bidirectional:
            chunk_size = dynchunktrain_config.chunk_size
        x_BTD = x_BTD + 0.5 * self.ffn_module1(x_BTD)
        x_BTD = x_BTD + self.mamba(self.norm1(x_BTD), lengths_B, chunk_size=chunk_size)
        x_BTD = x_BTD + self.convolution_module(x_BTD, mask_BT1, dynchunktrain_config)
        return self.norm2(x_BTD + 0.5 * self.ffn_module2(x_BTD))

    def forward_streaming(
        self, x_BTD: Tensor, state: ConmambaLayerState
    ) -> tuple[Tensor, ConmambaLayerState]:
        """Applies the layer to the next chunk of a stream; a causal layer takes any cutting."""
        chunk_size = x_BTD.shape[1] if self.mamba.bidirectional else None
        x_BTD = x_BTD + 0.5 * self.ffn_module1(x_BTD)
        mixed_BTD, mamba_state = self.mamba(
            self.norm1(x_BTD), state=state.mamba, chunk_size=chunk_size, return_state=True
        )
        x_BTD = x_BTD + mixed_BTD
        convolved_BTD, conv_BPD = self.convolution_module.forward_streaming(x_BTD, state.conv_BPD)
        x_BTD = x_BTD + convolved_BTD
        x_BTD = self.norm2(x_BTD + 0.5 * self.ffn_module2(x_BTD))
        return x_BTD, ConmambaLayerState(mamba_state, conv_BPD)


class ConmambaEncoder(LayerStack, nn.Module):
    """A stack of ConMamba layers and a closing LayerNorm.

    Args:
        num_layers: layers.
        layerdrop_prob: probability with which training leaves a layer out.
        gradient_checkpointing: recompute the layers in the backward instead of storing them.
        Others as in ``ConmambaEncoderLayer``.
    """

    def __init__(
        self,
        num_layers: int,
        d_model: int,
        d_ffn: int,
        kernel_size: int = 31,
        activation: type[nn.Module] = nn.GELU,
        bias: bool = True,
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
            ConmambaEncoderLayer(
                d_model=d_model,
                d_ffn=d_ffn,
                kernel_size=kernel_size,
                activation=activation,
                bias=bias,
                dropout=dropout,
                causal=causal,
                mamba_config=mamba_config,
            )
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

        def run_layer(layer: nn.Module, x: Tensor) -> Tensor:
            return layer(x, src_key_padding_mask, lengths_B, dynchunktrain_config)

        return self.run_layers(src, run_layer, intermediate_layers)

    def make_streaming_context(
        self, dynchunktrain_config: DynChunkTrainConfig | None
    ) -> MambaStreamingContext:
        """Starts a stream; chunks are needed exactly where the encoder is not causal.

        Raises:
            ValueError: chunks are missing, or given to a causal encoder.
        """
        return make_streaming_context(
            dynchunktrain_config, self.causal, [ConmambaLayerState() for _ in self.layers]
        )

    def forward_streaming(
        self, src: Tensor, context: MambaStreamingContext, pos_embs: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Encodes the next chunk and moves ``context`` on."""
        x_BTD = src
        for i, layer in enumerate(self.layers):
            x_BTD, context.layers[i] = layer.forward_streaming(x_BTD, context.layers[i])
        return self.norm(x_BTD), None
