"""Encoders and decoders by name, and SpeechBrain's Transformer encoder as one of them.

A new encoder is one file with a ``LayerStack`` and its kind of layer, plus one entry in
``ENCODERS``. What their constructors name is what the encoder takes of the arguments of
``TransformerASR``.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from speechbrain.lobes.models.transformer.Transformer import (
    TransformerEncoderLayer as SpeechBrainTransformerEncoderLayer,
)
from torch import Tensor, nn

from modules.Branchformer import BranchformerEncoder
from modules.Conformer import ConformerEncoder
from modules.Conmamba import ConmambaEncoder
from modules.layer_stack import LayerStack, Surroundings
from modules.mamba_decoder import MambaDecoder
from modules.mamba_encoder import MambaEncoder
from modules.transformer_decoder import TransformerDecoder


class TransformerEncoderLayer(SpeechBrainTransformerEncoderLayer):
    """SpeechBrain's Transformer layer; arguments and parameters as there."""

    def forward(self, src: Tensor, surroundings: Surroundings) -> Tensor:
        """Applies the layer to ``src`` (batch, time, d_model); chunks are in ``src_mask``."""
        out, _ = super().forward(
            src,
            src_mask=surroundings.src_mask,
            src_key_padding_mask=surroundings.padding_BT,
            pos_embs=surroundings.pos_embs,
        )
        return out


class TransformerEncoder(LayerStack):
    """SpeechBrain's Transformer encoder; parameters as there."""

    layer_class = TransformerEncoderLayer


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
    """An instance of ``cls`` from those ``options`` that it takes."""
    accepted = options_of(cls)
    return cls(**{name: value for name, value in options.items() if name in accepted})


def build_encoder(
    encoder: str, shared: Mapping[str, Any], particular: Mapping[str, Any]
) -> nn.Module:
    """The encoder called ``encoder``.

    Args:
        shared: options of which the encoder gets those that it takes.
        particular: options that some encoders take, None where the encoder's default is wanted;
            ``<encoder>_activation`` stands in the place of ``shared["activation"]`` for it.

    Raises:
        ValueError: it does not take one of ``particular`` that is not None.
    """
    given = {option: value for option, value in particular.items() if value is not None}
    for option in given:
        takers = [name for name in ENCODERS if _takes(name, option)]
        if encoder not in takers:
            raise ValueError(
                f"{option} is given to the encoder {encoder!r}, which does not take it; encoders "
                f"that do: {', '.join(sorted(takers))}. Leave it out, or change encoder_module."
            )
    options = {**shared, **given}
    activation = f"{encoder}_activation"
    if activation in particular:
        del options["activation"]
    if activation in given:
        options["activation"] = given[activation]
    return build(ENCODERS[encoder], options)


def _takes(encoder: str, option: str) -> bool:
    return option == f"{encoder}_activation" or option in options_of(ENCODERS[encoder])


def options_of(cls: type[nn.Module]) -> set[str]:
    """Names of the arguments of an encoder or decoder, those of its layers included."""
    constructors = [cls, cls.layer_class] if hasattr(cls, "layer_class") else [cls]
    return {name for each in constructors for name in inspect.signature(each).parameters}
