"""docs/troubleshooting.md quotes messages; this keeps them from drifting away from the code."""

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = REPOSITORY / "docs" / "troubleshooting.md"
FOLDERS = ("common", "text", "training", "modules", "corpora", "ops", "decoding")


def quoted_messages() -> list[str]:
    """Messages in the first column of the page's tables; "…" stands for what varies."""
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:3] == "| `"]
    cells = [row.split(" | ")[0] for row in rows]
    return [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]


def texts_in_code() -> list[str]:
    """String literals of the code; fields of f-strings and of logging appear as "…"."""
    sources = [*REPOSITORY.glob("*.py")]
    sources += [path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*.py")]
    literals = []
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                literals.append(
                    "".join(p.value if isinstance(p, ast.Constant) else "…" for p in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                literals.append(re.sub(r"%[sd]", "…", node.value))
    return literals


@pytest.fixture(scope="module")
def literals() -> list[str]:
    return texts_in_code()


@pytest.mark.parametrize("message", quoted_messages())
def test_a_quoted_message_is_in_the_code(message, literals):
    parts = [part for part in message.split("…") if part.strip(" .,:;")]
    assert any(all(part in literal for part in parts) for literal in literals)


def test_messages_are_found_on_the_page():
    assert len(quoted_messages()) > 20
