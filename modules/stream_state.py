"""State of streams: frozen dataclasses of tensors with one row per stream, and nothing else.

Zeros are the state before the first frame, of every layer. Rows share no clock: what counts frames
is a tensor of integers.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor
from typing_extensions import Self, dataclass_transform

FORMAT = "1"
"""Of the bytes of a state; another one is refused."""

_State = TypeVar("_State", bound="StreamState")


class StreamState:
    """Base of the states: fields are tensors (batch, ...), states, or tuples of them.

    Never modified in place, ``put`` excepted. Subclasses are made with ``stream_state``.
    """

    def tensors(self) -> list[Tensor]:
        """All tensors, in the order of the fields."""
        return list(_leaves(self))

    @property
    def batch_size(self) -> int:
        """Streams."""
        return len(next(_leaves(self)))

    def select(self, index: Tensor) -> Self:
        """The rows that ``index`` names, in its order: integers (repeats allowed) or a mask."""
        if index.dtype == torch.bool:
            index = index.nonzero().squeeze(1)
        return self._map(lambda x: x.index_select(0, index))

    def repeat(self, n: int) -> Self:
        """Every row ``n`` times in succession, as beams of one utterance lie."""
        return self._map(lambda x: x.repeat_interleave(n, dim=0))

    def reset(self, mask: Tensor) -> Self:
        """Zeros in the rows where the boolean ``mask`` (batch,) holds: these streams start anew."""
        return self._map(lambda x: torch.where(_as_column(mask, x), torch.zeros_like(x), x))

    def hold(self, mask: Tensor, later: Self) -> Self:
        """``later``, but for the rows where the boolean ``mask`` (batch,) holds: they stay."""
        return self._map(lambda x, y: torch.where(_as_column(mask, x), x, y), later)

    def put(self, index: Tensor, rows: Self) -> None:
        """Writes ``rows`` in the places ``index`` (integers) of this state itself."""
        for own, new in zip(self.tensors(), rows.tensors(), strict=True):
            own.index_copy_(0, index, new)

    def cast_as(self, other: Self) -> Self:
        """The same in the dtypes of ``other``."""
        return self._map(lambda x, y: x.to(y.dtype), other)

    def enlarged(self, num_rows: int) -> Self:
        """As many further streams before their first frame."""
        return self._map(lambda x: torch.cat([x, x.new_zeros(num_rows, *x.shape[1:])]))

    def to_bytes(self) -> bytes:
        """All rows, for ``from_bytes`` of a state of the same model."""
        named = {name: x.contiguous() for name, x in _named(self)}
        return safetensors.torch.save(named, {"format": FORMAT})

    def from_bytes(self, data: bytes) -> Self:
        """The streams that ``to_bytes`` wrote, any number of them, where this state's tensors are.

        Raises:
            ValueError: bytes of something else, of another version, or of another model.
        """
        try:
            found = safetensors.torch.load(data)
            size = int.from_bytes(data[:8], "little")
            version = json.loads(data[8 : 8 + size])["__metadata__"]["format"]
        except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"these bytes hold no state of streams ({error}).") from None
        if version != FORMAT:
            raise ValueError(
                f"this state of streams has format {version!r}; this version reads {FORMAT!r}. "
                "Start the streams anew."
            )
        wanted = dict(_named(self))
        batch_sizes = {len(x) if x.dim() else -1 for x in found.values()}
        fits = found.keys() == wanted.keys() and len(batch_sizes) == 1
        wrong = [
            name
            for name, x in found.items()
            if not fits or (x.shape[1:], x.dtype) != (wanted[name].shape[1:], wanted[name].dtype)
        ]
        if wrong or not fits:
            raise ValueError(
                "this state of streams is that of another model or of other chunks "
                f"({', '.join(wrong[:3]) or 'it is empty'}); restore it with what made it."
            )
        rows = iter([found[name] for name in wanted])
        return self._map(lambda x: next(rows).to(x.device))

    def _map(self, fn: Callable[..., Tensor], *others: Self) -> Self:
        return _mapped(fn, self, *others)


@dataclass_transform(frozen_default=True)
def stream_state(cls: type[_State]) -> type[_State]:
    """Makes a class of fields a state: a frozen dataclass that ``torch.export`` can take apart."""
    made = dataclasses.dataclass(frozen=True)(cls)
    torch.export.register_dataclass(made, serialized_type_name=f"{cls.__module__}.{cls.__name__}")
    return made


def last_frames(seen: Tensor, num_kept: int, num_new_B: Tensor | None) -> Tensor:
    """What a layer keeps of the frames that it has seen.

    Args:
        seen: (batch, num_kept + new, ...): the kept frames of the call before, and the new ones.
        num_kept: frames to keep.
        num_new_B: how many of the new ones count, integers (batch,); None means all.
    """
    if num_new_B is None:
        return seen[:, seen.shape[1] - num_kept :].clone()
    rows_B1 = torch.arange(len(seen), device=seen.device)[:, None]
    return seen[rows_B1, num_new_B[:, None] + torch.arange(num_kept, device=seen.device)]


def _as_column(mask: Tensor, x: Tensor) -> Tensor:
    return mask.view(-1, *[1] * (x.dim() - 1))


def _children(node: Any) -> list[tuple[str, Any]]:
    if isinstance(node, tuple):
        return [(str(i), item) for i, item in enumerate(node)]
    return [(field.name, getattr(node, field.name)) for field in dataclasses.fields(node)]


def _named(node: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, child in _children(node):
        if isinstance(child, Tensor):
            yield prefix + name, child
        else:
            yield from _named(child, f"{prefix}{name}.")


def _leaves(node: Any) -> Iterator[Tensor]:
    for _, x in _named(node):
        yield x


def _mapped(fn: Callable[..., Tensor], node: Any, *others: Any) -> Any:
    if isinstance(node, Tensor):
        return fn(node, *others)
    if isinstance(node, tuple):
        return tuple(_mapped(fn, *items) for items in zip(node, *others, strict=True))
    return type(node)(
        *(
            _mapped(fn, child, *(getattr(other, name) for other in others))
            for name, child in _children(node)
        )
    )
