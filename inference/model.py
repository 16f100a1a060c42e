"""A recogniser in parts, from its description and its weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sentencepiece as spm
import torch
from torch import Tensor, nn

from common.errors import UserError
from inference.classes import build
from inference.config import FEATURES, NETWORK
from inference.weights import NORMALIZER
from modules.speech_encoder import SpeechEncoder

STATISTICS = ("count", "glob_mean", "glob_std")
"""Of a normaliser."""


@dataclass
class Model:
    """A recogniser in parts, in evaluation mode.

    Attributes:
        config: what ``config.json`` holds.
        encoder: waveforms to encoder output.
        ctc_lin: encoder output to logits of the CTC branch.
        seq_lin: decoder output to logits; None of a CTC model.
        lm: language model of the joint search, if it has one.
        tokenizer: of the text.
    """

    config: dict[str, Any]
    encoder: SpeechEncoder
    ctc_lin: nn.Module
    seq_lin: nn.Module | None
    lm: nn.Module | None
    tokenizer: spm.SentencePieceProcessor

    @property
    def kind(self) -> str:
        """ctc or s2s."""
        return self.config["kind"]

    @property
    def sample_rate(self) -> int:
        """Of the waveforms, in Hz."""
        return self.encoder.compute_features.compute_STFT.sample_rate

    @property
    def frame_s(self) -> float:
        """Seconds from one encoder frame to the next."""
        return self.encoder.stride_samples / self.sample_rate

    @property
    def min_samples(self) -> int:
        """Samples of a frame of the filterbank: what is shorter holds no text."""
        return self.encoder.compute_features.compute_STFT.win_length

    def parts(self) -> dict[str, nn.Module]:
        """What a search may be built from: the modules with weights, by their names."""
        found = {
            "CNN": self.encoder.CNN,
            "Transformer": self.encoder.Transformer,
            "seq_lin": self.seq_lin,
            "ctc_lin": self.ctc_lin,
            "lm": self.lm,
        }
        return {name: module for name, module in found.items() if module is not None}

    def to(self, device: torch.device) -> None:
        """Moves all parts."""
        for part in [self.encoder, *self.parts().values()]:
            part.to(device)


def make_model(
    config: Mapping[str, Any],
    tokenizer: spm.SentencePieceProcessor,
    tensors: Mapping[str, Tensor],
    lm_tensors: Mapping[str, Tensor] | None = None,
) -> Model:
    """The model that a configuration describes, on the CPU.

    Args:
        config: one that ``inference.config.check_config`` lets pass.
        tokenizer: of the text.
        tensors: weights by ``part.name`` and the normaliser's statistics, float32.
        lm_tensors: weights of the language model, if the configuration has one.

    Raises:
        UserError: the configuration describes none, or the weights belong to another.
    """
    check_weights(config, tensors, lm_tensors)
    try:
        described = {**config["features"], **config["network"]}
        parts = {name: build(node, {}) for name, node in described.items()}
        lm = build(config["lm"], {}) if "lm" in config else None
        for part in NETWORK.keys() & parts.keys():
            own = parts[part].state_dict()
            parts[part].load_state_dict({name: tensors[f"{part}.{name}"] for name in own})
        if lm is not None:
            lm.load_state_dict(lm_tensors)
        _load_statistics(parts["normalize"], tensors)
        encoder = SpeechEncoder(*(parts[name] for name in (*FEATURES, "CNN", "Transformer")))
        model = Model(dict(config), encoder, parts["ctc_lin"], parts.get("seq_lin"), lm, tokenizer)
        # What a search lacks should come to light before the first recording does.
        build_joint_search(model)
    except UserError:
        raise
    except Exception as error:
        # Whatever a constructor of the table makes of arguments that nobody foresaw.
        raise UserError(_no_model(error)) from None
    for part in [encoder, *model.parts().values()]:
        part.eval().requires_grad_(False)
    return model


def check_weights(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    lm_tensors: Mapping[str, Tensor] | None = None,
) -> int:
    """Checks a configuration and its weights against each other; arguments as in ``make_model``.

    It takes next to no memory, whatever sizes the configuration names.

    Returns:
        trainable parameters of the recogniser, its language model not counted.

    Raises:
        UserError: they do not fit; the message names a tensor.
    """
    try:
        with torch.device("meta"):
            parts = {name: build(node, {}) for name, node in config["network"].items()}
            lm = build(config["lm"], {}) if "lm" in config else None
    except Exception as error:
        raise UserError(_no_model(error)) from None
    outputs = config["tokens"]["outputs"]
    for name in ("ctc_lin", "seq_lin"):
        if name in parts and parts[name].w.out_features != outputs:
            raise UserError(f"{name} has another number of outputs than the tokens' {outputs}.")
    shapes = {
        f"{part}.{name}": tensor.shape
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }
    statistics = {NORMALIZER + name: None for name in STATISTICS}
    _check_shapes(tensors, {**shapes, **statistics})
    lm_shapes = {} if lm is None else {k: tensor.shape for k, tensor in lm.state_dict().items()}
    _check_shapes(lm_tensors or {}, lm_shapes)
    return sum(p.numel() for module in parts.values() for p in module.parameters())


def build_joint_search(model: Model, **settings: Any) -> Any:
    """The search of a joint model, its settings over those of the recipe; None of a CTC model.

    One serves one call at a time: SpeechBrain's keeps its batch in itself.
    """
    if model.kind != "s2s":
        return None
    return build({**model.config["search"], **settings}, model.parts())


def _no_model(error: Exception) -> str:
    return f"it describes no model of ours ({type(error).__name__}: {error})"


def _check_shapes(tensors: Mapping[str, Tensor], wanted: Mapping[str, torch.Size | None]) -> None:
    problems = [f"{name} is missing" for name in wanted if name not in tensors]
    problems += [f"{name} has no place in it" for name in tensors if name not in wanted]
    problems += [
        f"{name} is {tuple(tensors[name].shape)} and should be {tuple(shape)}"
        for name, shape in wanted.items()
        if shape is not None and name in tensors and tensors[name].shape != shape
    ]
    if problems:
        raise UserError(
            f"its weights belong to another model: {'; '.join(problems[:3])}"
            + (f"; and {len(problems) - 3} more." if len(problems) > 3 else ".")
        )


def _load_statistics(normalize: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    count, mean, std = (tensors[NORMALIZER + name] for name in STATISTICS)
    if normalize.norm_type == "global" and not mean.numel():
        raise UserError("the normaliser has no statistics.")
    normalize._load_statistics_dict({"count": int(count), "glob_mean": mean, "glob_std": std})
