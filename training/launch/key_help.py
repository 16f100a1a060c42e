"""The keys of a YAML file with their values and comments, as ``--help`` lists them."""

import re
from collections.abc import Mapping
from pathlib import Path

from ruamel.yaml.comments import TaggedScalar

from training.launch.settings import DEFAULTS, SETTINGS
from training.launch.yaml_file import is_open, read_yaml, tag_of

_KEY = re.compile(r"(\w+):(?:\s.*?)?(?:\s#\s*(.*))?")
_COLUMN = 46


def keys_as_text(path: str | Path) -> str:
    """One line for each key that holds a value, in the order of the file, under its headings.

    Raises:
        UserError: no such file, or one that is not YAML.
    """
    document = read_yaml(path)
    lines, heading, begun = [], [], False
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            heading.append(line.strip("# "))
        elif found := _KEY.fullmatch(line):
            key, comment = found[1], found[2] or ""
            begun = begun or not key.startswith("__")
            if _is_value(key, document[key]):
                if heading and len(lines) > 1:
                    lines += ["", *(f"  {words}" for words in heading if words)]
                lines.append(_line(key, _shown(document[key]), comment))
            heading = []
        elif not line.strip():
            heading = []
    if special := [key for key in DEFAULTS if key not in document]:
        lines += ["", "  Special recipes, with what holds where the file does not have them"]
        for key in special:
            wanted = str(SETTINGS[key]).removeprefix("it must be ")
            lines.append(_line(key, str(DEFAULTS[key]), wanted))
    return "\n".join(lines) + "\n"


def _is_value(key: str, node: object) -> bool:
    """Whether a key is one to replace, and not an object made of others."""
    if key.startswith("__") or tag_of(node).startswith(("!new", "!name", "!apply", "!include")):
        return False
    if not isinstance(node, Mapping | list):
        return True
    children = node.values() if isinstance(node, Mapping) else node
    return not any(isinstance(child, TaggedScalar) for child in children)


def _shown(node: object) -> str:
    if is_open(node):
        return "(must be given)"
    if isinstance(node, TaggedScalar):
        return str(node.value)
    if isinstance(node, Mapping):
        return "{" + ", ".join(f"{key}: {_shown(value)}" for key, value in node.items()) + "}"
    if isinstance(node, list):
        return "[" + ", ".join(map(_shown, node)) + "]"
    return "null" if node is None else str(node)


def _line(key: str, value: str, comment: str) -> str:
    entry = f"  --{key} {value}"
    return f"{entry:<{_COLUMN}}  {comment}" if comment else entry
