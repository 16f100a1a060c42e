"""ConMamba encoder: the Conformer's layer with a Mamba mixer in the place of self-attention."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from speechbrain.nnet.activations import Swish
from speechbrain.nnet.normalization import LayerNorm
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig
from torch import Tensor, nn

from modules.convolution import ConvolutionModule, feed_forward_module
from modules.layer_stack import Surroundings, pieces_of
from modules.mamba import Mamba, MambaState
from modules.mamba_config import mixer_options
from modules.mamba_stack import MambaLayerStack
from modules.packed_linear import with_packed_linears
from modules.plain_layers import is_plain, runs_its_class
from modules.stream_state import StreamState, stream_state
from ops import conmamba_layer


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
        causal_convolution: none does in the convolution.
        mamba_config: options of the mixer, see ``mixer_options``.

    Paper: arXiv:2407.09732.
    """

    # In a twin made for streams alone: the layer in one call.
    fused: conmamba_layer.Layer | None = None

    def __init__(
        self,
        d_model: int,
        d_ffn: int,
        kernel_size: int = 31,
        activation: type[nn.Module] = nn.GELU,
        bias: bool = True,
        dropout: float = 0.0,
        causal: bool = False,
        causal_convolution: bool = False,
        mamba_config: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.mamba = Mamba(d_model=d_model, **mixer_options(mamba_config, causal))
        self.convolution_module = ConvolutionModule(
            d_model, kernel_size, bias, activation, dropout, causal=causal or causal_convolution
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
        state = None
        if surroundings.ahead:
            state = self.initial_state(surroundings.num_items(x_BTD), surroundings.chunks)
        return self.forward_streaming(x_BTD, surroundings, state)[0]

    def forward_streaming(
        self, x_BTD: Tensor, surroundings: Surroundings, state: ConmambaLayerState | None
    ) -> tuple[Tensor, ConmambaLayerState | None]:
        """Applies the layer to the next chunk of streams, or to whole utterances (None)."""
        padding_BT, lengths_B = surroundings.padding_BT, surroundings.lengths_B
        ahead = surroundings.ahead
        if state is not None and lengths_B is None and self.fused:
            states = state.mamba.conv, state.mamba.ssm, state.conv_BPD
            if self.fused.takes(x_BTD, *states):
                x_BTD, conv, ssm, conv_BPD = self.fused(x_BTD, *states, ahead)
                return x_BTD, ConmambaLayerState(MambaState(conv, ssm), conv_BPD)
        mask_BT1 = None if padding_BT is None else padding_BT.unsqueeze(-1)
        x_BTD = torch.add(x_BTD, self.ffn_module1(x_BTD), alpha=0.5)
        mixed_BTD, mamba = self.mamba.forward_in_chunks(
            self.norm1(x_BTD),
            lengths_B,
            None if state is None else state.mamba,
            chunk_size=surroundings.chunk_size,
            ahead=ahead,
        )
        x_BTD = x_BTD + mixed_BTD
        if state is None:
            x_BTD = x_BTD + self.convolution_module(x_BTD, mask_BT1, surroundings.chunks)
        else:
            convolved_BTD, conv_BPD = self.convolution_module.forward_streaming(
                x_BTD, state.conv_BPD, mask_BT1, lengths_B, ahead
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

    def fuse(self) -> None:
        """Makes ready for streams in one call, where all parts are as torch makes them.

        The mixer's ``backend`` may rule that out.

        It holds for as long as the parameters do not change.
        """
        module = self.convolution_module
        activation, after = module.after_conv[1], module.after_conv[2]
        ffns: list[tuple[Any, ...]] = [
            (ffn[0], *cast(Any, ffn[1]).ffn) for ffn in (self.ffn_module1, self.ffn_module2)
        ]
        linears = [self.mamba.in_proj, self.mamba.out_proj, module.bottleneck[0], after]
        linears += [linear for _, inner, _, _, outer in ffns for linear in (inner, outer)]
        norms = [self.norm1.norm, self.norm2.norm, module.layer_norm, module.after_conv[0]]
        norms += [ffn[0] for ffn in ffns]
        activations = [activation, *(ffn[2] for ffn in ffns)]
        directions = self.mamba.directions()
        is_gelu = all(type(a) is nn.GELU and a.approximate == "none" for a in activations)
        is_swish = all(
            type(a) is nn.SiLU or (type(a) is Swish and a.beta == 1) for a in activations
        )
        if not (
            (is_gelu or is_swish)
            and directions is not None
            and self.mamba.backend in ("auto", "cpu")
            and all(map(is_plain, [*linears, module.conv]))
            and module.conv.dilation == (1,)
            and all(type(norm) is nn.LayerNorm and norm.bias is not None for norm in norms)
            and all(map(runs_its_class, self.modules()))
            and conmamba_layer.fits(*self.parameters())
        ):
            return

        def norm_of(norm: nn.LayerNorm) -> conmamba_layer.Norm:
            return conmamba_layer.Norm(norm.weight, norm.bias, norm.eps)

        def linear_of(linear: nn.Linear | nn.Conv1d) -> conmamba_layer.Linear:
            return conmamba_layer.Linear(linear.weight.flatten(1), linear.bias)

        ffn1, ffn2 = (
            conmamba_layer.FeedForward(norm_of(norm), linear_of(inner), linear_of(outer))
            for norm, inner, _, _, outer in ffns
        )
        self.fused = conmamba_layer.Layer(
            ffn1=ffn1,
            ffn2=ffn2,
            mixer_norm=norm_of(self.norm1.norm),
            in_proj=linear_of(self.mamba.in_proj),
            out_proj=linear_of(self.mamba.out_proj),
            directions=directions,
            conv_norm=norm_of(module.layer_norm),
            pointwise=linear_of(module.bottleneck[0]),
            depthwise=linear_of(module.conv),
            left=module.padding,
            after_norm=norm_of(module.after_conv[0]),
            after=linear_of(after),
            last_norm=norm_of(self.norm2.norm),
            swish=is_swish,
        )


def for_streams(encoder: nn.Module) -> nn.Module:
    """A twin of ``encoder`` with the same parameters, faster for chunks on a CPU.

    It is for as long as the parameters do not change.
    """
    twin = with_packed_linears(encoder)
    for layer in twin.modules():
        if isinstance(layer, ConmambaEncoderLayer):
            layer.fuse()
    return twin


class ConmambaEncoder(MambaLayerStack):
    """A stack of ConMamba layers and a closing LayerNorm."""

    layer_class = ConmambaEncoderLayer
