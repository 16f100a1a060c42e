"""Relative positions with a sign: the paper's numbers, and an attention that has a direction."""

import pytest
import torch
from speechbrain.nnet.attention import RelPosEncXL, RelPosMHAXL
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig

from modules.positions import SignedRelPosEncXL
from tests.modules.networks import INPUT_SIZE, padded_batch, small_network


@pytest.mark.parametrize("frames", [1, 2, 7])
def test_encodings_are_sines_and_cosines_of_the_distance(frames):
    pe_1TD = SignedRelPosEncXL(6).make_pe(frames)
    # From frames - 1 earlier to frames - 1 later; the distance is query less key.
    distance_T1 = torch.arange(frames - 1, -frames, -1.0).unsqueeze(1)
    angles = distance_T1 * torch.tensor([10000 ** (-2 * i / 6) for i in range(3)])
    wanted_TD = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
    torch.testing.assert_close(pe_1TD[0], wanted_TD, rtol=0, atol=1e-6)
    same = RelPosEncXL(6).make_pe(frames)[:, :frames]
    torch.testing.assert_close(pe_1TD[:, :frames], same, rtol=0, atol=0)


@pytest.mark.parametrize("signed", [False, True])
def test_only_with_a_sign_attention_tells_before_from_after(signed):
    torch.manual_seed(3)
    attention = RelPosMHAXL(8, 2).eval()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter)
    positions = (SignedRelPosEncXL if signed else RelPosEncXL)(8).make_pe(5)
    x_BTD = torch.randn(1, 5, 8)
    # The middle frame, with what surrounds it in reverse.
    middle = attention(x_BTD, x_BTD, x_BTD, positions)[0][0, 2]
    x_BTD = x_BTD.flip(1)
    mirrored = attention(x_BTD, x_BTD, x_BTD, positions)[0][0, 2]
    assert torch.allclose(middle, mirrored, atol=1e-5) is not signed


@torch.no_grad()
def test_batches_and_streams_stay_exact():
    network, chunks = small_network("conformer", signed_positions=True), DynChunkTrainConfig(4, 2)
    src, lengths_B = padded_batch([13, 6])
    together = network.encode(src, lengths_B)
    alone = network.encode(src[1:, :6])
    torch.testing.assert_close(together[1, :6], alone[0], rtol=0, atol=1e-4)
    src = torch.randn(1, 13, INPUT_SIZE)
    context = network.make_streaming_context(chunks)
    pieces = src.split([5, 1, 7], dim=1)
    outputs = [network.encode_streaming(x, context, final=i == 2) for i, x in enumerate(pieces)]
    wanted = network.encode(src, dynchunktrain_config=chunks)
    torch.testing.assert_close(torch.cat(outputs, 1), wanted, rtol=0, atol=1e-4)
    plain = small_network("conformer").encode(src)
    assert not torch.allclose(network.encode(src), plain, atol=1e-3)


def test_signs_need_relative_positions():
    with pytest.raises(ValueError, match="attention_type is 'RoPEMHA', set RelPosMHAXL"):
        small_network("conformer-rope", signed_positions=True)
