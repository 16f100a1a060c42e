"""Self-conditioned encoders: the definition, and the same numbers in any batch, piece or stream."""

import pytest
import torch
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig
from torch import nn

from tests.modules.networks import INPUT_SIZE, VOCABULARY, padded_batch, small_network

ENCODERS = ["conmamba", "mamba", "conformer"]


def conditioned(encoder: str, **options):
    """A network of three layers; the two inner ones tell those above something."""
    options = {"num_encoder_layers": 3, "inter_ctc_layers": [1, 2], **options}
    network = small_network(encoder, self_conditioning=True, **options)
    nn.init.normal_(network.encoder.conditioning.feedback.weight)
    return network


@pytest.mark.parametrize("encoder", ENCODERS)
def test_at_first_the_encoder_is_the_one_without(encoder):
    plain = small_network(encoder, num_encoder_layers=3)
    told = small_network(
        encoder, num_encoder_layers=3, inter_ctc_layers=[1, 2], self_conditioning=True
    )
    told.load_state_dict(plain.state_dict(), strict=False)
    src = torch.randn(2, 9, INPUT_SIZE)
    torch.testing.assert_close(told.encode(src), plain.encode(src), rtol=0, atol=0)


def test_inner_layers_alone_change_no_parameter():
    plain, trained = small_network(), small_network(inter_ctc_layers=[1])
    assert plain.state_dict().keys() == trained.state_dict().keys()


def test_each_inner_layer_adds_what_it_takes_for_said():
    network = conditioned("mamba")
    encoder, told = network.encoder, network.encoder.conditioning
    src = torch.randn(1, 7, INPUT_SIZE)
    x_BTD, wanted = network.custom_src_module(src), []
    for layer in encoder.layers[:2]:
        x_BTD = x_BTD + layer.mamba(layer.norm1(x_BTD))
        x_BTD = x_BTD + layer.pos_ffn(layer.norm2(x_BTD))
        normed_BTD = encoder.norm(x_BTD)
        wanted.append(normed_BTD)
        logits_BTV = normed_BTD @ told.ctc_lin.weight.T + told.ctc_lin.bias
        probs_BTV = logits_BTV.exp() / logits_BTV.exp().sum(-1, keepdim=True)
        x_BTD = x_BTD + probs_BTV @ told.feedback.weight.T + told.feedback.bias
    _, inner = network.encode(src, intermediate_layers=[1, 2])
    torch.testing.assert_close(inner, wanted, rtol=0, atol=1e-5)
    x_BTD = x_BTD + encoder.layers[2].mamba(encoder.layers[2].norm1(x_BTD))
    x_BTD = x_BTD + encoder.layers[2].pos_ffn(encoder.layers[2].norm2(x_BTD))
    torch.testing.assert_close(network.encode(src), encoder.norm(x_BTD), rtol=0, atol=1e-5)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_an_item_in_a_batch_equals_the_item_alone(encoder):
    network = conditioned(encoder)
    src, lengths_B = padded_batch([13, 8, 1])
    together = network.encode(src, lengths_B)
    for row, length in enumerate(lengths_B.tolist()):
        alone = network.encode(src[row : row + 1, :length])
        torch.testing.assert_close(together[row, :length], alone[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("encoder", ENCODERS[:2])
@pytest.mark.parametrize("piece_frames", [1, 4, 50])
def test_in_pieces_equals_at_once(encoder, piece_frames):
    network = conditioned(encoder)
    src = torch.randn(1, 23, INPUT_SIZE)
    pieces = network.encode_in_pieces(network.embed_source(src), piece_frames)
    torch.testing.assert_close(pieces, network.encode(src), rtol=0, atol=1e-4)


@pytest.mark.parametrize("encoder", ENCODERS)
@torch.no_grad()
def test_a_stream_equals_the_offline_network_with_its_chunks(encoder):
    network, chunks = conditioned(encoder), DynChunkTrainConfig(4, 2)
    src = torch.randn(2, 22, INPUT_SIZE)
    context = network.make_streaming_context(chunks)
    outputs = [
        network.encode_streaming(piece, context, final=i == 3)
        for i, piece in enumerate(src.split([5, 1, 13, 3], dim=1))
    ]
    wanted = network.encode(src, dynchunktrain_config=chunks)
    torch.testing.assert_close(torch.cat(outputs, 1), wanted, rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_causal_stream_equals_the_offline_network():
    network = conditioned("conmamba", causal=True)
    src = torch.randn(2, 12, INPUT_SIZE)
    context = network.make_streaming_context()
    outputs = [network.encode_streaming(x, context) for x in src.split([3, 1, 8], dim=1)]
    torch.testing.assert_close(torch.cat(outputs, 1), network.encode(src), rtol=0, atol=1e-4)


def test_forward_gives_inner_outputs_where_they_are_wanted():
    network = conditioned("conmamba", num_decoder_layers=1)
    src, tgt = torch.randn(2, 9, INPUT_SIZE), torch.tensor([[1, 5], [1, 7]])
    (encoder_out, inner), decoder_out = network(src, tgt, intermediate_layers=[2])
    plain_out, plain_decoder_out = network(src, tgt)
    assert [x.shape for x in inner] == [encoder_out.shape]
    torch.testing.assert_close(encoder_out, plain_out, rtol=0, atol=0)
    torch.testing.assert_close(decoder_out, plain_decoder_out, rtol=0, atol=0)
    assert network.encoder.conditioning.ctc_lin.out_features == VOCABULARY


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inter_ctc_layers": [2]}, r"inter_ctc_layers holds \[2\]; of 2 layers"),
        ({"inter_ctc_layers": [0]}, r"inter_ctc_layers holds \[0\]"),
        ({"self_conditioning": True}, r"self_conditioning needs inter_ctc_layers"),
    ],
)
def test_layers_that_are_none_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        small_network(**options)
