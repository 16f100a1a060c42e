"""What a search carries from token to token."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class SearchMemory:
    """A state with one row per hypothesis, and the networks of this search that move it on."""

    networks: tuple[Any, ...]
    state: Any

    def select(self, rows: torch.Tensor) -> SearchMemory:
        """The memory of the hypotheses ``rows``, in that order."""
        return dataclasses.replace(self, state=self.state.select(rows))
