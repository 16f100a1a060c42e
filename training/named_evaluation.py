"""Evaluations of a trained run beside its own one: a name, a folder and a record for each."""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ruamel.yaml

from common.errors import UserError
from inference.scoring.reports import read_results
from training.checkpoints.fingerprint import read_fingerprint, rows_digest
from training.data.preparation import beside, manifest_rows, move_manifests, prepare_manifests
from training.launch.settings import PATHS
from training.launch.start import from_anywhere

EVAL_FOLDER = "eval"
SEARCH_KEYS = (
    "test_searcher",
    "test_beam_search",
    "test_beam_size",
    "kenlm_model_path",
    "alpha",
    "beta",
    "no_lm",
    "pretrained_lm_tokenizer_path",
    "lm_weight",
    "token_ngram_path",
    "token_ngram_weight",
    "temperature_lm",
    "ctc_weight_decode",
    "temperature",
    "min_decode_ratio",
    "max_decode_ratio",
    "using_eos_threshold",
    "eos_threshold",
    "length_normalization",
    "scorer_beam_scale",
    "avg_checkpoints",
)
"""Keys of the YAML files that can change what is recognised."""

_LONGEST_NAME = 120  # bytes


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated, how, and where its reports go.

    Attributes:
        name: of the evaluation, and of its folder.
        place: whose ``results.json`` has the scores: the run's folder, if that can be written.
        folder: for the reports: ``eval/<name>`` in it.
        manifests: folder of the test manifests.
        settings: what the scores depend on, as JSON values.
        is_own: it repeats the evaluation that ends the training, whose reports it renews as well.
    """

    name: str
    place: Path
    folder: Path
    manifests: Path
    settings: dict[str, Any]
    is_own: bool


def plan_evaluation(
    hparams: Mapping[str, Any],
    resolved: str,
    eval_precision: str,
    eval_name: str | None,
    place: Path,
) -> Evaluation:
    """Prepare the test manifests, and find out what distinguishes this evaluation from others.

    Args:
        hparams: of this evaluation, the splits as lists.
        resolved: its YAML file with overrides and without references.
        eval_precision: of the network.
        eval_name: what the user calls it.
        place: where it is written; another folder than the run's where that may only be read.

    Raises:
        UserError: the test splits cannot be prepared, or ``eval_name`` is taken by an evaluation
            with other settings.
    """
    run, splits = Path(hparams["output_folder"]), list(hparams["test_splits"])
    if not splits:
        raise UserError("test_splits is empty: --test_only evaluates at least one split.")
    own = _settings_of_run(run)
    search = search_settings(resolved)
    with beside(run, [f"{split}.csv" for split in splits]) as scratch:
        if not hparams["skip_prep"]:
            prepare_manifests(hparams, scratch, test_only=True)
        digests = {split: rows_digest(manifest_rows(scratch / f"{split}.csv")) for split in splits}
        settings = {
            **search,
            "eval_precision": eval_precision,
            "data": {split: digest[:16] for split, digest in digests.items()},
        }
        recorded = read_fingerprint(run)
        is_own = (
            place == run
            and own["search"] == search
            and own["eval_precision"] in (None, eval_precision)
            and all(
                split in own["splits"]
                and recorded.get(f"test split {split}", {}).get("sha256", digest) == digest
                for split, digest in digests.items()
            )
        )
        earlier = earlier_evaluations(place, read_results)
        if eval_name is None:
            name = _distinguishing(splits, search, eval_precision, own)
            name = free_name(name, settings, earlier)
        else:
            name = checked_name(eval_name, settings, earlier)
        folder = place / EVAL_FOLDER / name
        manifests = run if is_own or hparams["skip_prep"] else folder
        if not hparams["skip_prep"]:
            move_manifests(scratch, manifests)
    return Evaluation(name, place, folder, manifests, settings, is_own)


def search_settings(resolved: str) -> dict[str, Any]:
    """Those of ``SEARCH_KEYS`` that a file has, as JSON values."""
    document = ruamel.yaml.YAML().load(io.StringIO(resolved))
    # Wherever it is begun from, a run's own files are the same ones.
    paths = {str(document[key]): from_anywhere(document[key]) for key in PATHS & document.keys()}
    return {key: _plain(document[key], paths) for key in SEARCH_KEYS if key in document}


def _plain(node: Any, paths: Mapping[str, Any]) -> Any:
    if isinstance(node, Mapping):
        return {str(key): _plain(value, paths) for key, value in node.items()}
    if isinstance(node, Sequence) and not isinstance(node, str):
        return [_plain(value, paths) for value in node]
    if isinstance(node, bool) or node is None:
        return node
    if isinstance(node, (int, float)):
        if not math.isfinite(node):
            # JSON has no such number.
            return str(float(node))
        # ruamel's own numbers, and 1 for 1.0
        return int(node) if node == int(node) else float(node)
    # An object of the file is told by its tag; its arguments are keys of their own.
    tag = getattr(getattr(node, "tag", None), "value", None)
    return str(tag or paths.get(str(node), node))


def _settings_of_run(run: Path) -> dict[str, Any]:
    """How the run was evaluated when its training had ended."""
    found: dict[str, Any] = {"search": None, "splits": [], "eval_precision": None}
    try:
        text = (run / "hyperparams.yaml").read_text(encoding="utf-8")
        splits = _plain(ruamel.yaml.YAML().load(text)["test_splits"], {})
        found["splits"] = [splits] if isinstance(splits, str) else splits
        found["search"] = search_settings(text)
        found["eval_precision"] = read_results(run)["run"].get("eval_precision")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ruamel.yaml.YAMLError):
        # What cannot be read is not the same; without results everything is still to be scored.
        pass
    return found


def earlier_evaluations(place: Path, read: Callable[[Path], dict]) -> dict[str, Any]:
    """The evaluations by name that a folder's ``results.json`` has.

    Args:
        read: reads that file, or raises a ValueError.
    """
    try:
        return read(place).get("evaluations") or {}
    except (OSError, ValueError):
        return {}


def _distinguishing(
    splits: list[str], search: Mapping[str, Any], eval_precision: str, own: Mapping[str, Any]
) -> str:
    """Splits, language model, beam, and whatever else is not as in the run's own evaluation."""
    parts = ["+".join(splits)]
    if search.get("no_lm") is False and search.get("pretrained_lm_tokenizer_path"):
        parts.append(f"lm{search.get('lm_weight', '')}")
    for key in ("kenlm_model_path", "token_ngram_path"):
        if search.get(key):
            parts.append(re.sub(r"(\.arpa)?(\.gz)?$", "", Path(search[key]).name))
    if "test_beam_size" in search:
        parts.append(f"beam{search['test_beam_size']}")
    named = {
        *("no_lm", "lm_weight", "pretrained_lm_tokenizer_path", "kenlm_model_path"),
        *("token_ngram_path", "test_beam_size", "test_beam_search", "test_searcher"),
    }
    for key, value in search.items():
        if key not in named and own["search"] is not None and own["search"].get(key) != value:
            parts.append(f"{key}{value}")
    if own["eval_precision"] not in (None, eval_precision):
        parts.append(eval_precision)
    return re.sub(r"[^\w.+-]+", "-", "_".join(parts)).strip("-.") or "none"


