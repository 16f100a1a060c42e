"""A random equaliser: one curve over frequency for a whole utterance."""

import pytest
import torch

from training.data.filter_augment import FilterAugment


@pytest.fixture
def feats_1TM():
    return torch.randn(1, 7, 40, generator=torch.Generator().manual_seed(0))


def test_all_frames_get_the_same_curve_within_the_gain(feats_1TM):
    for seed in range(20):
        torch.manual_seed(seed)
        curve_TM = (FilterAugment(max_gain=0.5)(feats_1TM) - feats_1TM)[0]
        torch.testing.assert_close(curve_TM, curve_TM[:1].expand_as(curve_TM), rtol=0, atol=1e-6)
        assert 0.01 < curve_TM.abs().max() <= 0.5 + 1e-6


def test_the_curve_has_as_many_straight_pieces_as_were_drawn(feats_1TM):
    torch.manual_seed(1)
    curve_M = (FilterAugment(1.0, bands_low=1, bands_high=1)(feats_1TM) - feats_1TM)[0, 0]
    torch.testing.assert_close(
        curve_M, torch.lerp(curve_M[0], curve_M[-1], torch.linspace(0, 1, 40)), rtol=0, atol=1e-5
    )


def test_the_same_seed_gives_the_same_curve_and_another_another(feats_1TM):
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        results.append(FilterAugment(0.4)(feats_1TM))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
