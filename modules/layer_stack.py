"""What all encoders share: layers in a row, a closing LayerNorm, and the ways through them."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from speechbrain.nnet.normalization import LayerNorm
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modules.lengths import padding_mask, valid_lengths
from modules.overlapping_chunks import ChunkConfig, OverlappingChunks
from modules.self_conditioning import SelfConditioning
from modules.stream_state import StreamState


@dataclass(frozen=True)
class Surroundings:
    """What a layer is told of a batch beside its frames; each takes what it needs.

    Args:
        src_mask: (time, time), True where a frame (row) may not see another (column).
        padding_BT: True where a frame is padding.
        lengths_B: the same as frame counts.
        pos_embs: relative positions (1, 2 time - 1, d_model), wanted by RelPosMHAXL.
        chunks: for convolutions and mixers; ``src_mask`` cuts the attention.
        ahead: frames at the end of each row that the next chunk begins with; where there are any,
            each chunk is a row, and the rows of an item follow one another.
        chunks_per_item: how many these are.
    """

    src_mask: Tensor | None = None
    padding_BT: Tensor | None = None
    lengths_B: Tensor | None = None
    pos_embs: Tensor | None = None
    chunks: DynChunkTrainConfig | None = None
    ahead: int = 0
    chunks_per_item: int = 1

    def num_items(self, rows_RLD: Tensor) -> int:
        """Items that these rows belong to."""
        return len(rows_RLD) // self.chunks_per_item

    @property
    def chunk_size(self) -> int | None:
        """Frames of a chunk."""
        return None if self.chunks is None else self.chunks.chunk_size


def pieces_of(x_BTD: Tensor, piece_frames: int) -> tuple[Tensor, ...]:
    """Views of ``x_BTD``, cut in time."""
    return x_BTD.split(piece_frames, dim=1)


class LayerStack(nn.Module):
    """An encoder of one kind of layer.

    ``layer(x_BTD, surroundings)`` gives the next frames. The layers of an encoder that streams have
    ``initial_state(batch_size, chunks)`` and ``forward_streaming(x_BTD, surroundings, state)``,
    which gives the frames of a chunk and the next state; the encoder has ``check_streaming``.

    Args:
        num_layers: layers.
        d_model: width of input and output.
        causal: no frame sees a later one.
        layerdrop_prob: probability with which training leaves a layer out.
        gradient_checkpointing: keep each layer's input alone for the backward and recompute the
            rest. Same gradients, about one more forward of time.
        conditioned_layers: layers, counted from 1, whose output probabilities are told to those
            above them, see ``SelfConditioning``.
        num_tokens: how many outputs those have.
        **layer_options: of ``layer_class``, beside d_model and causal.
    """

    layer_class: type[nn.Module]
    takes_chunks = True
    takes_lookahead = False

    def __init__(
        self,
        num_layers: int,
        d_model: int,
        causal: bool = False,
        layerdrop_prob: float = 0.0,
        gradient_checkpointing: bool = False,
        conditioned_layers: Collection[int] = (),
        num_tokens: int = 0,
        **layer_options: Any,
    ):
        super().__init__()
        self.causal = causal
        self.layerdrop_prob = layerdrop_prob
        # Set by a trainer whose processes must leave out the same layers.
        self.layer_draw: random.Random | None = None
        self.gradient_checkpointing = gradient_checkpointing
        # Any: a list of torch's tells nothing of what its layers can do.
        self.layers: Any = nn.ModuleList(
            self.layer_class(d_model=d_model, causal=causal, **layer_options)
            for _ in range(num_layers)
        )
        self.norm = LayerNorm(d_model, eps=1e-6)
        self.conditioned_layers = frozenset(conditioned_layers)
        if self.conditioned_layers:
            self.conditioning = SelfConditioning(d_model, num_tokens)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        pos_embs: Tensor | None = None,
        dynchunktrain_config: DynChunkTrainConfig | None = None,
        intermediate_layers: Collection[int] = (),
    ) -> tuple[Tensor, list[Tensor]]:
        """Encodes ``src`` (batch, time, d_model).

        Args:
            src_mask: (time, time), True where a frame (row) may not see another (column).
            src_key_padding_mask: (batch, time), True where a frame is padding.
            pos_embs: relative positions (1, 2 time - 1, d_model), wanted by RelPosMHAXL.
            dynchunktrain_config: chunks behind which a frame sees nothing; ``src_mask`` has to cut
                the attention by itself.
            intermediate_layers: layers, counted from 1, whose outputs are wanted as well.

        Returns:
            the output, and the wanted inner outputs in the order of depth, each through the closing
            norm as the output is, and before conditioning.

        Raises:
            ValueError: a wanted layer does not exist, or there are chunks at which the layers would
                not stop.
        """
        if dynchunktrain_config is not None and not self.takes_chunks:
            raise ValueError(
                f"{type(self).__name__} cannot be cut into chunks; a ConformerEncoder can."
            )
        beyond = [i for i in intermediate_layers if not 1 <= i <= len(self.layers)]
        if beyond:
            raise ValueError(
                f"intermediate_layers holds {beyond}; this encoder has layers 1 to "
                f"{len(self.layers)}."
            )
        frames, ahead = src.shape[1], self.ahead_frames(dynchunktrain_config)
        lengths_B, overlapping = valid_lengths(src_key_padding_mask), None
        x_BTD, inner = src, []
        if dynchunktrain_config is not None and ahead:
            overlapping = OverlappingChunks(dynchunktrain_config.chunk_size - ahead, ahead)
            if lengths_B is None:
                lengths_B = torch.full(src.shape[:1], frames, device=src.device)
            x_BTD, lengths_B = overlapping.split(src), overlapping.lengths(lengths_B, frames)
            src_key_padding_mask = padding_mask(lengths_B, x_BTD.shape[1])
        surroundings = Surroundings(
            src_mask,
            src_key_padding_mask,
            lengths_B,
            pos_embs,
            dynchunktrain_config,
            ahead,
            1 if overlapping is None else overlapping.count(frames),
        )
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for depth, layer in enumerate(self.layers, start=1):
            if not self._dropped():
                if recompute:
                    x_BTD = checkpoint(layer, x_BTD, surroundings, use_reentrant=False)
                else:
                    x_BTD = layer(x_BTD, surroundings)
            if depth in intermediate_layers:
                inner.append(self.norm(x_BTD))
            x_BTD = self._conditioned(x_BTD, depth)
        out_BTD = self.norm(x_BTD)
        if overlapping is not None:
            out_BTD, *inner = (overlapping.join(x, frames) for x in (out_BTD, *inner))
        return out_BTD, inner

    def ahead_frames(self, chunks: DynChunkTrainConfig | None) -> int:
        """Frames at the end of such a chunk that the next one begins with."""
        if not isinstance(chunks, ChunkConfig) or not self.takes_lookahead:
            return 0
        # 0.29 of a hundred frames are 29, not 28.999.
        return min(int(chunks.chunk_size * chunks.lookahead + 1e-9), chunks.chunk_size - 1)

    def forward_streaming(
        self, x_BTD: Tensor, surroundings: Surroundings, layers: Sequence[StreamState]
    ) -> tuple[Tensor, tuple[StreamState, ...]]:
        """Encodes the next frames of streams; ``layers`` are states, from ``initial_states``."""
        states = []
        for depth, (layer, state) in enumerate(zip(self.layers, layers, strict=True), start=1):
            x_BTD, next_state = layer.forward_streaming(x_BTD, surroundings, state)
            states.append(next_state)
            x_BTD = self._conditioned(x_BTD, depth)
        return self.norm(x_BTD), tuple(states)

    def initial_states(
        self, batch_size: int, chunks: DynChunkTrainConfig | None
    ) -> tuple[StreamState, ...]:
        """A state for each layer, of streams before their first frame."""
        return tuple(layer.initial_state(batch_size, chunks) for layer in self.layers)

    def _conditioned(self, x_BTD: Tensor, depth: int) -> Tensor:
        """What layer ``depth`` gave, with what it takes for said."""
        if depth not in self.conditioned_layers:
            return x_BTD
        return x_BTD + self.conditioning(self.norm(x_BTD))

    def _dropped(self) -> bool:
        if not self.training or self.layerdrop_prob == 0.0:
            return False
        draw = torch.rand(()).item() if self.layer_draw is None else self.layer_draw.random()
        return draw < self.layerdrop_prob
