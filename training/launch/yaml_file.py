"""HyperPyYAML files as text and values: what stands in them before any object is built."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ruamel.yaml
from hyperpyyaml import resolve_references
from hyperpyyaml.core import recursive_update
from ruamel.yaml.comments import CommentedMap, TaggedScalar

from common.errors import UserError
from common.files import require_file
from training.launch.settings import PATHS

RECIPE_FILE = "recipe.yaml"
"""In the folder of a run: what it was begun with."""

# A path may have angle brackets, which HyperPyYAML takes for references wherever they arrive.
_HIDDEN = {"<": "\ue03c", ">": "\ue03e"}


def read_yaml(path: str | Path) -> CommentedMap:
    """The keys and values of a file; tags and comments stay with them.

    Raises:
        UserError: no such file, or one that is not a mapping in YAML.
    """
    require_file("hyperparameter file", path, "See hparams/ for the ones at hand.")
    try:
        document = ruamel.yaml.YAML().load(Path(path).read_text(encoding="utf-8"))
    except (ruamel.yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a YAML file of keys and values: {error}") from None
    if not isinstance(document, CommentedMap):
        raise UserError(f"{path} is not a YAML file of keys and values: it has no keys.")
    if strange := [key for key in document if not isinstance(key, str)]:
        raise UserError(f"{path} is not a YAML file of keys and values: {strange[0]!r} is no key.")
    return document


def tag_of(node: object) -> str:
    """The tag of a node (``!new:torch.nn.Linear``), or nothing."""
    return (getattr(getattr(node, "tag", None), "value", None) or "") if node is not None else ""


def is_open(node: object) -> bool:
    """Whether a key waits for its value."""
    return tag_of(node) == "!PLACEHOLDER"


def with_overrides(path: str | Path, overrides: Mapping[str, Any]) -> CommentedMap:
    """The file with some values replaced, its references unresolved.

    Raises:
        UserError: see ``read_yaml``; or a mapping is given for what is none.
    """
    document = read_yaml(path)
    try:
        recursive_update(document, overrides)
    except TypeError as error:
        raise UserError(f"{path}: {error}") from None
    return document


def as_text(document: CommentedMap) -> str:
    """The document as it would stand in a file."""
    stream = io.StringIO()
    ruamel.yaml.YAML().dump(document, stream)
    return stream.getvalue()


def resolved_text(path: str | Path, overrides: Mapping[str, Any]) -> str:
    """The file with overrides and without references: what a run is made from.

    Raises:
        UserError: see ``with_overrides``.
        ValueError: a required key is open, or a reference leads nowhere.
    """
    document = with_overrides(path, overrides)
    for key in document.keys() & PATHS:
        if not isinstance(document[key], TaggedScalar):
            document[key] = _hidden(document[key])
    stream = io.StringIO(as_text(document))
    stream.name = str(path)  # HyperPyYAML finds what a file includes beside it
    text = resolve_references(stream).getvalue()
    for bracket, hidden in _HIDDEN.items():
        text = text.replace(hidden, bracket)
    return text


def _hidden(value: Any) -> Any:
    """A path, or a list of them, without angle brackets."""
    if isinstance(value, list):
        return [_hidden(item) for item in value]
    if isinstance(value, str):
        for bracket, hidden in _HIDDEN.items():
            value = value.replace(bracket, hidden)
    return value
