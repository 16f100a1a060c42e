"""The batches of an epoch: every utterance once, also when the run was stopped in between."""

from collections.abc import Collection, Iterator, Sequence
from itertools import cycle, islice

import torch
from speechbrain.dataio.sampler import DynamicBatchSampler
from speechbrain.utils.distributed import is_distributed_initialized
from torch.utils.data import BatchSampler, Sampler

from training.launch.processes import num_ranks


class EpochBatches(Sampler[list[int]]):
    """A batch sampler that leaves out what an interrupted epoch has seen, and shares out the rest.

    What was seen is kept as ids: with the batches unchanged the rest is exactly the rest of them;
    with other batches, another order or another number of processes every utterance that was not
    seen still comes, and comes once. Of a batch that was seen in part, the rest is a batch.

    Args:
        batches: of positions in the dataset; it, or its sampler, draws anew for each epoch, or
            gives the same always.
        ids: of the utterances, by position.
    """

    def __init__(self, batches: DynamicBatchSampler | BatchSampler, ids: Sequence[str]) -> None:
        self._batches = batches
        self._ids = ids
        self._first, self._seen = 0, frozenset[str]()
        self._rest: list[list[int]] = []
        self._own: list[list[int]] | None = None
        self.go_on(0, ())

    def go_on(self, num_done: int, seen: Collection[str]) -> None:
        """Of the next epoch that is set each process has had ``num_done`` batches already.

        Args:
            seen: ids that need not come again.
        """
        self._next_first, self._next_seen = num_done, frozenset(seen)

    def set_epoch(self, epoch: int) -> None:
        """Draws the batches of an epoch, counted from 1."""
        for part in (self._batches, getattr(self._batches, "sampler", None)):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        self._first, self._seen = self._next_first, self._next_seen
        self.go_on(0, ())
        # Not to its end: a DynamicBatchSampler would draw once more.
        whole = list(islice(self._batches, len(self._batches)))
        rest = ([i for i in batch if self._ids[i] not in self._seen] for batch in whole)
        self._rest = [batch for batch in rest if batch]
        rank = torch.distributed.get_rank() if is_distributed_initialized() else 0
        self._ranks = num_ranks()
        # All processes step equally often: what is missing in the last round is seen twice.
        missing = -len(self._rest) % self._ranks
        self._own = [*self._rest, *islice(cycle(whole), missing)][rank :: self._ranks]

    def num_whole(self) -> int:
        """How many batches each process has in an epoch that nothing interrupts."""
        return -(-len(self._batches) // num_ranks())

    def seen(self, num_done: int) -> list[str]:
        """Ids of the epoch that all processes together saw in their first ``num_done`` batches."""
        done = self._rest[: (num_done - self._first) * self._ranks]
        return [*self._seen, *(self._ids[i] for batch in done for i in batch)]

    def __iter__(self) -> Iterator[list[int]]:
        """The batches of this process that are left."""
        return iter(self._drawn())

    def __len__(self) -> int:
        """How many batches this process has in the epoch, those before an interruption included."""
        return self._first + len(self._drawn())

    def _drawn(self) -> list[list[int]]:
        if self._own is None:
            self.set_epoch(1)
        assert self._own is not None
        return self._own
