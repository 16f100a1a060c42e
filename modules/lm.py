"""Token language models: a Transformer and a Mamba, each with a step that costs one token.

Both map tokens (batch, U) to logits (batch, U, V) of the next token, and decode with
``initial_state(batch_size)`` and ``step(tokens, state)``. A state has ``select(rows)``, which
follows a beam search, and is never modified.

N counts hypotheses, U tokens, V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from speechbrain.lobes.models.transformer.TransformerLM import (
    TransformerLM as SpeechBrainTransformerLM,
)
from torch import Tensor, nn

from modules.kv_cache import KeyValueCache
from modules.mamba import Mamba, MambaState
from modules.mamba_config import mixer_options
from modules.packed_linear import TiedEmbedding
from modules.transformer_steps import feed_forward_step, self_attention_step

PAD_INDEX = 0


@dataclass(frozen=True)
class TransformerLMState:
    """Keys and values of every layer, and which positions hold padding."""

    layers: tuple[KeyValueCache, ...]
    is_pad_NU: Tensor

    def select(self, rows_N: Tensor) -> TransformerLMState:
        """The state of some hypotheses, in the order of ``rows_N``."""
        layers = tuple(cache.select(rows_N) for cache in self.layers)
        return TransformerLMState(layers, self.is_pad_NU[rows_N])


class TransformerLM(SpeechBrainTransformerLM):
    """SpeechBrain's Transformer language model with a key/value cache; same arguments and weights.

    As in its parent, a token 0 is padding that later tokens do not attend to.

    Raises:
        ValueError: the model has decoder layers or another attention than ``regularMHA``, for which
            there is no cached step.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        check_cacheable(self)

    def initial_state(self, batch_size: int) -> TransformerLMState:
        """The state before the first token of ``batch_size`` hypotheses."""
        return transformer_lm_state(self, batch_size)

    def step(
        self, tokens_N: Tensor, state: TransformerLMState
    ) -> tuple[Tensor, TransformerLMState]:
        """Logits (N, V) of the token after ``tokens_N``, and the state that includes them."""
        return transformer_lm_step(self, tokens_N, state)


def check_cacheable(lm: SpeechBrainTransformerLM) -> None:
    """Raises ValueError for a model that cannot be run token by token."""
    if lm.num_decoder_layers > 0 or lm.num_encoder_layers == 0:
        raise ValueError(
            f"The language model has {lm.num_encoder_layers} encoder and {lm.num_decoder_layers} "
            "decoder layers; cached decoding needs encoder layers alone (num_decoder_layers: 0)."
        )
    if lm.attention_type != "regularMHA":
        raise ValueError(
            f"The language model has attention_type {lm.attention_type!r}; cached decoding needs "
            "'regularMHA'."
        )


def transformer_lm_state(lm: SpeechBrainTransformerLM, batch_size: int) -> TransformerLMState:
    """:meth:`TransformerLM.initial_state` for any model of SpeechBrain's class."""
    device = lm.positional_encoding.pe.device
    no_positions = torch.empty(batch_size, 0, dtype=torch.bool, device=device)
    return TransformerLMState(tuple(KeyValueCache() for _ in lm.encoder.layers), no_positions)


