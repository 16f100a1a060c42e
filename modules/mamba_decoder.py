"""Mamba decoder: reads the encoder's memory as a prefix, then costs the same for every token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from speechbrain.nnet.normalization import LayerNorm
from torch import Tensor, nn

from modules.convolution import FeedForward
from modules.mamba import Mamba, MambaState
from modules.mamba_config import mixer_options


@dataclass(frozen=True)
class MambaDecoderState:
    """State of every hypothesis, independent in size of memory and prefix.

    Args:
        self_mambas: one state per layer, of the targets so far.
        cross_mambas: one state per layer, of the memory and then the targets so far.
    """

    self_mambas: tuple[MambaState, ...]
    cross_mambas: tuple[MambaState, ...]

    def select(self, index: Tensor) -> MambaDecoderState:
        """The state of the hypotheses ``index``, in that order."""
        return MambaDecoderState(
            tuple(state.select(index) for state in self.self_mambas),
            tuple(state.select(index) for state in self.cross_mambas),
        )

    def repeat(self, n: int) -> MambaDecoderState:
        """Every hypothesis ``n`` times in a row: the beams of an utterance side by side."""
        return MambaDecoderState(
            tuple(state.repeat(n) for state in self.self_mambas),
            tuple(state.repeat(n) for state in self.cross_mambas),
        )


class MemoryPrefix:
    """Memory of different lengths set directly before the targets, so that no mixer reads padding.

    Args:
        memory_BTD: encoder output.
        lengths_B: valid frames; ``None`` means all.
        num_tokens: length of the targets.
    """

    def __init__(self, memory_BTD: Tensor, lengths_B: Tensor | None, num_tokens: int):
        self.memory_BTD = memory_BTD
        self.num_tokens = num_tokens
        self.total_B = None
        if lengths_B is None:
            return
        frames, width = memory_BTD.shape[1:]
        self.total_B = lengths_B + num_tokens
        places_L = torch.arange(frames + num_tokens, device=memory_BTD.device)
        memory_end_B1 = lengths_B[:, None]
        # Place l of an item holds memory frame l, then target l - length, then anything.
        source_BL = torch.where(
            places_L < memory_end_B1, places_L, places_L - memory_end_B1 + frames
        ).clamp(max=frames + num_tokens - 1)
        self._source_BLD = source_BL.unsqueeze(-1).expand(-1, -1, width)
        tokens_U = torch.arange(num_tokens, device=memory_BTD.device)
        self._target_BUD = (memory_end_B1 + tokens_U).unsqueeze(-1).expand(-1, -1, width)

    def joined(self, targets_BUD: Tensor) -> Tensor:
        """Memory, then targets: (batch, memory + targets, d_model), valid up to ``total_B``."""
        joined_BLD = torch.cat([self.memory_BTD, targets_BUD], dim=1)
        return joined_BLD if self.total_B is None else joined_BLD.gather(1, self._source_BLD)

    def target_part(self, outputs_BLD: Tensor) -> Tensor:
        """What ``joined`` became at the places of the targets."""
        if self.total_B is None:
            return outputs_BLD[:, -self.num_tokens :]
        return outputs_BLD.gather(1, self._target_BUD)


class MambaDecoderLayer(nn.Module):
    """Pre-norm self Mamba, cross Mamba over memory then targets, feed-forward; each with residual.

    Args:
        d_model: width of input and output.
        d_ffn: inner width of the feed-forward layer.
        activation: of the feed-forward layer.
        dropout: on the branches and inside the feed-forward layer.
        mamba_config: options of the mixers, see ``mixer_options``; decoders run forward only.
    """

    def __init__(
        self,
        d_model: int,
        d_ffn: int,
        activation: type[nn.Module] = nn.ReLU,
        dropout: float = 0.0,
        mamba_config: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        options = mixer_options({**(mamba_config or {}), "bidirectional": False}, causal=True)
        self.self_mamba = Mamba(d_model=d_model, **options)
        self.cross_mamba = Mamba(d_model=d_model, **options)
        self.pos_ffn = FeedForward(
            d_ffn=d_ffn, input_size=d_model, dropout=dropout, activation=activation
        )
        self.norm1 = LayerNorm(d_model, eps=1e-6)
        self.norm2 = LayerNorm(d_model, eps=1e-6)
        self.norm3 = LayerNorm(d_model, eps=1e-6)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.dropout3 = nn.Dropout(dropout)

    def forward(self, x_BUD: Tensor, prefix: MemoryPrefix) -> Tensor:
        """Applies the layer to all targets at once."""
        x_BUD = x_BUD + self.dropout1(self.self_mamba(self.norm1(x_BUD)))
        crossed_BLD = self.cross_mamba(prefix.joined(self.norm2(x_BUD)), prefix.total_B)
        x_BUD = x_BUD + self.dropout2(prefix.target_part(crossed_BLD))
        return x_BUD + self.dropout3(self.pos_ffn(self.norm3(x_BUD)))

    def step(
        self, x_BD: Tensor, self_state: MambaState, cross_state: MambaState
    ) -> tuple[Tensor, MambaState, MambaState]:
        """Applies the layer to one target per hypothesis, without dropout."""
        mixed_BD, self_state = self.self_mamba.step(self.norm1(x_BD), self_state)
        x_BD = x_BD + mixed_BD
        crossed_BD, cross_state = self.cross_mamba.step(self.norm2(x_BD), cross_state)
        x_BD = x_BD + crossed_BD
        return x_BD + self.pos_ffn.step(self.norm3(x_BD)), self_state, cross_state


class MambaDecoder(nn.Module):
    """A stack of Mamba decoder layers and a closing LayerNorm.

    Args:
        num_layers: layers.
        d_model: width of input and output.
        **layer_options: of ``MambaDecoderLayer``, beside d_model.

    Paper: arXiv:2407.09732.
    """

    layer_class = MambaDecoderLayer

    def __init__(self, num_layers: int, d_model: int, **layer_options: Any):
        super().__init__()
        self.layers: Any = nn.ModuleList(
            self.layer_class(d_model=d_model, **layer_options) for _ in range(num_layers)
        )
        self.norm = LayerNorm(d_model, eps=1e-6)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        memory_lengths_B: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Decodes ``tgt`` (batch, tokens, d_model); there are no attention weights to return.

        Args:
            memory: encoder output (batch, time, d_model).
            memory_lengths_B: its valid frames; ``None`` means all.
            tgt_key_padding_mask: not needed: targets see earlier targets only.
        """
        prefix = MemoryPrefix(memory, memory_lengths_B, tgt.shape[1])
        for layer in self.layers:
            tgt = layer(tgt, prefix)
        return self.norm(tgt), None

    def init_state(self, memory_BTD: Tensor, lengths_B: Tensor | None = None) -> MambaDecoderState:
        """The state after the memory of each utterance, before its first token."""
        cross_states = tuple(
            layer.cross_mamba(memory_BTD, lengths_B, return_state=True)[1] for layer in self.layers
        )
        self_states = tuple(
            layer.self_mamba.initial_state(len(memory_BTD), memory_BTD.device, state.conv.dtype)
            for layer, state in zip(self.layers, cross_states, strict=True)
        )
        return MambaDecoderState(self_states, cross_states)

    def step(self, x_BD: Tensor, state: MambaDecoderState) -> tuple[Tensor, MambaDecoderState]:
        """Decodes one token per hypothesis."""
        self_states, cross_states = [], []
        for layer, self_state, cross_state in zip(
            self.layers, state.self_mambas, state.cross_mambas, strict=True
        ):
            x_BD, self_state, cross_state = layer.step(x_BD, self_state, cross_state)
            self_states.append(self_state)
            cross_states.append(cross_state)
        return self.norm(x_BD), MambaDecoderState(tuple(self_states), tuple(cross_states))
