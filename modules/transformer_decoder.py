"""SpeechBrain's Transformer decoder with keys and values kept from token to token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from speechbrain.lobes.models.transformer.Transformer import (
    TransformerDecoder as SpeechBrainTransformerDecoder,
)
from speechbrain.lobes.models.transformer.Transformer import TransformerDecoderLayer
from torch import Tensor, nn

from modules.kv_cache import KeyValueCache
from modules.lengths import padding_mask
from modules.transformer_steps import (
    feed_forward_step,
    is_plain_attention,
    project,
    residual,
    self_attention_step,
)


@dataclass(frozen=True)
class CrossCache:
    """Keys and values of the memory: once per utterance, shared by its hypotheses.

    Args:
        keys: per layer, (utterances, heads, time, head width).
        values: per layer, the same shape.
        visible_G11T: which frames are valid; ``None`` means all.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    visible_G11T: Tensor | None

    def select(self, index_G: Tensor) -> CrossCache:
        """The caches of the utterances ``index_G``, in that order."""
        visible = None if self.visible_G11T is None else self.visible_G11T[index_G]
        return CrossCache(
            tuple(keys[index_G] for keys in self.keys),
            tuple(values[index_G] for values in self.values),
            visible,
        )


@dataclass(frozen=True)
class TransformerDecoderState:
    """State of every hypothesis; ``num_beams`` of them in a row belong to one utterance.

    Args:
        caches: per layer, keys and values of the targets so far.
        cross: keys and values of the memory, one row per utterance.
        num_beams: hypotheses of each utterance.
        query_GHBK: the last layer's queries of the memory for the last token, if there is one.
        weights_GBT: in their place, its attention to the memory, where that was called as a module.
    """

    caches: tuple[KeyValueCache, ...]
    cross: CrossCache
    num_beams: int
    query_GHBK: Tensor | None = None
    weights_GBT: Tensor | None = None

    @property
    def attention_BT(self) -> Tensor:
        """The last token's attention over the memory: last layer, mean of the heads.

        Only of a state fresh from a step: reordering drops it.
        """
        if self.weights_GBT is not None:
            return self.weights_GBT.flatten(0, 1)
        assert self.query_GHBK is not None, "not fresh from a step"
        scores_GHBT = self.query_GHBK @ self.cross.keys[-1].transpose(-2, -1)
        scores_GHBT = scores_GHBT / self.query_GHBK.shape[-1] ** 0.5
        if self.cross.visible_G11T is not None:
            scores_GHBT = scores_GHBT.masked_fill(~self.cross.visible_G11T, float("-inf"))
        return scores_GHBT.softmax(-1).mean(1).flatten(0, 1)

    def select(self, index: Tensor) -> TransformerDecoderState:
        """The state of the hypotheses ``index``, in that order."""
        cross, num_beams = self._selected_cross(index)
        return TransformerDecoderState(
            tuple(cache.select(index) for cache in self.caches), cross, num_beams
        )

    def repeat(self, n: int) -> TransformerDecoderState:
        """Every hypothesis ``n`` times in a row: the beams of an utterance side by side."""
        num_rows = self.num_beams * len(self.cross.keys[0])
        index = torch.arange(num_rows, device=self.cross.keys[0].device).repeat_interleave(n)
        caches = tuple(cache.select(index) for cache in self.caches)
        return TransformerDecoderState(caches, self.cross, self.num_beams * n)

    def _selected_cross(self, index: Tensor) -> tuple[CrossCache, int]:
        utterance_N = torch.div(index, self.num_beams, rounding_mode="floor")
        if len(index) % self.num_beams == 0:
            groups_GK = utterance_N.view(-1, self.num_beams)
            utterance_G = groups_GK[:, 0]
            if (groups_GK == utterance_G[:, None]).all():
                everyone_G = torch.arange(len(self.cross.keys[0]), device=index.device)
                if torch.equal(utterance_G, everyone_G):
                    return self.cross, self.num_beams
                return self.cross.select(utterance_G), self.num_beams
        # Hypotheses of an utterance no longer stand together in equal numbers: a copy for each.
        return self.cross.select(utterance_N), 1


