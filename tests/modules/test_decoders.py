"""Facts that hold for every decoder, through the network that wraps it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modules.lengths import relative_lengths
from tests.modules.networks import (
    VOCABULARY,
    assert_same_gradients,
    gradients,
    padded_batch,
    small_network,
)

BOS = 1
DECODERS = ["transformer", "mamba"]
MEMORY_LENGTHS = [13, 7, 2, 10]
TARGET_LENGTHS = [5, 6, 3, 1]


def network_with(decoder: str, **options):
    return small_network(decoder_module=decoder, num_decoder_layers=2, **options)


def targets(lengths: list[int]) -> torch.Tensor:
    """Tokens that begin with bos and end in padding (0), which is nowhere else."""
    tokens_BU = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in zip(tokens_BU, lengths, strict=True):
        row[:length] = torch.randint(3, VOCABULARY, (length,))
    tokens_BU[:, 0] = BOS
    return tokens_BU


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("decoder", DECODERS)
def test_an_item_in_a_batch_equals_the_item_alone(decoder, training):
    network = network_with(decoder).train(training)
    src, lengths_B = padded_batch(MEMORY_LENGTHS)
    tgt = targets(TARGET_LENGTHS)
    alone = []
    for i, (frames, tokens) in enumerate(zip(MEMORY_LENGTHS, TARGET_LENGTHS, strict=True)):
        alone.append(network(src[i : i + 1, :frames], tgt[i : i + 1, :tokens])[1][0])
        alone[-1].sin().sum().backward()
    wanted_gradients = gradients(network)

    _, out_BUD = network(src, tgt, relative_lengths(lengths_B, src.shape[1]))
    together = [out[:length] for out, length in zip(out_BUD, TARGET_LENGTHS, strict=True)]
    sum(out.sin().sum() for out in together).backward()
    for out, wanted in zip(together, alone, strict=True):
        torch.testing.assert_close(out, wanted, atol=1e-4, rtol=1e-4)
    assert_same_gradients(gradients(network), wanted_gradients)


@pytest.mark.parametrize("decoder", DECODERS)
@torch.no_grad()
def test_a_token_does_not_change_what_comes_before_it(decoder):
    network = network_with(decoder)
    src, _ = padded_batch([9])
    tgt = targets([6])
    other = tgt.clone()
    other[0, 3] = 2
    first, second = network(src, tgt)[1], network(src, other)[1]
    assert torch.equal(first[:, :3], second[:, :3])
    assert not torch.equal(first[:, 3:], second[:, 3:])


@pytest.mark.parametrize("normalize_before", [True, False])
@pytest.mark.parametrize("encoder", ["conmamba", "transformer", "mamba"])
@pytest.mark.parametrize("decoder", DECODERS)
@torch.no_grad()
def test_cached_decoding_equals_the_teacher_forced_forward(decoder, encoder, normalize_before):
    network = network_with(decoder, encoder=encoder, normalize_before=normalize_before)
    src, lengths_B = padded_batch(MEMORY_LENGTHS)
    tgt = targets([6] * 4)
    memory_BTD, wanted = network(src, tgt, relative_lengths(lengths_B, src.shape[1]))
    memory_BTD = memory_BTD.clone()
    memory_BTD[1, 7:] = 1e3
    state, outputs = network.init_decoder_state(memory_BTD, lengths_B), []
    for tokens_B in tgt.unbind(1):
        out_BD, state = network.decode_step(tokens_B, state)
        outputs.append(out_BD)
    torch.testing.assert_close(torch.stack(outputs, 1), wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        network.decode(tgt, memory_BTD, lengths_B)[0], wanted, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("decoder", DECODERS)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
@torch.no_grad()
def test_cached_decoding_follows_reordered_beams(decoder, data):
    network = network_with(decoder)
    src, lengths_B = padded_batch(MEMORY_LENGTHS)
    memory_BTD = network.encode(src, relative_lengths(lengths_B, src.shape[1]))
    beams = data.draw(st.integers(1, 3))
    state = network.init_decoder_state(memory_BTD, lengths_B).repeat(beams)
    utterance_N = torch.arange(4).repeat_interleave(beams)
    prefixes_NU = torch.empty(4 * beams, 0, dtype=torch.long)
    for _ in range(4):
        tokens_N = torch.randint(1, VOCABULARY, (len(utterance_N),))
        prefixes_NU = torch.cat([prefixes_NU, tokens_N[:, None]], dim=1)
        out_ND, state = network.decode_step(tokens_N, state)
        wanted, _ = network.decode(prefixes_NU, memory_BTD[utterance_N], lengths_B[utterance_N])
        torch.testing.assert_close(out_ND, wanted[:, -1], atol=1e-4, rtol=1e-4)

        rows = len(utterance_N)
        order = data.draw(
            st.one_of(
                # As a search does it: among the beams of an utterance, or one utterance finished.
                st.just([row - row % beams for row in range(rows)]),
                st.just(list(range(beams, rows)) or [0]),
                st.lists(st.integers(0, rows - 1), min_size=1, max_size=8),
            )
        )
        index = torch.tensor(order)
        state, prefixes_NU, utterance_N = (
            state.select(index),
            prefixes_NU[index],
            utterance_N[index],
        )


@pytest.mark.parametrize("decoder", DECODERS)
@torch.no_grad()
def test_a_state_can_be_used_again(decoder):
    network = network_with(decoder)
    src, _ = padded_batch([9, 9])
    state = network.init_decoder_state(network.encode(src))
    _, state = network.decode_step(torch.tensor([BOS, BOS]), state)
    first, _ = network.decode_step(torch.tensor([3, 4]), state)
    network.decode_step(torch.tensor([5, 6]), state.select(torch.tensor([1, 0])))
    again, _ = network.decode_step(torch.tensor([3, 4]), state)
    assert torch.equal(first, again)


@pytest.mark.parametrize("decoder", DECODERS)
@torch.no_grad()
def test_cached_bfloat16_is_as_exact_as_the_uncached(decoder):
    network = network_with(decoder)
    src, lengths_B = padded_batch(MEMORY_LENGTHS)
    tgt = targets([12] * 4)
    memory_BTD = network.encode(src, relative_lengths(lengths_B, src.shape[1]))
    exact, _ = network.decode(tgt, memory_BTD, lengths_B)
    with torch.autocast("cpu", torch.bfloat16):
        uncached, _ = network.decode(tgt, memory_BTD, lengths_B)
        state, outputs = network.init_decoder_state(memory_BTD, lengths_B), []
        for tokens_B in tgt.unbind(1):
            out_BD, state = network.decode_step(tokens_B, state)
            outputs.append(out_BD)
    cached = torch.stack(outputs, 1)
    assert (cached - exact).norm() <= 2 * (uncached - exact).norm()


@torch.no_grad()
def test_mamba_decoder_state_does_not_depend_on_audio_or_prefix():
    network = network_with("mamba")

    def elements(state) -> int:
        mixers = (*state.layers.self_mambas, *state.layers.cross_mambas)
        return sum(mixer.conv.numel() + mixer.ssm.numel() for mixer in mixers)

    sizes = set()
    for frames in (3, 50):
        state = network.init_decoder_state(torch.randn(1, frames, 16))
        for token in range(1, 9):
            _, state = network.decode_step(torch.tensor([token]), state)
            sizes.add(elements(state))
    assert len(sizes) == 1


@torch.no_grad()
def test_beams_share_the_keys_and_values_of_their_memory():
    network = network_with("transformer")
    state = network.init_decoder_state(torch.randn(2, 30, 16)).repeat(5)
    _, state = network.decode_step(torch.full((10,), BOS), state)
    state = state.select(torch.tensor([4, 0, 0, 1, 2, 9, 9, 9, 5, 6]))
    assert state.layers.cross.keys[0].shape[0] == 2
    finished = state.select(torch.arange(5, 10))
    assert finished.layers.cross.keys[0].shape[0] == 1


@torch.no_grad()
def test_the_attention_of_a_step_is_that_of_the_teacher_forced_forward():
    network = network_with("transformer")
    src, lengths_B = padded_batch(MEMORY_LENGTHS)
    memory_BTD = network.encode(src, relative_lengths(lengths_B, src.shape[1]))
    state = network.init_decoder_state(memory_BTD, lengths_B).repeat(2)
    prefix_NU = torch.tensor([[BOS, 3], [BOS, 4]]).repeat(4, 1)
    for tokens_N in prefix_NU.unbind(1):
        _, state = network.decode_step(tokens_N, state)
    rows_N = torch.arange(4).repeat_interleave(2)
    _, wanted_BUT = network.decode(prefix_NU, memory_BTD[rows_N], lengths_B[rows_N])
    torch.testing.assert_close(state.layers.attention_BT, wanted_BUT[:, -1], atol=1e-5, rtol=1e-4)


def test_a_decoder_that_is_not_there_is_named():
    network = small_network()
    src, _ = padded_batch([9])
    encoder_out, decoder_out = network(src, None)
    assert decoder_out is None
    for call in (
        lambda: network(src, targets([3])),
        lambda: network.decode(targets([3]), encoder_out),
        lambda: network.init_decoder_state(encoder_out),
    ):
        with pytest.raises(ValueError, match="num_decoder_layers"):
            call()
