"""What a benchmark is held against."""

from __future__ import annotations

from typing import NamedTuple


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