def free_name(name: str, settings: Mapping[str, Any], earlier: Mapping[str, Any]) -> str:
    """The name as that of a folder, with a number where another evaluation has it."""
    name = name.encode()[:_LONGEST_NAME].decode(errors="ignore")
    number, candidate = 1, name
    while not _is_same(earlier.get(candidate), settings):
        number += 1
        candidate = f"{name}-{number}"
    return candidate


def checked_name(name: str, settings: Mapping[str, Any], earlier: Mapping[str, Any]) -> str:
    """A name that the user chose.

    Raises:
        UserError: no folder can have it, or an evaluation with other settings has it.
    """
    if not re.fullmatch(r"[\w+-][\w.+-]*", name):
        raise UserError(
            f"--eval_name {name!r} is to be the name of a folder: letters, digits and . _ + - only."
        )
    if not _is_same(earlier.get(name), settings):
        then = earlier[name].get("settings", {})
        others = [key for key in {**then, **settings} if then.get(key) != settings.get(key)]
        # A mapping repeats keys that stand for themselves.
        told = [key for key in others if not isinstance(settings.get(key), Mapping)] or others
        changed = ", ".join(f"{key} {then.get(key)} / {settings.get(key)}" for key in told)
        raise UserError(
            f"--eval_name {name} is another evaluation of this run (then / now: {changed}). "
            "Choose another name; without one it is called after what distinguishes it."
        )
    return name


def _is_same(entry: Any, settings: Mapping[str, Any]) -> bool:
    """Whether nothing has the name, or the same evaluation."""
    if not isinstance(entry, Mapping) or "splits" not in entry:
        return True
    return entry.get("settings") == settings
