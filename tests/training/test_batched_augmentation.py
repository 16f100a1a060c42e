"""A batch augmented at once is what its utterances are one by one."""

import pytest
import torch
from speechbrain.augment.freq_domain import SpectrogramDrop, Warping

from training.data.augmentation import SpectrogramAugmentation
from training.data.batched_augmentation import augment_batch, batched_forms
from training.data.filter_augment import FilterAugment
from training.seeding import derive_seed

FRAMES, BINS = [90, 61, 11, 1], 40
MODULES = {
    "mean in time": SpectrogramDrop(5, 20, 0, 4, replace="mean", dim=1),
    "mean in frequency": SpectrogramDrop(3, 9, 1, 3, replace="mean", dim=2),
    "zeros": SpectrogramDrop(5, 20, 2, 3, replace="zeros", dim=1),
    "warped time": Warping(warp_window=5, dim=1),
    "warped frequency": Warping(warp_window=6, dim=2),
    "filter": FilterAugment(0.4),
}


@pytest.fixture(scope="module")
def feats_BTM():
    """Features with anything in the padding."""
    feats_BTM = torch.randn(
        len(FRAMES), max(FRAMES) + 3, BINS, generator=torch.Generator().manual_seed(0)
    )
    for row, frames in enumerate(FRAMES):
        feats_BTM[row, frames:] = torch.nan
    return feats_BTM


@pytest.mark.parametrize("names", [*([name] for name in MODULES), list(MODULES)], ids="+".join)
def test_a_batch_at_once_is_one_utterance_after_the_other(names, feats_BTM):
    modules, changed = [MODULES[name] for name in names], False
    for epoch in range(1, 30):
        ids = [f"u{row}" for row in range(len(FRAMES))]
        wanted = SpectrogramAugmentation(modules, seed=7)(feats_BTM, FRAMES, ids, epoch)
        seeds = [derive_seed(7, epoch, name, 0, "spectrogram") for name in ids]
        found = augment_batch(batched_forms(modules), feats_BTM, FRAMES, seeds)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5, equal_nan=True)
        changed |= not torch.equal(found[0, : FRAMES[0]], feats_BTM[0, : FRAMES[0]])
    assert changed


@pytest.mark.parametrize(
    "module", [SpectrogramDrop(replace="rand"), Warping(warp_mode="bilinear"), torch.nn.Identity()]
)
def test_what_has_no_batched_form_is_left_to_the_utterances(module):
    assert batched_forms([MODULES["zeros"], module]) is None
