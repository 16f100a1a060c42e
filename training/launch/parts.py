"""The objects of a YAML file: whether their classes are there and take what they get."""

import difflib
import inspect
import pydoc
from collections.abc import Iterable, Mapping
from typing import Any

from common.errors import UserError
from training.launch.yaml_file import tag_of

ARGUMENTS_OF = {"test_beam_search": "test_searcher"}
"""Mappings that a script hands on, and the keys of the functions that get them."""


def check_parts(document: Mapping[str, Any], where: str) -> None:
    """Checks the arguments of every ``!new:``, ``!name:`` and ``!apply:``; imports what they name.

    Args:
        document: of the file, its references unresolved.
        where: the file.

    Raises:
        UserError: no such class or function, or an argument that it does not take or lacks; with
            what may have been meant.
    """
    for place, node in _nodes(document, ""):
        kind, _, name = tag_of(node).partition(":")
        if kind not in ("!new", "!name", "!apply", "!module"):
            continue
        part = pydoc.locate(name)
        if part is None:
            raise UserError(f"{where}: {place}: there is no {name}.{_similar_name(name)}")
        if isinstance(node, Mapping) and kind != "!module":
            _check(part, name, node, f"{where}: {place}", is_called=kind != "!name")
    for key, function in ARGUMENTS_OF.items():
        _, _, name = tag_of(document.get(function)).partition(":")
        if name and isinstance(document.get(key), Mapping):
            _check(pydoc.locate(name), name, document[key], f"{where}: {key}", is_called=False)


def _check(part: Any, name: str, given: Mapping, where: str, is_called: bool) -> None:
    try:
        parameters = inspect.signature(part).parameters
    except (TypeError, ValueError):
        # Of some builtins nobody knows.
        return
    kinds = {parameter.kind for parameter in parameters.values()}
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        for argument in map(str, given):
            if argument not in parameters:
                close = difflib.get_close_matches(argument, parameters, n=1)
                hint = f"Did you mean {close[0]}?" if close else f"It takes {_listed(parameters)}."
                raise UserError(f"{where}: {name} takes no {argument}. {hint}")
    if is_called:
        missing = [
            key
            for key, parameter in parameters.items()
            if parameter.default is inspect.Parameter.empty
            and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
            and key not in given
        ]
        if missing:
            raise UserError(f"{where}: {name} needs {_listed(missing)}.")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "no arguments"


def _similar_name(name: str) -> str:
    module, _, last = name.rpartition(".")
    close = difflib.get_close_matches(last, dir(pydoc.locate(module) or object()), n=1)
    return f" Did you mean {module}.{close[0]}?" if close and module else ""


def _nodes(node: Any, place: str) -> Iterable[tuple[str, Any]]:
    """Every node below one, with the keys that lead to it."""
    if place:
        yield place, node
    if not isinstance(node, Mapping | list):
        return
    for key, child in node.items() if isinstance(node, Mapping) else enumerate(node, start=1):
        yield from _nodes(child, f"{place}.{key}" if place else str(key))
