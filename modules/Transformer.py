"""Encoders and decoders by name, and SpeechBrain's Transformer encoder with our calling convention.

A new encoder is one file with one class plus one entry in ``ENCODERS``. An encoder class takes
keyword arguments out of ``NetworkOptions``, offers ``forward(src, src_mask, src_key_padding_mask,
pos_embs, dynchunktrain_config, intermediate_layers)``, and, where it can stream,
``make_streaming_context`` and ``forward_streaming``.
"""

import inspect
from collections.abc import Collection, Mapping
from typing import Any

from speechbrain.lobes.models.transformer.Transformer import (
    TransformerEncoder as SpeechBrainTransformerEncoder,
)
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig
from torch import Tensor, nn

from modules.Branchformer import BranchformerEncoder
from modules.Conformer import ConformerEncoder
from modules.Conmamba import ConmambaEncoder
from modules.layer_stack import LayerStack
from modules.mamba_decoder import MambaDecoder
from modules.mamba_encoder import MambaEncoder
from modules.transformer_decoder import TransformerDecoder


class TransformerEncoder(LayerStack, SpeechBrainTransformerEncoder):
    """SpeechBrain's Transformer encoder; arguments and parameters as there."""

    def __init__(
        self,
        num_layers: int,
        nhead: int,
        d_ffn: int,
        d_model: int,
        dropout: float = 0.0,
        activation: type[nn.Module] = nn.ReLU,
        normalize_before: bool = False,
        causal: bool = False,
        attention_type: str = "regularMHA",
        layerdrop_prob: float = 0.0,
        gradient_checkpointing: bool = False,
    ):
        super().__init__(
            num_layers=num_layers,
            nhead=nhead,
            d_ffn=d_ffn,
            d_model=d_model,
            dropout=dropout,
            activation=activation,
            normalize_before=normalize_before,
            causal=causal,
            attention_type=attention_type,
            layerdrop_prob=layerdrop_prob,
        )
        self.gradient_checkpointing = gradient_checkpointing

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

        Args:
            src_mask: (time, time), True where a frame (row) may not see another (column); chunks
                are in it, ``dynchunktrain_config`` adds nothing.
            src_key_padding_mask: (batch, time), True where a frame is padding.
            pos_embs: relative positions (1, 2 time - 1, d_model), wanted by RelPosMHAXL.
        """

        def run_layer(layer: nn.Module, x: Tensor) -> Tensor:
            x, _ = layer(
                x,
                src_mask=src_mask,
                src_key_padding_mask=src_key_padding_mask,
                pos_embs=pos_embs,
            )
            return x

        return self.run_layers(src, run_layer, intermediate_layers)


ENCODERS: Mapping[str, type[nn.Module]] = {
    "branchformer": BranchformerEncoder,
    "transformer": TransformerEncoder,
    "conformer": ConformerEncoder,
    "conmamba": ConmambaEncoder,
    "mamba": MambaEncoder,
}

DECODERS: Mapping[str, type[nn.Module]] = {
    "transformer": TransformerDecoder,
    "mamba": MambaDecoder,
}


def lookup(table: Mapping[str, type[nn.Module]], name: str, option: str) -> type[nn.Module]:
    """The class called ``name``.

    Raises:
        ValueError: there is none; the message lists the known names.
    """
    if name not in table:
        raise ValueError(f"{option} is {name!r}; known are {', '.join(sorted(table))}.")
    return table[name]


def build(cls: type[nn.Module], options: Mapping[str, Any]) -> nn.Module:
    """An instance of ``cls`` from those ``options`` that its constructor takes."""
    accepted = inspect.signature(cls).parameters
    return cls(**{name: value for name, value in options.items() if name in accepted})
