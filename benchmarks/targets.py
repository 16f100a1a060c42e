"""What a benchmark is held against."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

from common.tables import markdown_table


class Target(NamedTuple):
    """One line of the table of targets."""

    name: str
    value: float
    limit: float
    at_least: bool
    unit: str

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def row(self) -> list[str]:
        relation = "at least" if self.at_least else "at most"
        verdict = "yes" if self.met else "**NO**"
        return [
            self.name,
            f"{self.value:.3g}{self.unit}",
            f"{relation} {self.limit:g}{self.unit}",
            verdict,
        ]


def table(targets: Sequence[Target]) -> str:
    """What is wanted, and what was found."""
    rows = [target.row() for target in targets]
    return markdown_table(["target", "measured", "wanted", "met"], rows)


def verdict(targets: Sequence[Target], check: bool) -> int:
    """Says on stderr which targets were missed.

    Returns:
        the exit status of a command: 1 where one was and the caller came to ``check``.
    """
    missed = [target for target in targets if not target.met]
    for target in missed:
        print(f"missed: {target.name}: {', '.join(target.row()[1:3])}", file=sys.stderr)
    return 1 if missed and check else 0
