"""Mamba encoder: mixers and feed-forward layers, no convolution module and no positions."""

from collections.abc import Mapping
from typing import Any

from speechbrain.nnet.normalization import LayerNorm
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig
from torch import Tensor, nn

from modules.convolution import FeedForward
from modules.layer_stack import Surroundings, pieces_of
from modules.mamba import Mamba, MambaState
from modules.mamba_config import mixer_options
from modules.mamba_stack import MambaLayerStack


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

    def initial_state(self, batch_size: int, chunks: DynChunkTrainConfig | None) -> MambaState:
        """State of streams before their first frame."""
        return self.mamba.initial_state(batch_size)

    def forward(self, x_BTD: Tensor, surroundings: Surroundings) -> Tensor:
        """Applies the layer; chunks cut the backward direction of the mixer."""
        state = None
        if surroundings.ahead:
            state = self.initial_state(surroundings.num_items(x_BTD), surroundings.chunks)
        return self.forward_streaming(x_BTD, surroundings, state)[0]

    def forward_streaming(
        self, x_BTD: Tensor, surroundings: Surroundings, state: MambaState | None
    ) -> tuple[Tensor, MambaState]:
        """Applies the layer to the next chunk of streams, or to whole utterances (None)."""
        mixed_BTD, state = self.mamba.forward_in_chunks(
            self.norm1(x_BTD),
            surroundings.lengths_B,
            state,
            chunk_size=surroundings.chunk_size,
            ahead=surroundings.ahead,
        )
        return self._fed_forward(x_BTD + self.dropout1(mixed_BTD)), state

    def forward_in_pieces(self, x_BTD: Tensor, piece_frames: int) -> Tensor:
        """Applies the layer to a whole recording in memory for a piece; changes ``x_BTD``."""
        x_BTD += self.mamba.forward_in_pieces(x_BTD, piece_frames, before=self.norm1)
        for piece_BTD in pieces_of(x_BTD, piece_frames):
            piece_BTD += self.pos_ffn(self.norm2(piece_BTD))
        return x_BTD

    def _fed_forward(self, x_BTD: Tensor) -> Tensor:
        return x_BTD + self.dropout2(self.pos_ffn(self.norm2(x_BTD)))


class MambaEncoder(MambaLayerStack):
    """A stack of ``MambaEncoderLayer`` and a closing LayerNorm."""

    layer_class = MambaEncoderLayer
