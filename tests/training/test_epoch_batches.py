"""Every utterance of an epoch comes once, whoever shares it and whenever it was interrupted."""

import itertools

import pytest
import torch
from speechbrain.dataio.sampler import ReproducibleRandomSampler
from torch.utils.data import BatchSampler, SequentialSampler

from training.data import epoch_batches
from training.data.epoch_batches import EpochBatches
from training.launch import processes

IDS = [f"u{i:02d}" for i in range(23)]


@pytest.fixture
def shares(monkeypatch):
    """Ids of each process's batches in epoch 3, and its sampler; ``go_on`` as in a checkpoint."""

    def shares(batch_size, ranks=1, seed=1, go_on=None, ids=IDS):
        for module in (epoch_batches, processes):
            monkeypatch.setattr(module, "is_distributed_initialized", lambda: ranks > 1)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: ranks)
        found = []
        for rank in range(ranks):
            monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
            order = ReproducibleRandomSampler(ids, seed=seed)
            sampler = EpochBatches(BatchSampler(order, batch_size, drop_last=False), ids)
            if go_on is not None:
                sampler.go_on(*go_on)
            sampler.set_epoch(3)
            found.append(([[ids[i] for i in batch] for batch in sampler], sampler))
        return found

    return shares


def flat(batches):
    return list(itertools.chain(*batches))


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 23, 99])
def test_processes_step_equally_often_and_see_everything(shares, ranks, batch_size):
    found = shares(batch_size, ranks)
    assert len({len(batches) for batches, _ in found}) == 1
    assert {len(sampler) for _, sampler in found} == {len(found[0][0])}
    assert {sampler.num_whole() for _, sampler in found} == {len(found[0][0])}
    seen = [item for batches, _ in found for item in flat(batches)]
    assert set(seen) == set(IDS)
    if ranks == 1:
        assert len(seen) == len(IDS)


def test_fewer_utterances_than_processes_are_trained_on_by_all(shares):
    found = shares(batch_size=4, ranks=3, ids=["a"])
    assert [batches for batches, _ in found] == [[["a"]]] * 3


@pytest.mark.parametrize("done", [0, 1, 3, 6])
def test_the_rest_of_unchanged_batches_is_the_rest_in_its_order(shares, done):
    for ranks in (1, 2):
        steps = min(done, len(shares(4, ranks)[0][0]))
        whole = shares(4, ranks)
        seen = whole[0][1].seen(steps)
        rest = shares(4, ranks, go_on=(steps, seen))
        for (batches, _), (left, sampler) in zip(whole, rest, strict=True):
            assert left == batches[steps:]
            assert len(sampler) == len(batches)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 23])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_other_batches_have_exactly_the_others(shares, batch_size, ranks):
    before = shares(4, ranks=2)
    seen = before[0][1].seen(2)
    assert sorted(seen) == sorted(flat(batch for batches, _ in before for batch in batches[:2]))
    after = shares(batch_size, ranks, seed=9, go_on=(2, seen))
    rest = [item for batches, _ in after for item in flat(batches)]
    assert set(rest) >= set(IDS) - set(seen)
    if ranks == 1:
        assert sorted(rest + seen) == IDS
    # Interrupted once more, what was seen before the first time is known still.
    again = after[0][1].seen(3)
    assert set(seen) < set(again)
    # The next epoch has everything.
    after[0][1].set_epoch(4)
    if ranks == 1:
        assert sorted(IDS[i] for batch in after[0][1] for i in batch) == IDS


def test_an_order_that_draws_nothing_is_the_same_in_every_epoch():
    sampler = EpochBatches(BatchSampler(SequentialSampler(IDS), 5, drop_last=False), IDS)
    first = list(sampler)
    sampler.set_epoch(7)
    assert list(sampler) == first
