"""A recogniser in parts, from its description and its weights."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sentencepiece as spm
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from common.errors import UserError
from inference.audio import MAX_SAMPLE_RATE, MIN_SAMPLE_RATE
from inference.classes import build
from inference.config import FEATURES
from inference.weights import NORMALIZER
from modules.lengths import relative_lengths
from modules.speech_encoder import SpeechEncoder
from modules.weights import digest_of

LEFT_CONTEXT_CHUNKS = 8
"""Of a model that does not say how many it was trained with."""

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
    def left_context_chunks(self) -> int:
        """Chunks before its own that a frame sees where the encoder attends, as in training."""
        return self.config.get("streaming", {}).get("left_context_chunks", LEFT_CONTEXT_CHUNKS)

    @property
    def lookahead(self) -> float:
        """Share of a chunk that the next one begins with in streams."""
        return self.config.get("streaming", {}).get("lookahead", 0.0)

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

    def digest(self) -> str:
        """SHA-256 of all that log probabilities and their search follow from."""
        kept = ("kind", "features", "network", "tokens", "search", "streaming")
        described = {key: self.config.get(key) for key in kept}
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
        digest.update(self.tokenizer.serialized_model_proto())
        tensors = {
            f"{name}.{key}": tensor
            for name, part in self.parts().items()
            for key, tensor in part.state_dict().items()
        }
        for name in STATISTICS:
            tensors[NORMALIZER + name] = torch.as_tensor(getattr(self.encoder.normalize, name, 0))
        digest.update(digest_of(tensors).encode())
        return digest.hexdigest()

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
    network, lm = _networks(config, tensors, lm_tensors)
    try:
        with _Construction(tensors, lm_tensors):
            features = {name: build(node, {}) for name, node in config["features"].items()}
        parts = {**features, **network}
        for part, module in network.items():
            own = module.state_dict()
            module.load_state_dict({name: tensors[f"{part}.{name}"] for name in own})
        if lm is not None:
            lm.load_state_dict(lm_tensors)
        _load_statistics(parts["normalize"], tensors)
        encoder = SpeechEncoder(*(parts[name] for name in (*FEATURES, "CNN", "Transformer")))
        model = Model(dict(config), encoder, parts["ctc_lin"], parts.get("seq_lin"), lm, tokenizer)
        for part in [encoder, *model.parts().values()]:
            part.eval().requires_grad_(False)
        _try_out(model)
    except UserError:
        raise
    except Exception as error:
        # Whatever a constructor of the table makes of arguments that nobody foresaw.
        raise UserError(_no_model(error)) from None
    return model


def check_weights(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    lm_tensors: Mapping[str, Tensor] | None = None,
) -> int:
    """Checks a configuration and its weights against each other; arguments as in ``make_model``.

    Returns:
        trainable parameters of the recogniser, its language model not counted.

    Raises:
        UserError: they do not fit; the message names a tensor.
    """
    network, _ = _networks(config, tensors, lm_tensors)
    return sum(p.numel() for module in network.values() for p in module.parameters())


def _networks(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    lm_tensors: Mapping[str, Tensor] | None,
) -> tuple[dict[str, nn.Module], nn.Module | None]:
    """The parts with weights and the language model, whose weights fit but are still to be loaded.

    They take no more memory than the weights, whatever sizes the configuration names.

    Raises:
        UserError: see ``check_weights``.
    """
    try:
        # The first weights of a mixer's dynamics are computed from random numbers.
        draws = torch.random.fork_rng(devices=[])
        with draws, _Construction(tensors, lm_tensors) as construction:
            construction.check_sizes(
                {key: config.get(key) for key in ("features", "network", "lm")}
            )
            parts = {name: build(node, {}) for name, node in config["network"].items()}
            lm = build(config["lm"], {}) if "lm" in config else None
    except UserError:
        raise
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
    return parts, lm


class _Construction(TorchFunctionMode):
    """Around the construction of networks whose weights are there already.

    None are drawn, and a network that these weights cannot be of is refused before it takes the
    memory that its configuration asks for.

    Args:
        tensors, lm_tensors: the weights.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], lm_tensors: Mapping[str, Tensor] | None
    ) -> None:
        super().__init__()
        weights = [*tensors.values(), *(lm_tensors or {}).values()]
        self._largest_size = max([_ANY_SIZE, *(size for w in weights for size in w.shape)])
        self._bytes_left = _ANY_BYTES + 4 * sum(4 * weight.numel() for weight in weights)
        self._tensors_left = _ANY_TENSORS + 8 * len(weights)

    def check_sizes(self, node: Any) -> None:
        """Refuses a number that no dimension of the weights explains."""
        if isinstance(node, Mapping):
            node = list(node.values())
        if isinstance(node, list):
            for item in node:
                self.check_sizes(item)
        elif isinstance(node, int) and node > self._largest_size:
            raise UserError(f"its weights belong to another model: none has a size of {node}.")

    def __torch_function__(
        self,
        func: Callable,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _DRAWING:
            return args[0] if args else (kwargs or {})["tensor"]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            num_bytes = result.numel() * result.element_size()
            if func in _ALLOCATING:
                self._bytes_left -= num_bytes
                self._tensors_left -= 1
            if num_bytes > max(self._bytes_left, 0) or self._tensors_left < 0:
                raise UserError("its weights belong to another model: it describes a larger one.")
        return result


_ANY_SIZE = 1 << 20
_ANY_BYTES = 1 << 26
_ANY_TENSORS = 1000
_ALLOCATING = frozenset(
    {torch.arange, torch.empty, torch.eye, torch.full, torch.linspace, torch.ones, torch.rand}
    | {torch.randn, torch.tensor, torch.zeros, Tensor.repeat}
)
_DRAWING = frozenset(
    {Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.uniform_, nn.init.trunc_normal_}
    | {nn.init.kaiming_normal_, nn.init.kaiming_uniform_, nn.init.orthogonal_}
    | {nn.init.xavier_normal_, nn.init.xavier_uniform_}
)


def build_joint_search(model: Model, **settings: Any) -> Any:
    """The search of a joint model, its settings over those of the recipe; None of a CTC model.

    One serves one call at a time: SpeechBrain's keeps its batch in itself.
    """
    if model.kind != "s2s":
        return None
    return build({**model.config["search"], **settings}, model.parts())


@torch.inference_mode()
def _try_out(model: Model) -> None:
    """Recognises a frame of silence: what does not fit together shows before the first recording.

    Raises:
        Exception: whatever the parts raise.
    """
    if not MIN_SAMPLE_RATE <= model.sample_rate <= MAX_SAMPLE_RATE:
        raise UserError(f"its sampling rate is {model.sample_rate} Hz, which is impossible.")
    num_samples_B = torch.tensor([model.min_samples])
    encoder_out_BTD, num_frames_B = model.encoder(torch.zeros(1, model.min_samples), num_samples_B)
    model.ctc_lin(encoder_out_BTD)
    search = build_joint_search(model)
    if search is not None:
        search(encoder_out_BTD, relative_lengths(num_frames_B, encoder_out_BTD.shape[1]))


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
