"""Features without the mean of their utterance, the same in any batch."""

import pytest
import torch
from speechbrain.processing.features import InputNormalization

from modules.lengths import relative_lengths
from modules.normalization import (
    CountedStatistics,
    FiniteStatistics,
    UtteranceMeanNormalization,
    remove_utterance_mean,
)

FRAMES_B = torch.tensor([9, 4, 7])


@pytest.fixture
def feats_BTM():
    generator = torch.Generator().manual_seed(0)
    return 5 * torch.randn(3, 9, 6, generator=generator) - 30


def test_each_item_loses_the_mean_over_its_own_frames(feats_BTM):
    centred = remove_utterance_mean(feats_BTM, relative_lengths(FRAMES_B, 9))
    for item, frames in enumerate(FRAMES_B.tolist()):
        alone = feats_BTM[item, :frames]
        torch.testing.assert_close(centred[item, :frames], alone - alone.mean(0), rtol=0, atol=1e-5)
        assert not centred[item, frames:].any()


def test_a_louder_recording_gives_the_same_features(feats_BTM):
    normalize = UtteranceMeanNormalization(norm_type="global", update_until_epoch=2)
    lengths = relative_lengths(FRAMES_B, 9)
    normalize(feats_BTM, lengths, epoch=1)
    normalize.eval()
    quiet, loud = (normalize(feats_BTM + shift, lengths, epoch=5) for shift in (0.0, 12.0))
    for item, frames in enumerate(FRAMES_B.tolist()):
        torch.testing.assert_close(quiet[item, :frames], loud[item, :frames], rtol=0, atol=1e-5)


def test_features_do_not_depend_on_the_padding(feats_BTM):
    normalize = UtteranceMeanNormalization(norm_type="global")
    normalize(feats_BTM, relative_lengths(FRAMES_B, 9), epoch=0)
    normalize.eval()
    whole = normalize(feats_BTM, relative_lengths(FRAMES_B, 9), epoch=9)
    for item, frames in enumerate(FRAMES_B.tolist()):
        alone = normalize(feats_BTM[item : item + 1, :frames], torch.ones(1), epoch=9)
        torch.testing.assert_close(whole[item, :frames], alone[0], rtol=0, atol=1e-5)
    poisoned = feats_BTM.clone()
    poisoned[1, 4:] = torch.nan
    again = normalize(poisoned, relative_lengths(FRAMES_B, 9), epoch=9)
    torch.testing.assert_close(again[1, :4], whole[1, :4])


def test_global_statistics_are_those_of_what_is_left_and_are_saved(feats_BTM, tmp_path):
    normalize = UtteranceMeanNormalization(norm_type="global")
    lengths = relative_lengths(FRAMES_B, 9)
    normalize(feats_BTM, lengths, epoch=0)
    normalize._save(tmp_path / "n.ckpt")
    other = UtteranceMeanNormalization(norm_type="global")
    other._load(tmp_path / "n.ckpt")
    for module in (normalize, other):
        module.eval()
    torch.testing.assert_close(
        other(feats_BTM, lengths, epoch=9), normalize(feats_BTM, lengths, epoch=9)
    )
    assert normalize(feats_BTM, lengths, epoch=9)[0].mean(0).abs().max() < 0.05


def test_the_mean_can_stay(feats_BTM):
    ours = UtteranceMeanNormalization(remove_mean=False, norm_type="global")
    theirs = InputNormalization(norm_type="global")
    lengths = relative_lengths(FRAMES_B, 9)
    for module in (ours, theirs):
        module(feats_BTM, lengths, epoch=0)
        module.eval()
    assert torch.equal(ours(feats_BTM, lengths, epoch=9), theirs(feats_BTM, lengths, epoch=9))


@pytest.mark.parametrize("width", [100, 420, 800])
def test_the_mean_is_that_of_an_items_own_frames_at_any_length(width):
    # Relative lengths are rounded: near n / width * width a mask may hold one frame too many.
    num_frames_B = torch.arange(50, width + 1)
    feats_BTM = torch.full((len(num_frames_B), width, 1), -40.0)
    feats_BTM[torch.arange(width) >= num_frames_B[:, None]] = 1e4
    centred = remove_utterance_mean(feats_BTM, relative_lengths(num_frames_B, width))
    assert centred.abs().max() < 1e-4


@pytest.mark.parametrize("cls", [InputNormalization, UtteranceMeanNormalization])
def test_counted_by_the_host_the_statistics_are_the_same(cls, feats_BTM):
    lengths = relative_lengths(FRAMES_B, 9)
    theirs, ours = cls(norm_type="global"), cls(norm_type="global")
    statistics = CountedStatistics(ours)
    for batch in range(3):
        wanted = theirs(feats_BTM + batch, lengths, epoch=0)
        statistics.num_frames = int(FRAMES_B.sum())
        found = ours(feats_BTM + batch, lengths, epoch=0)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(ours._statistics_dict(), theirs._statistics_dict())


@pytest.mark.parametrize("counted", [False, True])
def test_a_spoilt_batch_of_a_coarse_type_rounds_no_statistics(feats_BTM, counted):
    lengths = relative_lengths(FRAMES_B, 9)
    normalize = InputNormalization(norm_type="global")
    learning = CountedStatistics(normalize) if counted else FiniteStatistics(normalize)
    learning.num_frames = int(FRAMES_B.sum())
    normalize(feats_BTM, lengths, epoch=0)
    before = normalize._statistics_dict()
    normalize(torch.full_like(feats_BTM, torch.inf).bfloat16(), lengths, epoch=0)
    after = normalize._statistics_dict()
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    normalize(feats_BTM.bfloat16(), lengths, epoch=0)
    assert normalize.glob_mean.dtype == normalize.glob_std.dtype == torch.float32


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("spoilt", [0, 1])
def test_a_batch_that_is_not_finite_changes_no_statistics(feats_BTM, counted, spoilt, tmp_path):
    lengths = relative_lengths(FRAMES_B, 9)
    whole, normalize = (InputNormalization(norm_type="global") for _ in range(2))
    learning = CountedStatistics(normalize) if counted else FiniteStatistics(normalize)
    learning.num_frames = int(FRAMES_B.sum())
    for batch in range(3):
        if batch == spoilt:
            bad_BTM = feats_BTM.clone()
            bad_BTM[1, 2, 3] = torch.inf
            normalize(bad_BTM, lengths, epoch=0)
        else:
            wanted = whole(feats_BTM + batch, lengths, epoch=0)
            torch.testing.assert_close(normalize(feats_BTM + batch, lengths, epoch=0), wanted)
    normalize._save(tmp_path / "n.ckpt")
    saved = torch.load(tmp_path / "n.ckpt", weights_only=True)
    assert saved["count"] == 2 * int(FRAMES_B.sum())
    assert isinstance(saved["count"], int)
    torch.testing.assert_close(saved, whole._statistics_dict())
