import pytest
import torch

from modules.lengths import absolute_lengths, padding_mask, relative_lengths


@pytest.mark.parametrize("longest", [1, 3, 7, 49, 1999, 90001])
def test_relative_lengths_round_back_to_the_counts(longest):
    lengths_B = torch.arange(longest + 1)
    assert torch.equal(absolute_lengths(relative_lengths(lengths_B, longest), longest), lengths_B)


def test_integers_are_counts_already():
    counts_B = torch.tensor([3, 7], dtype=torch.int32)
    assert absolute_lengths(counts_B, 100).tolist() == [3, 7]


def test_padding_mask_is_true_behind_the_length():
    assert padding_mask(torch.tensor([2, 0, 3]), 3).tolist() == [
        [False, False, True],
        [True, True, True],
        [False, False, False],
    ]


def test_an_error_names_what_came():
    with pytest.raises(ValueError, match=r"between 0\.5 and 12"):
        absolute_lengths(torch.tensor([0.5, 12.0]), 12)
