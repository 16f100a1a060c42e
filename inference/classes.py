"""The classes that a bundle may name. Nothing else is ever built from one; none opens a file."""

import functools
import importlib
from collections.abc import Mapping
from typing import Any

CLASSES: Mapping[str, str] = {
    "Fbank": "modules.features.Fbank",
    "InputNormalization": "speechbrain.processing.features.InputNormalization",
    "UtteranceMeanNormalization": "modules.normalization.UtteranceMeanNormalization",
    "ConvolutionFrontEnd": "modules.frontend.ConvolutionFrontEnd",
    "TransformerASR": "modules.TransformerASR.TransformerASR",
    "Linear": "speechbrain.nnet.linear.Linear",
    "LayerNorm": "speechbrain.nnet.normalization.LayerNorm",
    "GELU": "torch.nn.GELU",
    "ReLU": "torch.nn.ReLU",
    "LeakyReLU": "torch.nn.LeakyReLU",
    "SiLU": "torch.nn.SiLU",
    "Identity": "torch.nn.Identity",
    "Swish": "speechbrain.nnet.activations.Swish",
    "TransformerLM": "modules.lm.TransformerLM",
    "MambaLM": "modules.lm.MambaLM",
    "CachedBeamSearcher": "decoding.beam_search.CachedBeamSearcher",
    "ScorerBuilder": "decoding.scorers.ScorerBuilder",
    "CTCScorer": "decoding.ctc_prefix_scorer.CTCScorer",
    "LMScorer": "decoding.lm_scorers.LMScorer",
    "CoverageScorer": "speechbrain.decoders.scorer.CoverageScorer",
    "LengthScorer": "speechbrain.decoders.scorer.LengthScorer",
}
"""Where each class is, under the name that a bundle's ``config.json`` has for it."""

NAMES: Mapping[str, str] = {
    **{path: name for name, path in CLASSES.items()},
    # Ours is a subclass of it with the same arguments and weights.
    "speechbrain.lobes.models.transformer.TransformerLM.TransformerLM": "TransformerLM",
}
"""The same, the other way round."""


class UnknownClassError(ValueError):
    """A class that is not in the table."""


def build(node: Any, built: Mapping[str, Any]) -> Any:
    """The object that a node of ``config.json`` describes.

    Args:
        node: ``{"class": name, argument: node, ...}`` for an object, ``{"maker": name, ...}`` for a
            class with some arguments set, ``{"ref": name}`` for one of ``built``; lists, mappings
            and plain values of such nodes.
        built: objects that exist already.

    Raises:
        UnknownClassError: a name that is not in the table.
    """
    if isinstance(node, list):
        return [build(item, built) for item in node]
    if not isinstance(node, Mapping):
        return node
    if "ref" in node:
        return built[node["ref"]]
    arguments = {
        key: build(value, built) for key, value in node.items() if key not in ("class", "maker")
    }
    if "class" in node:
        return _class_called(node["class"])(**arguments)
    if "maker" in node:
        made = _class_called(node["maker"])
        return functools.partial(made, **arguments) if arguments else made
    return arguments


def _class_called(name: str) -> type:
    if name not in CLASSES:
        raise UnknownClassError(
            f"{name!r} is none of the classes that a bundle may hold: {', '.join(sorted(CLASSES))}."
        )
    module, _, attribute = CLASSES[name].rpartition(".")
    return getattr(importlib.import_module(module), attribute)
