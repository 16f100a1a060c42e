"""The ``config.json`` of a bundle: what must be in it, and that nothing else is."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import UserError, in_words
from inference.classes import CLASSES

FORMAT = 1

FEATURES: Mapping[str, tuple[str, ...]] = {
    "compute_features": ("Fbank",),
    "normalize": ("InputNormalization", "UtteranceMeanNormalization"),
}
"""Parts before the network, and the classes that each may be of."""

NETWORK: Mapping[str, tuple[str, ...]] = {
    "CNN": ("ConvolutionFrontEnd",),
    "Transformer": ("TransformerASR",),
    "seq_lin": ("Linear",),
    "ctc_lin": ("Linear",),
}
"""Parts with weights, in the order that they have in a recipe's ``model``."""

PARTS: Mapping[str, tuple[str, ...]] = {
    "ctc": ("CNN", "Transformer", "ctc_lin"),
    "s2s": tuple(NETWORK),
}
"""Those of each kind of model."""

LANGUAGE_MODELS = ("TransformerLM", "MambaLM")
JOINT_SEARCHES = ("CachedBeamSearcher",)
CTC_SETTINGS: Mapping[str, type] = {
    "beam_size": int,
    "beam_prune_logp": float,
    "token_prune_min_logp": float,
    "prune_history": bool,
    "alpha": float,
    "beta": float,
    "unk_score_offset": float,
    "score_boundary": bool,
    "hotword_token_min_logp": float,
}
"""Of a CTC model's search, with their types."""

_MAX_BYTES = 1 << 20
_MAX_DEPTH = 16
_MAX_NUMBER = 1e12


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a small JSON file.

    Raises:
        UserError: it is something else.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"it has more than {_MAX_BYTES} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read: {in_words(error)}. Copy the bundle again."
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no mapping. Copy the bundle again.")
    return content


def check_config(config: Mapping[str, Any]) -> None:
    """Checks all that a model is built from.

    Raises:
        UserError: a newer format, another kind of model, a part that is missing or left over, a
            class where it does not belong, or a value that no model has.
    """
    version = config.get("format")
    if type(version) is not int or not 1 <= version <= FORMAT:
        raise UserError(
            f"it has format {version!r}; this version reads formats up to {FORMAT}. Update "
            "Mamba-ASR."
        )
    kind = config.get("kind")
    if not isinstance(kind, str) or kind not in PARTS:
        raise UserError(f"kind is {kind!r}; known are {', '.join(PARTS)}.")
    lms = {"lm": LANGUAGE_MODELS} if "lm" in config else {}
    wanted: dict[str, Mapping[str, tuple[str, ...]]] = {
        "features": FEATURES,
        "network": {part: NETWORK[part] for part in PARTS[kind]},
    }
    for section, slots in wanted.items():
        given = _mapping(config, section)
        if given.keys() != slots.keys():
            raise UserError(
                f"{section} has {', '.join(map(str, given)) or 'nothing'}; a {kind} model has "
                f"{', '.join(slots)}."
            )
    described = {**config["features"], **config["network"], **{key: config[key] for key in lms}}
    for slot, classes in {**wanted["features"], **wanted["network"], **lms}.items():
        _check_class(described[slot], classes, slot)
        _check_node(described[slot], slot, ())

    tokens = _mapping(config, "tokens")
    outputs, blank = tokens.get("outputs"), tokens.get("blank")
    if type(outputs) is not int or type(blank) is not int or not 0 <= blank < outputs:
        raise UserError(f"tokens has {outputs!r} outputs and the blank {blank!r}.")
    for key in {"training", "run", "results"} & config.keys():
        told = _mapping(config, key)
        if key == "results" and not all(isinstance(score, Mapping) for score in told.values()):
            raise UserError("results holds something else than the scores of each split.")
    if "streaming" in config:
        streaming = _mapping(config, "streaming")
        num_left, lookahead = streaming.get("left_context_chunks", 0), streaming.get("lookahead", 0)
        if type(num_left) is not int or num_left < 0:
            raise UserError(f"streaming has {num_left!r} left_context_chunks.")
        if type(lookahead) not in (int, float) or not 0 <= lookahead < 1:
            raise UserError(f"streaming has the lookahead {lookahead!r}.")
    search = _mapping(config, "search")
    if kind == "s2s":
        _check_class(search, JOINT_SEARCHES, "search")
        _check_node(search, "search", (*config["network"], *lms))
        return
    for name, value in search.items():
        wanted = CTC_SETTINGS.get(name)
        if type(value) is not wanted and not (wanted is float and type(value) is int):
            raise UserError(f"search has {name} {value!r}, which the search of a CTC model lacks.")
        _check_node(value, f"search.{name}", ())


def _mapping(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    if not isinstance(config.get(key), Mapping):
        raise UserError(f"{key} is {config.get(key)!r}; it must be a mapping.")
    return config[key]


def _check_class(node: Any, classes: tuple[str, ...], where: str) -> None:
    name = node.get("class") if isinstance(node, Mapping) else None
    if name not in classes:
        raise UserError(f"{where} is of class {name!r}; it must be {' or '.join(classes)}.")


def _check_node(node: Any, where: str, refs: tuple[str, ...], depth: int = 0) -> None:
    """Checks a node of ``inference.classes.build`` and all below it."""
    if depth > _MAX_DEPTH:
        raise UserError(f"{where} is nested too deeply.")
    if isinstance(node, Mapping):
        for key in {"class", "maker"} & node.keys():
            if not isinstance(node[key], str) or node[key] not in CLASSES:
                raise UserError(
                    f"{where} is of class {node[key]!r}, which is none of those that a bundle may "
                    f"hold: {', '.join(sorted(CLASSES))}."
                )
        if "ref" in node and node["ref"] not in refs:
            raise UserError(f"{where} refers to {node['ref']!r}, which there is not.")
        for key, value in node.items():
            _check_node(value, f"{where}.{key}", refs, depth + 1)
    elif isinstance(node, list):
        for i, item in enumerate(node):
            _check_node(item, f"{where}.{i}", refs, depth + 1)
    elif isinstance(node, (int, float)) and not (math.isfinite(node) and abs(node) < _MAX_NUMBER):
        raise UserError(f"{where} is {node!r}, which no model has.")
