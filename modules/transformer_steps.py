"""The parts of SpeechBrain's Transformer layers for one token of each hypothesis, without dropout.

An attention that is not plain (an adapter around it, hooks) is called with its past inputs; they
then stand, as a single head, in the place of keys and values. Letters as in ``modules.kv_cache``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import torch.nn.functional as F
from speechbrain.nnet.attention import MultiheadAttention
from torch import Tensor, nn

from modules.kv_cache import KeyValueCache
from modules.plain_layers import is_plain, runs_its_class


def residual(
    layer: Any, x_ND: Tensor, norm: nn.Module, branch: Callable[[Tensor], Tensor]
) -> Tensor:
    """``x`` and what ``branch`` makes of it, in a layer that normalises before or after."""
    if layer.normalize_before:
        return x_ND + branch(norm(x_ND))
    return norm(x_ND + branch(x_ND))


def feed_forward_step(layer: Any, x_ND: Tensor, norm: nn.Module) -> Tensor:
    """The feed-forward part of ``layer`` with its residual."""
    return residual(layer, x_ND, norm, lambda x: layer.pos_ffn(x[:, None])[:, 0])


def self_attention_step(
    layer: Any,
    attention: nn.Module,
    x_ND: Tensor,
    cache: KeyValueCache,
    is_pad_NU: Tensor | None = None,
) -> tuple[Tensor, KeyValueCache]:
    """The self-attention part of ``layer`` with its residual.

    Args:
        cache: of the tokens before.
        is_pad_NU: tokens, this one included, that are not attended to.

    Returns:
        the output (N, D), and the cache with this token.
    """

    def attend(x_ND: Tensor) -> Tensor:
        nonlocal cache
        if not is_plain_attention(attention):
            cache = cache.append(x_ND[:, None], x_ND[:, None])
            past_NUD = cache.keys_NHUD[:, 0]
            return attention(x_ND[:, None], past_NUD, past_NUD, key_padding_mask=is_pad_NU)[0][:, 0]
        query_NH1K, key_NH1K, value_NH1K = project(attention, x_ND[:, None], slice(0, 3))
        cache = cache.append(key_NH1K[:, :, 0], value_NH1K[:, :, 0])
        attended_NH1K = F.scaled_dot_product_attention(
            query_NH1K,
            cache.keys_NHUD,
            cache.values_NHUD,
            attn_mask=None if is_pad_NU is None else ~is_pad_NU[:, None, None],
        )
        return attention.att.out_proj(attended_NH1K.flatten(1))

    return residual(layer, x_ND, layer.norm1, attend), cache


def is_plain_attention(attention: nn.Module) -> TypeGuard[MultiheadAttention]:
    """Whether the weights of ``attention`` say all that it computes; see ``is_plain``."""
    return (
        type(attention) is MultiheadAttention
        and type(attention.att) is nn.MultiheadAttention
        and runs_its_class(attention)
        and runs_its_class(attention.att)
        and is_plain(attention.att.out_proj)
    )


def project(attention: MultiheadAttention, x_BTD: Tensor, parts: slice) -> list[Tensor]:
    """Of queries (0), keys (1) and values (2) those in ``parts``: (batch, heads, time, width)."""
    att = attention.att
    rows = slice(parts.start * att.embed_dim, parts.stop * att.embed_dim)
    projected = F.linear(x_BTD, att.in_proj_weight[rows], att.in_proj_bias[rows])
    heads = (part.unflatten(-1, (att.num_heads, -1)) for part in projected.split(att.embed_dim, -1))
    return [heads_BTHK.transpose(1, 2) for heads_BTHK in heads]
