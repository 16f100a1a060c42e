"""What a training run's files say of its model, read without executing any of them."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ruamel.yaml
from ruamel.yaml.comments import TaggedScalar

from common.errors import UserError, in_words
from common.files import why_unreadable
from inference.classes import NAMES
from inference.config import CTC_SETTINGS, FEATURES, FORMAT, NETWORK, PARTS

CTC_SEARCHERS = (
    "speechbrain.decoders.ctc.CTCBeamSearcher",
    "decoding.ctc_beam_search.CTCBeamSearch",
)
"""Searches of one algorithm, with the same settings."""

_BEYOND_NATS = 1e9
"""More than any log probability."""

_LM = "decoding.pretrained_lm.PretrainedLM"
_TOKEN_NGRAM = "decoding.pretrained_lm.TokenNgram"
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
_OF_NOTE = (
    "number_of_epochs",
    "avg_checkpoints",
    "lr_adam",
    "weight_decay",
    "n_warmup_steps",
    "max_batch_length_train",
    "batch_size",
    "dynamic_batching",
    "grad_accumulation_factor",
    "ctc_weight",
    "label_smoothing",
    "transformer_dropout",
)


@dataclass
class RunConfig:
    """A run's model.

    Attributes:
        config: what ``config.json`` will hold.
        lm_source: folder or hub repository of the language model in ``config``.
        lm: its description, once it was met.
    """

    config: dict[str, Any] = field(default_factory=dict)
    lm_source: str | None = None
    lm: dict[str, Any] | None = None


def read_run_config(run: str | Path) -> RunConfig:
    """The configuration of a run's model, from its output folder.

    Raises:
        UserError: ``hyperparams.yaml`` is missing, is no recipe of ours, or names a class that a
            bundle cannot hold.
    """
    path = Path(run) / "hyperparams.yaml"
    if reason := why_unreadable(path):
        raise UserError(f"{path} cannot be read as a run's hyperparams.yaml: {reason}.")
    try:
        document = ruamel.yaml.YAML().load(path.read_text(encoding="utf-8"))
        missing = [key for key in (*FEATURES, *PARTS["ctc"]) if key not in document]
    except (OSError, UnicodeDecodeError, ruamel.yaml.YAMLError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read as a run's hyperparams.yaml: {in_words(error)}"
        ) from None
    if missing:
        raise UserError(
            f"{path} has no {', '.join(missing)}: it is not the hyperparams.yaml of a recogniser."
        )
    try:
        return _Reader(document, str(path)).read(Path(run))
    except KeyError as error:
        raise UserError(f"{path} has no {error.args[0]}, which a recogniser needs.") from None


class _Reader:
    """Translates a document of ruamel's, whose tags are data, into a ``RunConfig``."""

    def __init__(self, document: Mapping[str, Any], path: str):
        self.document, self.path = document, path
        self.named = {id(document[key]): key for key in (*FEATURES, *NETWORK) if key in document}
        self.found = RunConfig()
        self.left_out: list[str] = []

    def read(self, run: Path) -> RunConfig:
        document = self.document
        kind = "s2s" if "seq_lin" in document else "ctc"
        search = self._joint_search() if kind == "s2s" else self._ctc_search()
        self.found.config = {
            "format": FORMAT,
            "kind": kind,
            "features": {key: self._part(key) for key in FEATURES},
            "network": {key: self._part(key) for key in PARTS[kind]},
            "tokens": {
                "type": _plain(document["token_type"], "token_type"),
                "outputs": _plain(document["output_neurons"], "output_neurons"),
                "blank": _plain(document["blank_index"], "blank_index"),
            },
            "search": search,
            **self._streaming(),
            **({} if self.found.lm is None else {"lm": self.found.lm}),
            "left_out": self.left_out,
            "training": self._training(),
            **_results(run),
        }
        return self.found

    def _part(self, key: str) -> Any:
        return self._translate(self.document[key], {}, f"{self.path}: {key}")

    def _streaming(self) -> dict[str, Any]:
        """What a model that is trained for chunks expects of them."""
        keys = {"left_context_chunks": "left_context_chunks", "stream_lookahead": "lookahead"}
        found = {
            name: _plain(self.document[key], key)
            for key, name in keys.items()
            if key in self.document
        }
        return {"streaming": found} if found else {}

    def _training(self) -> dict[str, Any]:
        document = self.document
        found: dict[str, Any] = {}
        for key in ("train_splits", "dev_splits"):
            splits = document.get(key) or []
            found[key] = [str(s) for s in ([splits] if isinstance(splits, str) else splits)]
        found["seed"] = _plain(document.get("seed"), "seed")
        scalars = {key: document[key] for key in _OF_NOTE if key in document}
        found["settings"] = {key: _plain(value, key) for key, value in scalars.items()}
        return found

    def _ctc_search(self) -> dict[str, Any]:
        document = self.document
        # Without a class: of runs whose script chose it.
        searcher = _path_of(document.get("test_searcher"))
        if searcher and searcher not in CTC_SEARCHERS:
            raise UserError(
                f"{self.path}: test_searcher is {searcher}, which a bundle cannot hold: its text "
                f"is searched with {' or '.join(CTC_SEARCHERS)}."
            )
        settings = document.get("test_beam_search", document)
        search = {key: _plain(settings[key], key) for key in CTC_SETTINGS if key in settings}
        # Thresholds that leave nothing out; JSON has no infinity.
        search = {
            key: math.copysign(_BEYOND_NATS, value) if value in (math.inf, -math.inf) else value
            for key, value in search.items()
        }
        search["beam_size"] = _plain(document["test_beam_size"], "test_beam_size")
        if settings.get("ngram") or settings.get("kenlm_model_path"):
            self.left_out.append("word n-gram")
        if settings.get("hotwords"):
            self.left_out.append("list of hotwords")
        return search

    def _joint_search(self) -> dict[str, Any]:
        document = self.document
        if "test_search" in document:
            return self._translate(document["test_search"], self.named, f"{self.path}: test_search")
        # Of runs whose YAML held the settings and whose script built the search.
        weights = {"ctc": float(document["ctc_weight_decode"])}
        full = []
        if not document["no_lm"]:
            weights["lm"] = float(document["lm_weight"])
            full.append(
                self._language_model(
                    document["lm_model"],
                    document["pretrained_lm_tokenizer_path"],
                    document.get("temperature_lm", 1.0),
                )
            )
        if document.get("token_ngram_path"):
            self.left_out.append("token n-gram")
        return {
            "class": "CachedBeamSearcher",
            "modules": [{"ref": "Transformer"}, {"ref": "seq_lin"}],
            "beam_size": _plain(document["test_beam_size"], "test_beam_size"),
            **{key: _plain(document[key], key) for key in _JOINT_SETTINGS},
            "scorer": {
                "class": "ScorerBuilder",
                "full_scorers": full,
                "partial_scorers": [
                    {
                        "class": "CTCScorer",
                        "ctc_fc": {"ref": "ctc_lin"},
                        "blank_index": _plain(document["blank_index"], "blank_index"),
                        "eos_index": _plain(document["eos_index"], "eos_index"),
                    }
                ],
                "weights": weights,
                "scorer_beam_scale": _plain(document["scorer_beam_scale"], "scorer_beam_scale"),
            },
        }

    def _language_model(self, model: Any, source: Any, temperature: Any) -> dict[str, Any]:
        """The scorer of a language model, which is described beside the search."""
        made = self._translate(model, self.named, f"{self.path}: lm_model")
        if not isinstance(made, dict) or "maker" not in made:
            raise UserError(f"{self.path}: lm_model must be a !name: of a language model's class.")
        self.found.lm = {"class": made.pop("maker"), **made}
        self.found.lm_source = str(source)
        return {
            "class": "LMScorer",
            "language_model": {"ref": "lm"},
            "temperature": _plain(temperature, "temperature"),
        }

    def _scorers(self, nodes: Any, where: str) -> tuple[list[Any], set[str]]:
        """Descriptions of scorers, and the keys of those that are left out."""
        described, left_out = [], set()
        for node in nodes or []:
            path = _path_of(node)
            if path == _TOKEN_NGRAM:
                left_out.add("kenlm")
                if node.get("path"):
                    self.left_out.append("token n-gram")
            elif path == _LM and node.get("disabled", False):
                left_out.add("lm")
            elif path == _LM:
                described.append(
                    self._language_model(
                        node["language_model"], node["source"], node.get("temperature", 1.0)
                    )
                )
            else:
                described.append(self._translate(node, self.named, where))
        return described, left_out

    def _translate(self, node: Any, named: Mapping[int, str], where: str) -> Any:
        """A YAML node as a node of ``inference.classes.build``."""
        if id(node) in named:
            return {"ref": named[id(node)]}
        tag = getattr(getattr(node, "tag", None), "value", None) or ""
        if isinstance(node, TaggedScalar) and not tag.startswith("!name:"):
            raise UserError(
                f"{where} is {tag} {node.value}: a bundle holds values and known classes."
            )
        if isinstance(node, list):
            return [self._translate(item, named, f"{where}.{i}") for i, item in enumerate(node)]
        arguments: dict[str, Any] = {}
        if isinstance(node, Mapping):
            left_out: set[str] = set()
            for key, value in node.items():
                if key in ("full_scorers", "partial_scorers"):
                    arguments[key], without = self._scorers(value, f"{where}.{key}")
                    left_out |= without
                else:
                    arguments[str(key)] = self._translate(value, named, f"{where}.{key}")
            for key in left_out & arguments.get("weights", {}).keys():
                del arguments["weights"][key]
        if tag.startswith("!new:"):
            return {"class": _name_of(node, where), **arguments}
        if tag.startswith("!name:"):
            return {"maker": _name_of(node, where), **arguments}
        return arguments if isinstance(node, Mapping) else _plain(node, where)


def _results(run: Path) -> dict[str, Any]:
    """What ``results.json`` says; nothing of a run that has none."""
    try:
        content = json.loads((run / "results.json").read_text(encoding="utf-8"))
        return {
            "results": {
                split: dict(score)
                for split, score in content["splits"].items()
                if {"wer", "cer", "words"} <= score.keys()
            },
            "run": dict(content["run"]),
            # Those of single splits by evaluate.py; a named one has its scores with it.
            "evaluations": {
                split: str(record["command"])
                for split, record in content.get("evaluations", {}).items()
                if "splits" not in record and record["command"] != content["run"].get("command")
            },
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {"results": {}, "run": {}, "evaluations": {}}


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
