"""Histories that a decoder cannot trust."""

import pytest
import torch

from training.data.token_noise import replace_tokens

TOKENS_BU = torch.cat([torch.ones(64, 1, dtype=torch.long), torch.full((64, 30), 5)], dim=1)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_about_the_share_is_replaced_by_ordinary_tokens(share):
    torch.manual_seed(0)
    noisy_BU = replace_tokens(TOKENS_BU, share, pad_index=0, num_special=3, vocabulary=100)
    changed = (noisy_BU != TOKENS_BU).float()
    assert changed[:, 1:].mean().item() == pytest.approx(share, abs=0.04)
    assert noisy_BU[:, 1:].min() >= 3
    assert noisy_BU.max() < 100


def test_the_beginning_and_padding_stay():
    torch.manual_seed(0)
    tokens_BU = TOKENS_BU.clone()
    tokens_BU[::2, 20:] = 0
    noisy_BU = replace_tokens(tokens_BU, 1.0, pad_index=0, num_special=6, vocabulary=100)
    assert (noisy_BU[:, 0] == 1).all()
    assert (noisy_BU[::2, 20:] == 0).all()
    assert (noisy_BU[1::2, 1:] != 5).all()
