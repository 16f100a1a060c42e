"""Keys and values of past positions, for attention that decodes one token at a time."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 16
"""Positions by which the storage grows."""


class KeyValueCache:
    """Keys and values (hypotheses, heads, positions, head width), reordered without a copy.

    A beam search reorders the cache at every token and appends to it at every token. Reordering is
    only noted; :meth:`append` copies once, into storage that nobody else sees, and leaves its own
    cache as it was, so that a state can be forked and used again.

    Without arguments it is the cache before the first token, of any number of hypotheses.
    """

    def __init__(
        self,
        keys_NHUD: Tensor | None = None,
        values_NHUD: Tensor | None = None,
        length: int = 0,
        rows_N: Tensor | None = None,
    ) -> None:
        self._keys_NHUD = keys_NHUD
        self._values_NHUD = values_NHUD
        self._rows_N = rows_N
        self.length = length

    def select(self, rows_N: Tensor) -> KeyValueCache:
        """The cache of some hypotheses, in the order of ``rows_N``; a row may come repeatedly."""
        if self.length == 0:
            return self
        rows_N = rows_N if self._rows_N is None else self._rows_N[rows_N]
        return KeyValueCache(self._keys_NHUD, self._values_NHUD, self.length, rows_N)

    def append(self, key_NHD: Tensor, value_NHD: Tensor) -> KeyValueCache:
        """The cache with one more position; this one stays as it is."""
        return KeyValueCache(
            self._appended(self._keys_NHUD, key_NHD),
            self._appended(self._values_NHUD, value_NHD),
            self.length + 1,
        )

    @property
    def keys_NHUD(self) -> Tensor:
        """Keys of the positions so far; a view of a cache fresh from :meth:`append`."""
        return self._positions(self._keys_NHUD)

    @property
    def values_NHUD(self) -> Tensor:
        """Values of the positions so far; a view of a cache fresh from :meth:`append`."""
        return self._positions(self._values_NHUD)

    def _positions(self, storage_NHUD: Tensor | None) -> Tensor:
        assert storage_NHUD is not None, "nothing has been appended"
        past_NHUD = storage_NHUD[:, :, : self.length]
        return past_NHUD if self._rows_N is None else past_NHUD[self._rows_N]

    def _appended(self, storage_NHUD: Tensor | None, new_NHD: Tensor) -> Tensor:
        if storage_NHUD is None:
            rows, heads, width = new_NHD.shape
            storage_NHUD = new_NHD.new_empty(rows, heads, BLOCK, width)
        elif self.length == storage_NHUD.shape[2]:
            storage_NHUD = torch.nn.functional.pad(storage_NHUD, (0, 0, 0, BLOCK))
        elif self._rows_N is None:
            storage_NHUD = storage_NHUD.clone()
        if self._rows_N is not None:
            storage_NHUD = storage_NHUD.index_select(0, self._rows_N)
        storage_NHUD[:, :, self.length] = new_NHD
        return storage_NHUD
