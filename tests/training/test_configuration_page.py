"""docs/configuration.md explains every key, with examples that are accepted."""

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from training.launch.command_line import build_parser, parse_command_line
from training.launch.settings import SETTINGS, check_setting
from training.launch.yaml_file import read_yaml, tag_of

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [REPOSITORY / "docs" / f"{name}.md" for name in ("configuration", "language_models")]
TEXT = "".join(page.read_text(encoding="utf-8") for page in PAGES)
ROWS = [line for line in TEXT.splitlines() if re.match(r"\| `\w+`.* \| `--.*` \|$", line)]
KNOWN = SETTINGS.keys() | {action.dest for action in build_parser("")._actions}
VALUES: set[str] = set()
"""Keys of the files that hold a number, a text or a switch."""
for recipe in (REPOSITORY / "hparams").rglob("*.yaml"):
    written = read_yaml(recipe)
    KNOWN |= written.keys()
    VALUES |= {
        key
        for key, value in written.items()
        if not tag_of(value) and not isinstance(value, (list, Mapping))
    }


@pytest.mark.parametrize("key", sorted(SETTINGS.keys() | VALUES))
def test_every_key_is_explained(key):
    assert f"`{key}`" in TEXT


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("`")[1])
def test_examples_of_keys_are_accepted(row):
    explained = set(re.findall(r"`(\w+)`", row.split(" | ")[0]))
    example = row.split(" | ")[-1].strip(" |").strip("`")
    words = [word.strip("'") for word in re.findall(r"'[^']*'|\S+", example)]
    line = parse_command_line(["recipe.yaml", *words], "")
    given = line.overrides | {k: v for k, v in line.run_options.items() if k != "param_file"}
    assert given.keys() & explained
    for key, value in given.items():
        check_setting(key, value, "--")
    assert given.keys() <= KNOWN


def test_the_page_has_examples():
    assert len(ROWS) > 50
