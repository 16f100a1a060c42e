"""From the host to the GPU without waiting: tensors, and batches before their turn comes."""

from collections.abc import Iterator, Sized
from typing import Any

import torch
from speechbrain.dataio.batch import PaddedBatch
from torch import Tensor


class CopiedAhead:
    """A loader whose next batch is copied while the GPU computes with the one before it.

    Args:
        loader: gives batches in pinned memory.
        device: a GPU.
    """

    def __init__(self, loader: Any, device: torch.device | str):
        self.loader: Sized = loader
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[PaddedBatch]:
        waiting: tuple[PaddedBatch, torch.cuda.Event] | None = None
        for batch in self.loader:
            with torch.cuda.stream(self.stream):
                batch = batch.to(self.device, non_blocking=True)
                copied = self.stream.record_event()
            if waiting is not None:
                yield _ready(*waiting)
            waiting = batch, copied
        if waiting is not None:
            yield _ready(*waiting)


def _ready(batch: PaddedBatch, copied: torch.cuda.Event) -> PaddedBatch:
    stream = torch.cuda.current_stream()
    stream.wait_event(copied)
    for value in batch:
        for tensor in value if isinstance(value, tuple) else (value,):
            if isinstance(tensor, Tensor) and tensor.is_cuda:
                # Its memory belongs to the other stream, which must not give it away meanwhile.
                tensor.record_stream(stream)
    return batch


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the host on a device, without waiting for what the device has to do."""
    if torch.device(device).type == "cuda" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
