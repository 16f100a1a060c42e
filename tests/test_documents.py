"""Every command that README and docs/ show parses: a page may not promise what a script refuses."""

import argparse
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.test_readme import DOCUMENTS, commands
from training.launch.command_line import check_keys, parse_command_line

REPOSITORY = Path(__file__).resolve().parent.parent
TABLE_COMMAND = re.compile(r"`((?:python|torchrun) [^`]+)`")


class Parsed(Exception):
    """The command line was understood; nothing more is wanted."""


def shown_in(document: Path) -> list[str]:
    """Commands of the fenced blocks and of the tables, without what a shell does around them."""
    text = document.read_text(encoding="utf-8")
    return [line.split(" > ")[0] for line in commands(text) + TABLE_COMMAND.findall(text)]


LINES = sorted({(path.name, line) for path in DOCUMENTS for line in shown_in(path)})
PYTHON = [pair for pair in LINES if re.search(r"python|torchrun|train_", pair[1])]


def words_of(line: str) -> list[str]:
    """The script or module with its arguments."""
    words = shlex.split(line)
    if words[0] == "torchrun":
        start = next(i for i, word in enumerate(words) if word.endswith(".py"))
        return words[start:]
    return words[2:] if words[1] == "-m" else words[1:]


@pytest.mark.parametrize(("document", "line"), PYTHON)
def test_a_command_of_the_pages_parses(document, line, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    script, *arguments = words_of(line)
    name = script.removesuffix(".py")
    if name in ("train_CTC", "train_S2S", "train_LM"):
        # A run's folder has settings of its own, and may be there or not.
        run, *_ = arguments = [x.replace("results/", "no_such_folder/") for x in arguments]
        parsed = parse_command_line(arguments, document)
        if not run.startswith("no_such_folder/"):
            check_keys(parsed.param_file, parsed.overrides, script)
        return
    module = importlib.import_module(name)
    parse = argparse.ArgumentParser.parse_known_args

    def parse_args(parser, args=None, namespace=None):
        _, rest = parse_known_args(parser, args, namespace, ends=False)
        assert not rest
        raise Parsed

    def parse_known_args(parser, args=None, namespace=None, ends=True):
        with monkeypatch.context() as subcommands:
            subcommands.setattr(argparse.ArgumentParser, "parse_known_args", parse)
            found = parse(parser, args, namespace)
        if ends:
            raise Parsed
        return found

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit if "--help" in arguments else Parsed) as ended:
        module.main()
    assert not getattr(ended.value, "code", None)


def test_the_pages_have_commands():
    assert len(PYTHON) > 40
    assert {name for name, _ in PYTHON} >= {"README.md", "choosing.md", "data.md", "training.md"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_extras_of_the_pages_can_be_installed(document):
    project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    section = project.split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = re.findall(r"pip install -e '\.\[([\w,]+)\]'", document.read_text(encoding="utf-8"))
    wanted = {extra for names in extras for extra in names.split(",")}
    assert wanted <= set(re.findall(r"^(\w+) = \[", section, flags=re.MULTILINE))


def headings_of(document: Path) -> set[str]:
    """Headings as the addresses that GitHub gives them."""
    titles = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_into_pages_end_at_a_heading(document):
    links = re.findall(r"\]\(([\w/.]*)#([\w-]+)\)", document.read_text(encoding="utf-8"))
    for page, heading in links:
        target = document.parent / page if page else document
        assert heading in headings_of(target), (page, heading)
