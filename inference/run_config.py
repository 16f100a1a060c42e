"""What a training run's hyperparams.yaml says of its model, read without executing any of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ruamel.yaml
from ruamel.yaml.comments import TaggedScalar

from common.errors import UserError
from inference.classes import NAMES

FORMAT = 1

FEATURES = ("compute_features", "normalize")
NETWORK = ("CNN", "Transformer", "ctc_lin", "seq_lin")
LEFT_OUT_SCORERS = {
    "decoding.pretrained_lm.PretrainedLM": "lm",
    "decoding.pretrained_lm.TokenNgram": "kenlm",
}
"""Scorers that read files beside the model, and the keys of their weights."""

_CTC_SETTINGS = ("beam_prune_logp", "token_prune_min_logp", "prune_history", "alpha", "beta")
_JOINT_SETTINGS = (
    "bos_index",
    "eos_index",
    "min_decode_ratio",
    "max_decode_ratio",
    "temperature",
    "using_eos_threshold",
    "eos_threshold",
    "length_normalization",
)


def read_run_config(hyperparams: str | Path) -> dict[str, Any]:
    """The ``config.json`` of a run's model.

    Args:
        hyperparams: the resolved YAML file that a run leaves in its output folder.

    Raises:
        UserError: the file is missing, is no recipe of ours, or names a class that a bundle cannot
            hold.
    """
    path = Path(hyperparams)
    try:
        document = ruamel.yaml.YAML().load(path.read_text(encoding="utf-8"))
        missing = [key for key in (*FEATURES, *NETWORK[:3]) if key not in document]
    except (OSError, UnicodeDecodeError, ruamel.yaml.YAMLError, TypeError) as error:
        raise UserError(f"{path} cannot be read as a run's hyperparams.yaml: {error}") from None
    if missing:
        raise UserError(
            f"{path} has no {', '.join(missing)}: it is not the hyperparams.yaml of a recogniser."
        )
    named = {id(document[key]): key for key in (*FEATURES, *NETWORK) if key in document}

    def described(keys: tuple[str, ...]) -> dict[str, Any]:
        return {
            key: _translate(document[key], {}, f"{path}: {key}") for key in keys if key in document
        }

    is_s2s = "seq_lin" in document
    if is_s2s and "test_search" in document:
        search = _translate(document["test_search"], named, f"{path}: test_search")
    elif is_s2s:
        search = _joint_search_of_older_run(document)
    else:
        settings = document.get("test_beam_search", document)
        search = {key: _plain(settings[key], key) for key in _CTC_SETTINGS if key in settings}
        search["beam_size"] = document["test_beam_size"]
    return {
        "format": FORMAT,
        "kind": "s2s" if is_s2s else "ctc",
        "features": described(FEATURES),
        "network": described(NETWORK),
        "tokens": {
            "type": document["token_type"],
            "outputs": document["output_neurons"],
            "blank": document["blank_index"],
        },
        "search": search,
    }


def _joint_search_of_older_run(document: Mapping[str, Any]) -> dict[str, Any]:
    """Of runs whose YAML held the settings and whose script built the search."""
    return {
        "class": "CachedBeamSearcher",
        "modules": [{"ref": "Transformer"}, {"ref": "seq_lin"}],
        "beam_size": document["test_beam_size"],
        **{key: _plain(document[key], key) for key in _JOINT_SETTINGS},
        "scorer": {
            "class": "ScorerBuilder",
            "partial_scorers": [
                {
                    "class": "CTCScorer",
                    "ctc_fc": {"ref": "ctc_lin"},
                    "blank_index": document["blank_index"],
                    "eos_index": document["eos_index"],
                }
            ],
            "weights": {"ctc": float(document["ctc_weight_decode"])},
            "scorer_beam_scale": document["scorer_beam_scale"],
        },
    }


def _translate(node: Any, named: Mapping[int, str], where: str) -> Any:
    """A YAML node as a node of ``inference.classes.build``."""
    if id(node) in named:
        return {"ref": named[id(node)]}
    tag = getattr(getattr(node, "tag", None), "value", None) or ""
    if isinstance(node, TaggedScalar) and not tag.startswith("!name:"):
        raise UserError(f"{where} is {tag} {node.value}: a bundle holds values and known classes.")
    if isinstance(node, list):
        items = [
            _translate(item, named, where)
            for item in node
            if _path_of(item) not in LEFT_OUT_SCORERS
        ]
        return items
    arguments: dict[str, Any] = {}
    if isinstance(node, Mapping):
        left_out = _left_out_weights(node)
        for key, value in node.items():
            if key == "weights" and left_out:
                value = {name: weight for name, weight in value.items() if name not in left_out}
            arguments[str(key)] = _translate(value, named, f"{where}.{key}")
    if tag.startswith("!new:"):
        return {"class": _name_of(node, where), **arguments}
    if tag.startswith("!name:"):
        return {"maker": _name_of(node, where), **arguments}
    if isinstance(node, Mapping):
        return arguments
    return _plain(node, where)


def _left_out_weights(scorer: Mapping) -> set[str]:
    given = [*(scorer.get("full_scorers") or []), *(scorer.get("partial_scorers") or [])]
    return {LEFT_OUT_SCORERS[_path_of(s)] for s in given if _path_of(s) in LEFT_OUT_SCORERS}


def _path_of(node: Any) -> str:
    tag = getattr(getattr(node, "tag", None), "value", None) or ""
    return tag.partition(":")[2]


def _name_of(node: Any, where: str) -> str:
    path = _path_of(node)
    if path not in NAMES:
        raise UserError(
            f"{where} is {path}, which a bundle cannot hold: it names classes out of a fixed table "
            f"({', '.join(sorted(NAMES.values()))})."
        )
    return NAMES[path]


def _plain(value: Any, where: str) -> Any:
    """A scalar as JSON has it, without what ruamel remembers of its spelling."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    raise UserError(f"{where} is {value!r}, which a bundle cannot hold.")