def transformer_lm_step(
    lm: SpeechBrainTransformerLM, tokens_N: Tensor, state: TransformerLMState
) -> tuple[Tensor, TransformerLMState]:
    """:meth:`TransformerLM.step` for any model of SpeechBrain's class.

    Raises:
        ValueError: the hypotheses are longer than the model's table of positions.
    """
    position = state.is_pad_NU.shape[1]
    table_1UD = lm.positional_encoding.pe
    if position >= table_1UD.shape[1]:
        raise ValueError(
            f"Token {position + 1} lies beyond max_length {table_1UD.shape[1]} of the language "
            "model. Decode shorter audio or lower max_decode_ratio."
        )
    x_ND = lm.custom_src_module(tokens_N)
    if lm.embedding_proj is not None:
        x_ND = lm.embedding_proj(x_ND)
    x_ND = x_ND + table_1UD[0, position]

    is_pad_NU = torch.cat([state.is_pad_NU, tokens_N.eq(PAD_INDEX).unsqueeze(1)], dim=1)
    caches = []
    for layer, cache in zip(lm.encoder.layers, state.layers, strict=True):
        x_ND, cache = self_attention_step(layer, layer.self_att, x_ND, cache, is_pad_NU)
        x_ND = feed_forward_step(layer, x_ND, layer.norm2)
        caches.append(cache)
    logits_NV = lm.output_proj(lm.encoder.norm(x_ND))
    return logits_NV, TransformerLMState(tuple(caches), is_pad_NU)


@dataclass(frozen=True)
class MambaLMState:
    """The state of every layer's mixer: constant in the number of tokens."""

    layers: tuple[MambaState, ...]

    def select(self, rows_N: Tensor) -> MambaLMState:
        """The state of some hypotheses, in the order of ``rows_N``."""
        return MambaLMState(tuple(layer.select(rows_N) for layer in self.layers))


class MambaLMLayer(nn.Module):
    """x + dropout(Mamba(LayerNorm(x))): a layer of :class:`MambaLM`."""

    def __init__(
        self, d_model: int, dropout: float, mamba_config: Mapping[str, Any] | None
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.mamba = Mamba(d_model, **mixer_options(mamba_config, causal=True))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BUD: Tensor) -> Tensor:
        """All tokens at once."""
        return x_BUD + self.dropout(self.mamba(self.norm(x_BUD)))

    def step(self, x_ND: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        """One token of each hypothesis."""
        y_ND, state = self.mamba.step(self.norm(x_ND), state)
        return x_ND + y_ND, state


class MambaLM(nn.Module):
    """Mamba language model: embedding, x + Mamba(LN(x)) layers, LayerNorm, embedding transposed.

    Padding needs no mask, since the model is causal: what follows an item's last token has no
    influence on it.

    Args:
        vocab: number of tokens; 0 is padding.
        d_model: width.
        num_layers: Mamba layers.
        dropout: after the embedding and each mixer.
        mamba_config: options of the mixers, see ``mixer_options``.

    Raises:
        ValueError: ``mamba_config`` asks for a bidirectional mixer.

    Paper: arXiv:2312.00752, section 4.2.
    """

    def __init__(
        self,
        vocab: int,
        d_model: int = 512,
        num_layers: int = 8,
        dropout: float = 0.1,
        mamba_config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.embedding = TiedEmbedding(vocab, d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.dropout = nn.Dropout(dropout)
        self.layers: Any = nn.ModuleList(
            MambaLMLayer(d_model, dropout, mamba_config) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(d_model)

    def forward(self, src: Tensor) -> Tensor:
        """Logits (batch, U, V) of each next token from tokens (batch, U)."""
        x_BUD = self.dropout(self.embedding(src))
        for layer in self.layers:
            x_BUD = layer(x_BUD)
        return self._logits(x_BUD)

    def initial_state(self, batch_size: int) -> MambaLMState:
        """The state before the first token of ``batch_size`` hypotheses."""
        return MambaLMState(tuple(layer.mamba.initial_state(batch_size) for layer in self.layers))

    def step(self, tokens_N: Tensor, state: MambaLMState) -> tuple[Tensor, MambaLMState]:
        """Logits (N, V) of the token after ``tokens_N``, and the state that includes them."""
        x_ND = self.embedding(tokens_N)
        states = []
        for layer, layer_state in zip(self.layers, state.layers, strict=True):
            x_ND, layer_state = layer.step(x_ND, layer_state)
            states.append(layer_state)
        return self._logits(x_ND), MambaLMState(tuple(states))

    def _logits(self, x: Tensor) -> Tensor:
        return self.embedding.logits(self.norm(x))
