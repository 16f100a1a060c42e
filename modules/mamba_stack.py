"""The Mamba and ConMamba encoders in pieces: streams in chunks, and recordings of any length."""

from collections.abc import Callable

import torch
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig
from torch import Tensor

from modules.layer_stack import LayerStack, pieces_of


class MambaLayerStack(LayerStack):
    """An encoder whose layers keep all the past in a state of constant size."""

    takes_lookahead = True

    @torch.no_grad()
    def forward_in_pieces(
        self,
        x_BTD: Tensor,
        piece_frames: int,
        progress: Callable[[float], None] = lambda share: None,
    ) -> Tensor:
        """``forward`` over a whole recording, layer by layer, in evaluation.

        Beside two tensors of the size of ``x_BTD`` it needs memory for one piece.

        Args:
            x_BTD: frames, all of them valid; changed.
            piece_frames: frames of a piece.
            progress: is told each share of the work that is done.
        """
        for depth, layer in enumerate(self.layers, start=1):
            x_BTD = layer.forward_in_pieces(x_BTD, piece_frames)
            if depth in self.conditioned_layers:
                for piece_BTD in pieces_of(x_BTD, piece_frames):
                    piece_BTD.copy_(self._conditioned(piece_BTD, depth))
            progress(1 / len(self.layers))
        for piece_BTD in pieces_of(x_BTD, piece_frames):
            piece_BTD.copy_(self.norm(piece_BTD))
        return x_BTD

    def check_streaming(self, chunks: DynChunkTrainConfig | None) -> None:
        """Checks that there are chunks exactly where the encoder is not causal.

        Raises:
            ValueError: chunks are missing, or given to a causal encoder.
        """
        if self.causal and chunks is not None:
            raise ValueError(
                "A causal encoder streams in any cutting and takes no chunks; give None."
            )
        if not self.causal and chunks is None:
            raise ValueError(
                "An encoder that is not causal streams in chunks; give a DynChunkTrainConfig, or "
                "build the network with causal=True."
            )
