import pytest
import torch

from modules.features import Fbank
from modules.frontend import ConvolutionFrontEnd
from modules.lengths import (
    absolute_lengths,
    num_feature_frames,
    num_frames,
    padding_mask,
    relative_lengths,
)


@pytest.mark.parametrize("num_samples", [1, 159, 160, 161, 480, 640, 800, 8000, 16001])
def test_counts_are_what_filterbank_and_front_end_make(num_samples):
    feats_BTM = Fbank(n_mels=8)(torch.randn(1, num_samples))
    assert feats_BTM.shape[1] == num_feature_frames(num_samples)
    assert ConvolutionFrontEnd((1, 10, 8))(feats_BTM).shape[1] == num_frames(num_samples)


def test_counts_of_a_tensor_are_those_of_its_integers():
    counts = [0, 159, 160, 16000, 16001, 57599]
    assert num_frames(torch.tensor(counts)).tolist() == [num_frames(count) for count in counts]


@pytest.mark.parametrize("longest", [1, 3, 7, 49, 1999, 90001])
def test_relative_lengths_round_back_to_the_counts(longest):
    lengths_B = torch.arange(longest + 1)
    assert torch.equal(absolute_lengths(relative_lengths(lengths_B, longest), longest), lengths_B)


def test_padding_mask_is_true_behind_the_length():
    assert padding_mask(torch.tensor([2, 0, 3]), 3).tolist() == [
        [False, False, True],
        [True, True, True],
        [False, False, False],
    ]


def test_errors_name_what_came():
    with pytest.raises(ValueError, match="float32"):
        num_frames(torch.tensor([0.5]))
    with pytest.raises(ValueError, match="-1"):
        num_frames(-1)
    with pytest.raises(ValueError, match=r"between 0\.5 and 12"):
        absolute_lengths(torch.tensor([0.5, 12.0]), 12)
