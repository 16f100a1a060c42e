"""Streamed in any cutting equals offline with the same mask."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig

from modules.frontend import ConvolutionFrontEnd
from tests.modules.networks import INPUT_SIZE, small_network

CUTTINGS = st.lists(st.integers(0, 11), min_size=1, max_size=6)
CHUNKED = ["conformer", "conformer-rope", "conmamba", "conmamba-sine", "mamba"]
CAUSAL = ["conmamba", "conmamba-sine", "mamba"]


def streamed(network, src, pieces, chunks) -> torch.Tensor:
    context = network.make_streaming_context(chunks)
    cuts = src.split(pieces, dim=1)
    last = len(cuts) - 1
    outputs = [network.encode_streaming(x, context, final=i == last) for i, x in enumerate(cuts)]
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("encoder", CHUNKED)
@settings(max_examples=10, deadline=None)
@given(pieces=CUTTINGS, chunk_size=st.integers(1, 9), left_chunks=st.integers(0, 3))
@torch.no_grad()
def test_chunked_stream_equals_chunked_offline(encoder, pieces, chunk_size, left_chunks):
    network = small_network(encoder)
    chunks = DynChunkTrainConfig(chunk_size, left_chunks)
    src = torch.randn(2, sum(pieces) + 1, INPUT_SIZE)
    actual = streamed(network, src, [*pieces, 1], chunks)
    wanted = network.encode(src, dynchunktrain_config=chunks)
    torch.testing.assert_close(actual, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("encoder", CAUSAL)
@settings(max_examples=10, deadline=None)
@given(pieces=CUTTINGS)
@torch.no_grad()
def test_causal_stream_equals_offline_and_gives_a_frame_for_a_frame(encoder, pieces):
    network = small_network(encoder, causal=True)
    pieces = [*pieces, 1]
    src = torch.randn(2, sum(pieces), INPUT_SIZE)
    context = network.make_streaming_context()
    outputs = [network.encode_streaming(piece, context) for piece in src.split(pieces, dim=1)]
    assert [out.shape[1] for out in outputs] == pieces
    torch.testing.assert_close(torch.cat(outputs, 1), network.encode(src), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_front_end_and_network_stream_together():
    torch.manual_seed(1)
    front_end = ConvolutionFrontEnd((1, 10, 12), out_channels=(6, 4), padding="causal").eval()
    network = small_network("conmamba", causal=True)
    feats_BTM = torch.randn(1, 61, 12)
    context, state, outputs = network.make_streaming_context(), None, []
    for piece in feats_BTM.split([5, 1, 30, 2, 23], dim=1):
        frames, state = front_end.forward_streaming(piece, state)
        outputs.append(network.encode_streaming(frames, context))
    wanted = network.encode(front_end(feats_BTM))
    torch.testing.assert_close(torch.cat(outputs, 1), wanted, atol=1e-4, rtol=1e-4)


def state_elements(state) -> int:
    """Numbers in all tensors of a nested state."""
    if isinstance(state, torch.Tensor):
        return state.numel()
    if isinstance(state, list | tuple):
        return sum(map(state_elements, state))
    return sum(map(state_elements, vars(state).values())) if hasattr(state, "__dict__") else 0


@pytest.mark.parametrize("encoder", [*CHUNKED, *CAUSAL])
@torch.no_grad()
def test_stream_state_does_not_grow(encoder):
    causal = encoder in CAUSAL
    network = small_network(encoder, causal=causal)
    context = network.make_streaming_context(None if causal else DynChunkTrainConfig(4, 2))
    sizes = []
    for _ in range(12):
        network.encode_streaming(torch.randn(1, 4, INPUT_SIZE), context)
        sizes.append(state_elements(context))
    assert sizes[-1] > 0
    assert len(set(sizes[4:])) == 1


def test_streams_that_cannot_be_say_what_can():
    chunks = DynChunkTrainConfig(4, 2)
    with pytest.raises(ValueError, match=r"cannot stream.*conformer, conmamba, mamba"):
        small_network("transformer").make_streaming_context(chunks)
    with pytest.raises(ValueError, match="takes no chunks"):
        small_network("mamba", causal=True).make_streaming_context(chunks)
    for encoder in ("conmamba", "mamba"):
        with pytest.raises(ValueError, match="DynChunkTrainConfig"):
            small_network(encoder).make_streaming_context()
    with pytest.raises(ValueError, match="finite left context"):
        small_network("conformer").make_streaming_context(DynChunkTrainConfig(4))
    with pytest.raises(ValueError, match="constant memory"):
        small_network("conformer", causal=True).make_streaming_context()


def test_a_finished_stream_takes_no_more_frames():
    network = small_network("mamba", causal=True)
    context = network.make_streaming_context()
    network.encode_streaming(torch.randn(1, 3, INPUT_SIZE), context, final=True)
    with pytest.raises(ValueError, match="new streaming context"):
        network.encode_streaming(torch.randn(1, 3, INPUT_SIZE), context)
