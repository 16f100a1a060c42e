"""Chunks that overlap: what is computed side by side is what is computed one after the other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modules.overlapping_chunks import (
    ChunkConfig,
    OverlappingChunks,
    before_and_after,
    carried,
)
from tests.modules.networks import INPUT_SIZE, assert_same_gradients, gradients, padded_batch
from tests.modules.test_streaming import LOOKAHEAD, chunks_of, network_of, streamed


@pytest.mark.parametrize("encoder", LOOKAHEAD)
def test_gradients_are_those_of_a_stream(encoder):
    network, chunks = network_of(encoder), chunks_of(encoder, 8)
    src = torch.randn(2, 29, INPUT_SIZE, requires_grad=True)
    found = []
    for encoded in (
        network.encode(src, dynchunktrain_config=chunks),
        streamed(network, src, [29], chunks),
    ):
        encoded.pow(3).sum().backward()
        found.append(gradients(network) | {"src": src.grad})
        src.grad = None
    assert found[0]["encoder.layers.0.mamba.A_log"].abs().max() > 0
    assert_same_gradients(*found)


@pytest.mark.parametrize("encoder", LOOKAHEAD)
def test_gradients_of_a_padded_batch_are_those_of_its_items(encoder):
    network, chunks = network_of(encoder), chunks_of(encoder, 8)
    src, lengths_B = padded_batch([29, 3, 16, 12])
    encoded = network.encode(src, lengths_B, dynchunktrain_config=chunks)
    sum(x[:n].pow(3).sum() for x, n in zip(encoded, lengths_B, strict=True)).backward()
    together = gradients(network)
    for x, length in zip(src, lengths_B, strict=True):
        alone = network.encode(x[None, :length], dynchunktrain_config=chunks)
        alone.pow(3).sum().backward()
    assert_same_gradients(together, gradients(network))


@pytest.mark.parametrize("encoder", LOOKAHEAD)
def test_a_frame_sees_the_end_of_its_chunk_and_nothing_behind(encoder):
    network, chunks = network_of(encoder), chunks_of(encoder, 8)
    step = network.step_frames(chunks)
    assert step == (6 if encoder == "conmamba/0.3" else 4)
    src = torch.randn(1, 3 * step + 5, INPUT_SIZE, requires_grad=True)
    encoded = network.encode(src, dynchunktrain_config=chunks)
    for chunk in range(3):
        last = (chunk + 1) * step - 1
        (grad,) = torch.autograd.grad(encoded[0, last].pow(3).sum(), src, retain_graph=True)
        reached = grad[0].abs().amax(1).nonzero().flatten()
        assert reached.min() == 0
        assert reached.max() == chunk * step + chunks.chunk_size - 1


@pytest.mark.parametrize("encoder", LOOKAHEAD)
@torch.no_grad()
def test_an_utterance_within_a_step_is_encoded_as_without_chunks(encoder):
    network, chunks = network_of(encoder), chunks_of(encoder, 8)
    src = torch.randn(2, network.step_frames(chunks), INPUT_SIZE)
    wanted = network.encode(src)
    actual = network.encode(src, dynchunktrain_config=chunks)
    torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("encoder", LOOKAHEAD)
@torch.no_grad()
def test_inner_layers_come_in_utterances(encoder):
    options = {"inter_ctc_layers": [1], "self_conditioning": True}
    network, chunks = network_of(encoder, **options), chunks_of(encoder, 8)
    torch.nn.init.normal_(network.encoder.conditioning.feedback.weight)
    src = torch.randn(2, 21, INPUT_SIZE)
    out, (inner,) = network.encode(src, dynchunktrain_config=chunks, intermediate_layers=[1])
    assert inner.shape == out.shape
    torch.testing.assert_close(streamed(network, src, [9, 12], chunks), out, atol=1e-4, rtol=1e-4)
    one = network_of(encoder, num_encoder_layers=1)
    one.load_state_dict(network.state_dict(), strict=False)
    torch.testing.assert_close(one.encode(src, dynchunktrain_config=chunks), inner)


@settings(deadline=None)
@given(
    frames=st.integers(0, 20),
    step=st.integers(1, 6),
    ahead=st.integers(1, 6),
    length=st.integers(0, 20),
)
def test_chunks_are_cut_and_joined(frames, step, ahead, length):
    overlapping = OverlappingChunks(step, ahead)
    x_BTD = torch.arange(2 * frames, dtype=torch.float).view(2, frames, 1) + 1
    rows_RLD = overlapping.split(x_BTD)
    torch.testing.assert_close(overlapping.join(rows_RLD, frames), x_BTD)
    lengths_B = torch.tensor([frames, min(length, frames)])
    lengths_R = overlapping.lengths(lengths_B, frames)
    count = overlapping.count(frames)
    assert rows_RLD.shape == (2 * count, step + ahead, 1)
    for item in range(2):
        for chunk in range(count):
            row = item * count + chunk
            start = chunk * step
            wanted = x_BTD[item, start : min(start + step + ahead, int(lengths_B[item]))]
            torch.testing.assert_close(rows_RLD[row, : lengths_R[row]], wanted)


@settings(deadline=None)
@given(count=st.integers(1, 9), kept=st.integers(0, 5), step=st.integers(1, 4))
def test_what_stands_before_chunks(count, kept, step):
    before, new = torch.randn(2, kept, 3), torch.randn(2 * count, step, 3)
    rows, last = before_and_after(before, new, None)
    for item in range(2):
        seen = torch.cat([before[item], *new[item * count : (item + 1) * count]])
        for chunk in range(count):
            wanted = seen[chunk * step : chunk * step + kept]
            assert torch.equal(rows[item * count + chunk], wanted)
        assert torch.equal(last[item], seen[len(seen) - kept :])


@settings(deadline=None)
@given(count=st.integers(1, 20))
def test_states_are_carried(count):
    gains, added = torch.rand(2, count, 3), torch.randn(2, count, 3)
    state = torch.randn(2, 3)
    before, after = carried(gains, added, state)
    for chunk in range(count):
        torch.testing.assert_close(before[:, chunk], state)
        state = gains[:, chunk] * state + added[:, chunk]
    torch.testing.assert_close(after, state)


def test_a_share_that_cannot_be_is_refused():
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="lookahead is"):
            ChunkConfig(8, 2, share)


@pytest.mark.parametrize("encoder", ["conmamba", *LOOKAHEAD])
@torch.no_grad()
def test_streams_are_as_many_as_the_rows(encoder):
    network, chunks = network_of(encoder), chunks_of(encoder)
    for rows in (1, 4):
        with pytest.raises(ValueError, match=f"src has {rows} rows, the state 2 streams"):
            network.encode_chunk(
                torch.randn(rows, 4, INPUT_SIZE), network.initial_state(2, chunks), chunks=chunks
            )
    state = network.initial_state(0, chunks)
    out, _ = network.encode_chunk(torch.randn(0, 4, INPUT_SIZE), state, chunks=chunks)
    assert out.shape == (0, network.step_frames(chunks), network.d_model)


def test_a_chunk_always_steps():
    assert network_of("mamba").step_frames(ChunkConfig(8, 2, 1 - 1e-12)) == 1
    assert network_of("mamba").step_frames(ChunkConfig(100, 2, 0.29)) == 71


def test_an_encoder_that_attends_looks_no_further():
    assert network_of("conformer").step_frames(ChunkConfig(8, 2, 0.5)) == 8
