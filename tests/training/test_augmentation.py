"""Augmentation depends on (seed, epoch, utterance) and on nothing else."""

import pytest
import torch
from speechbrain.augment.freq_domain import SpectrogramDrop, Warping
from speechbrain.augment.time_domain import SpeedPerturb

from common.errors import UserError
from training.data.augmentation import SpectrogramAugmentation, SpeedPerturbation
from training.seeding import seed_everything

FRAMES = [60, 37, 44]
IDS = ["101-1-0001", "101-1-0002", "102-1-0001"]


@pytest.fixture(scope="module")
def feats_BTM():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 60, 20, generator=generator)


@pytest.fixture
def augmentation():
    drops = [SpectrogramDrop(4, 9, 1, 4, replace="mean", dim=dim) for dim in (1, 2)]
    return SpectrogramAugmentation([Warping(), *drops], seed=7)


def augmented(augmentation, feats_BTM, rows, epoch=1, view=0, padding=0):
    padded = torch.nn.functional.pad(feats_BTM[rows], (0, 0, 0, padding), value=torch.nan)
    return augmentation(padded, [FRAMES[r] for r in rows], [IDS[r] for r in rows], epoch, view)


def test_an_utterance_is_augmented_the_same_in_any_batch_order_and_padding(augmentation, feats_BTM):
    whole = augmented(augmentation, feats_BTM, [0, 1, 2])
    for rows in ([2, 0, 1], [1], [2, 1]):
        again = augmented(augmentation, feats_BTM, rows, padding=5)
        for row, original in enumerate(rows):
            frames = FRAMES[original]
            assert torch.equal(again[row, :frames], whole[original, :frames])


def test_what_was_drawn_before_does_not_matter(augmentation, feats_BTM):
    seed_everything(1)
    first = augmented(augmentation, feats_BTM, [0, 1, 2])
    seed_everything(2)
    torch.rand(17)
    assert torch.equal(augmented(augmentation, feats_BTM, [0, 1, 2]), first)


def test_augmenting_draws_nothing_from_the_run(augmentation, feats_BTM):
    seed_everything(3)
    expected = torch.rand(4)
    seed_everything(3)
    augmented(augmentation, feats_BTM, [0, 1, 2])
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("change", ["epoch", "view", "seed", "id"])
def test_every_part_of_the_key_changes_the_outcome(augmentation, feats_BTM, change):
    first = augmented(augmentation, feats_BTM, [0])
    assert not torch.equal(first, feats_BTM[:1])
    if change == "seed":
        other = SpectrogramAugmentation(augmentation.augmentations, seed=8)
        second = augmented(other, feats_BTM, [0])
    elif change == "id":
        second = augmentation(feats_BTM[:1], FRAMES[:1], ["another"], 1)
    else:
        second = augmented(augmentation, feats_BTM, [0], **{change: 2})
    assert not torch.equal(first, second)


def test_the_input_and_what_lies_beyond_an_item_stay_as_they_were(augmentation, feats_BTM):
    before = feats_BTM.clone()
    result = augmented(augmentation, feats_BTM, [0, 1, 2])
    assert torch.equal(feats_BTM, before)
    assert torch.equal(result[1, 37:], feats_BTM[1, 37:])


def test_no_augmentation_is_a_copy(feats_BTM):
    result = SpectrogramAugmentation([], seed=1)(feats_BTM, FRAMES, IDS, 1)
    assert torch.equal(result, feats_BTM)


@pytest.mark.parametrize("replace", ["cutcat", "random_selection"])
def test_a_drop_that_needs_a_batch_or_forgets_its_setting_is_refused(replace):
    with pytest.raises(UserError, match=f"replace: {replace} "):
        SpectrogramAugmentation([SpectrogramDrop(replace=replace)], seed=1)


@pytest.fixture
def perturbation():
    return SpeedPerturbation(SpeedPerturb(16000, [90, 100, 110]), seed=7)


def test_speed_depends_on_epoch_and_utterance_alone(perturbation):
    wav_S = torch.sin(torch.arange(3200) / 5.0)
    for epoch in (1, 2):
        perturbation.epoch = epoch
        first = perturbation(wav_S, "a")
        perturbation(wav_S, "b")
        seed_everything(epoch)
        assert torch.equal(perturbation(wav_S, "a"), first)


def test_every_speed_is_drawn(perturbation):
    lengths = set()
    for epoch in range(20):
        perturbation.epoch = epoch
        lengths.add(perturbation(torch.ones(1100), "a").shape[0])
    assert len(lengths) == 3


def test_one_epoch_has_several_speeds(perturbation):
    assert len({perturbation(torch.ones(1100), f"u{i}").shape[0] for i in range(20)}) == 3


def test_copies_are_augmented_anew_and_warped_in_time_alike(augmentation):
    frames, ids = [200, 150], IDS[:2]
    ramp_BTM = torch.arange(200.0)[None, :, None].repeat(2, 1, 20)
    warp, *drops = augmentation.augmentations
    warped = SpectrogramAugmentation([warp], seed=7).copies(ramp_BTM, frames, ids, 1, 2)
    assert torch.equal(*warped.chunk(2))
    assert not torch.equal(warped[:2], ramp_BTM)
    dropped = SpectrogramAugmentation(drops, seed=7).copies(ramp_BTM, frames, ids, 1, 2)
    assert not torch.equal(*dropped.chunk(2))
    # One copy alone is augmented in the order of the file.
    alone = augmentation.copies(ramp_BTM, frames, ids, 1, 1)
    assert torch.equal(alone, augmentation(ramp_BTM, frames, ids, 1))
