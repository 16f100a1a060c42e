import pytest
import torch
from speechbrain.lobes.models.transformer.Conformer import (
    ConvolutionModule as SpeechBrainConvolutionModule,
)
from speechbrain.nnet.attention import PositionalwiseFeedForward
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig

from modules.convolution import ConvolutionModule, FeedForward

WIDTH = 8


@pytest.mark.parametrize("frames", [1, 4, 12, 13])
@pytest.mark.parametrize(
    ("causal", "chunk_size"), [(False, None), (True, None), (False, 4), (False, 1), (False, 20)]
)
@torch.no_grad()
def test_unpadded_numbers_are_speechbrains(frames, causal, chunk_size):
    theirs = SpeechBrainConvolutionModule(WIDTH, kernel_size=5, causal=causal)
    ours = ConvolutionModule(WIDTH, kernel_size=5, causal=causal)
    ours.load_state_dict(theirs.state_dict())
    chunks = None if chunk_size is None else DynChunkTrainConfig(chunk_size)
    x_BTD = torch.randn(2, frames, WIDTH)
    torch.testing.assert_close(
        ours(x_BTD, dynchunktrain_config=chunks), theirs(x_BTD, dynchunktrain_config=chunks)
    )


@torch.no_grad()
def test_padding_reaches_no_valid_frame_and_comes_out_as_zero():
    module = ConvolutionModule(WIDTH, kernel_size=5)
    x_BTD = torch.randn(1, 9, WIDTH)
    alone = module(x_BTD[:, :6])
    mask_BT1 = (torch.arange(9) >= 6)[None, :, None]
    out_BTD = module(x_BTD, mask_BT1)
    torch.testing.assert_close(out_BTD[:, :6], alone)
    assert not out_BTD[:, 6:].any()


@torch.no_grad()
def test_chunks_change_nothing_in_a_causal_module():
    module = ConvolutionModule(WIDTH, kernel_size=5, causal=True)
    x_BTD = torch.randn(1, 9, WIDTH)
    in_chunks = module(x_BTD, dynchunktrain_config=DynChunkTrainConfig(4))
    torch.testing.assert_close(in_chunks, module(x_BTD), rtol=0, atol=0)


@torch.no_grad()
def test_feed_forward_numbers_are_speechbrains():
    theirs = PositionalwiseFeedForward(24, input_size=WIDTH)
    ours = FeedForward(24, input_size=WIDTH)
    ours.load_state_dict(theirs.state_dict())
    x_BTD = torch.randn(2, 9, WIDTH)
    torch.testing.assert_close(ours(x_BTD), theirs(x_BTD))


def test_an_even_kernel_is_for_causal_modules_alone():
    with pytest.raises(ValueError, match=r"kernel_size is 6; .* needs an odd one"):
        ConvolutionModule(8, kernel_size=6)
    module = ConvolutionModule(8, kernel_size=6, causal=True)
    assert module(torch.randn(1, 9, 8)).shape == (1, 9, 8)