class TransformerDecoder(SpeechBrainTransformerDecoder):
    """SpeechBrain's Transformer decoder that can also decode token by token from a state."""

    def __init__(
        self,
        num_layers: int,
        nhead: int,
        d_ffn: int,
        d_model: int,
        dropout: float = 0.0,
        activation: type[nn.Module] = nn.ReLU,
        normalize_before: bool = False,
    ):
        super().__init__(
            num_layers=num_layers,
            nhead=nhead,
            d_ffn=d_ffn,
            d_model=d_model,
            dropout=dropout,
            activation=activation,
            normalize_before=normalize_before,
            causal=True,
            attention_type="regularMHA",
        )

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        memory_lengths_B: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Decodes ``tgt`` (batch, tokens, d_model).

        Args:
            memory: encoder output (batch, time, d_model).
            memory_lengths_B: its valid frames; ``None`` means all.
            tgt_key_padding_mask: (batch, tokens), True where a target is padding.

        Returns:
            the output, and the last layer's attention over memory (batch, tokens, time).
        """
        memory_mask = None
        if memory_lengths_B is not None:
            memory_mask = padding_mask(memory_lengths_B, memory.shape[1])
        num_tokens = tgt.shape[1]
        future = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=tgt.device).triu(1)
        output, _, cross_attention = super().forward(
            tgt,
            memory,
            tgt_mask=future,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_mask,
        )
        return output, cross_attention[-1]

    def init_state(
        self, memory_BTD: Tensor, lengths_B: Tensor | None = None
    ) -> TransformerDecoderState:
        """The state before the first token: keys and values of the memory, no targets."""
        visible = None
        if lengths_B is not None:
            visible = ~padding_mask(lengths_B, memory_BTD.shape[1])[:, None, None]
        pairs = [_memory_heads(layer.multihead_attn, memory_BTD) for layer in self.layers]
        keys, values = zip(*pairs, strict=True)
        empty = tuple(KeyValueCache() for _ in self.layers)
        return TransformerDecoderState(empty, CrossCache(keys, values, visible), num_beams=1)

    def step(
        self, x_BD: Tensor, state: TransformerDecoderState
    ) -> tuple[Tensor, TransformerDecoderState]:
        """Decodes one token per hypothesis, without dropout."""
        caches = []
        for depth, layer in enumerate(self.layers):
            x_BD, cache, attends = _layer_step(layer, x_BD, state, depth)
            caches.append(cache)
        state = TransformerDecoderState(tuple(caches), state.cross, state.num_beams, **attends)
        return self.norm(x_BD), state


def _layer_step(
    layer: TransformerDecoderLayer, x_BD: Tensor, state: TransformerDecoderState, depth: int
) -> tuple[Tensor, KeyValueCache, dict[str, Tensor]]:
    """SpeechBrain's layer for one target per hypothesis.

    Returns:
        the output, the cache with that target, and what ``attention_BT`` of a state needs.
    """
    attends: dict[str, Tensor] = {}

    def cross_attention(x_BD: Tensor) -> Tensor:
        # The hypotheses of an utterance are the queries of one attention over its memory.
        x_GBD = x_BD.unflatten(0, (-1, state.num_beams))
        attended_GBD, found = _attend_to_memory(layer.multihead_attn, x_GBD, state.cross, depth)
        attends.update(found)
        return attended_GBD.flatten(0, 1)

    x_BD, cache = self_attention_step(layer, layer.self_attn, x_BD, state.caches[depth])
    x_BD = residual(layer, x_BD, layer.norm2, cross_attention)
    return feed_forward_step(layer, x_BD, layer.norm3), cache, attends


def _memory_heads(attention: nn.Module, memory_BTD: Tensor) -> list[Tensor]:
    """Keys and values of the memory, or itself in the place of both, as a single head."""
    if not is_plain_attention(attention):
        return [memory_BTD[:, None], memory_BTD[:, None]]
    return project(attention, memory_BTD, slice(1, 3))


def _attend_to_memory(
    attention: nn.Module, x_GBD: Tensor, cross: CrossCache, depth: int
) -> tuple[Tensor, dict[str, Tensor]]:
    keys_GHTK, values_GHTK = cross.keys[depth], cross.values[depth]
    visible_G11T = cross.visible_G11T
    if not is_plain_attention(attention):
        padding_GT = None if visible_G11T is None else ~visible_G11T[:, 0, 0]
        attended_GBD, weights_GBT = attention(
            x_GBD, keys_GHTK[:, 0], values_GHTK[:, 0], key_padding_mask=padding_GT
        )
        return attended_GBD, {"weights_GBT": weights_GBT}
    (query_GHBK,) = project(attention, x_GBD, slice(0, 1))
    attended_GHBK = F.scaled_dot_product_attention(
        query_GHBK, keys_GHTK, values_GHTK, attn_mask=visible_G11T
    )
    attended_GBD = attention.att.out_proj(attended_GHBK.transpose(1, 2).flatten(2))
    return attended_GBD, {"query_GHBK": query_GHBK}
