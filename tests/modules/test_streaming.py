"""Streamed in any cutting equals offline with the same mask."""

import dataclasses
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig
from torch import nn

from modules.overlapping_chunks import ChunkConfig
from modules.TransformerASR import TransformerASR
from tests.modules.networks import INPUT_SIZE, small_network

CUTTINGS = st.lists(st.integers(0, 11), min_size=1, max_size=6)
# Behind the slash: the share of a chunk that the next one begins with.
LOOKAHEAD = ["conmamba/0.3", "conmamba-causal-convolution/0.5", "mamba/0.5"]
CHUNKED = ["conformer", "conformer-rope", "conmamba", "conmamba-sine", "mamba", *LOOKAHEAD]
CAUSAL = ["conmamba", "conmamba-sine", "mamba"]


def network_of(encoder: str, **options) -> TransformerASR:
    return small_network(encoder.partition("/")[0], **options)


def chunks_of(encoder: str, chunk_size: int = 4, left_chunks: int = 2) -> ChunkConfig:
    return ChunkConfig(chunk_size, left_chunks, float(encoder.partition("/")[2] or 0))


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
    network, chunks = network_of(encoder), chunks_of(encoder, chunk_size, left_chunks)
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


@pytest.mark.parametrize("encoder", [*CHUNKED, *CAUSAL])
@torch.no_grad()
def test_stream_state_does_not_grow(encoder):
    causal = encoder in CAUSAL
    network = network_of(encoder, causal=causal)
    chunks = None if causal else chunks_of(encoder)
    state = network.initial_state(1, chunks)
    shapes = [x.shape for x in state.tensors()]
    for _ in range(12):
        _, state = network.encode_chunk(torch.randn(1, 4, INPUT_SIZE), state, chunks=chunks)
        assert [x.shape for x in state.tensors()] == shapes


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


@pytest.mark.parametrize("encoder", CHUNKED)
@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4), seed=st.integers(0, 99))
@torch.no_grad()
def test_streams_of_a_batch_start_pause_and_end_as_they_like(encoder, lengths, seed):
    network, chunks = network_of(encoder), chunks_of(encoder)
    draw = random.Random(seed)
    sources = [torch.randn(1, length, INPUT_SIZE) for length in lengths]
    state = network.initial_state(len(lengths), chunks)
    outputs, done = [[] for _ in lengths], [0] * len(lengths)
    while done != lengths:
        counts = [
            min(chunks.chunk_size, length - at) * draw.choice([0, 1])
            for length, at in zip(lengths, done, strict=True)
        ]
        # What stands in held rows and behind the end of others is not read.
        src = torch.full((len(lengths), chunks.chunk_size, INPUT_SIZE), 1e3)
        step = network.step_frames(chunks)
        for row, (source, at, count) in enumerate(zip(sources, done, counts, strict=True)):
            src[row, :count] = source[0, at : at + count]
        held = [x.clone() for x in state.tensors()]
        out, state = network.encode_chunk(src, state, torch.tensor(counts), chunks)
        for row, count in enumerate(counts):
            outputs[row].append(out[row, : min(count, step)])
            if not count:
                pairs = zip(held, state.tensors(), strict=True)
                assert all(torch.equal(before[row], after[row]) for before, after in pairs)
        done = [at + min(count, step) for at, count in zip(done, counts, strict=True)]
        assert state.num_frames_B.tolist() == done
    for source, pieces in zip(sources, outputs, strict=True):
        wanted = network.encode(source, dynchunktrain_config=chunks)[0]
        torch.testing.assert_close(torch.cat(pieces), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("encoder", CHUNKED)
@torch.no_grad()
def test_rows_are_selected_reset_held_and_put(encoder):
    network, chunks = network_of(encoder), chunks_of(encoder)
    initial = network.initial_state(3, chunks)
    src, step = torch.randn(3, 4, INPUT_SIZE), network.step_frames(chunks)
    _, state = network.encode_chunk(src, initial, chunks=chunks)

    def outputs(state):
        return network.encode_chunk(src[: state.batch_size], state, chunks=chunks)[0]

    rows = torch.tensor([2, 0])
    wanted = network.encode_chunk(src[:2], state.select(rows), chunks=chunks)[0]
    alone = [
        network.encode_chunk(src[i : i + 1], state.select(rows[i : i + 1]), chunks=chunks)[0]
        for i in range(2)
    ]
    torch.testing.assert_close(wanted, torch.cat(alone), atol=1e-5, rtol=1e-5)
    assert state.repeat(2).num_frames_B.tolist() == [step] * 6

    mask = torch.tensor([False, True, False])
    anew = outputs(state.reset(mask))
    torch.testing.assert_close(anew[1], outputs(initial)[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(anew[::2], outputs(state)[::2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs(initial.hold(~mask, state))[1], outputs(state)[1])

    pool = initial.enlarged(2)
    pool.put(torch.tensor([4, 1]), state.select(rows))
    torch.testing.assert_close(outputs(pool.select(torch.tensor([4, 1, 0])))[:2], wanted)
    assert pool.num_frames_B.tolist() == [0, step, 0, 0, step]


@pytest.mark.parametrize("encoder", CHUNKED)
@torch.no_grad()
def test_a_state_goes_through_bytes_and_those_of_others_are_refused(encoder):
    network, chunks = network_of(encoder), chunks_of(encoder)
    src = torch.randn(2, 4, INPUT_SIZE)
    _, state = network.encode_chunk(src, network.initial_state(2, chunks), chunks=chunks)
    again = network.initial_state(1, chunks).from_bytes(state.to_bytes())
    pairs = zip(state.tensors(), again.tensors(), strict=True)
    assert all(torch.equal(before, after) for before, after in pairs)
    other = network_of(encoder, d_model=24).initial_state(1, chunks)
    with pytest.raises(ValueError, match="another model"):
        other.from_bytes(state.to_bytes())
    for data in (b"", b"nonsense", state.to_bytes()[:-8]):
        with pytest.raises(ValueError, match="no state of streams"):
            again.from_bytes(data)
    newer = state.to_bytes().replace(b'"format":"1"', b'"format":"2"')
    with pytest.raises(ValueError, match="format '2'"):
        again.from_bytes(newer)


@pytest.mark.parametrize("encoder", ["conformer", "conmamba", "mamba", LOOKAHEAD[0]])
@torch.no_grad()
def test_a_step_can_be_exported(encoder):
    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network_of(encoder)

        def forward(self, src, state):
            return self.network.encode_chunk(src, state, chunks=chunks)

    step, src, chunks = Step(), torch.randn(3, 4, INPUT_SIZE), chunks_of(encoder)
    state = step.network.initial_state(3, chunks)
    any_rows = {0: torch.export.Dim.AUTO}

    def shapes_of(part):
        if isinstance(part, torch.Tensor):
            return any_rows
        if isinstance(part, tuple):
            return tuple(map(shapes_of, part))
        return [shapes_of(getattr(part, field.name)) for field in dataclasses.fields(part)]

    shapes = {"src": any_rows, "state": shapes_of(state)}
    exported = torch.export.export(step, (src, state), dynamic_shapes=shapes).module()
    for rows in (3, 5):
        src, state = torch.randn(rows, 4, INPUT_SIZE), step.network.initial_state(rows, chunks)
        for _ in range(3):
            wanted, next_state = step(src, state)
            actual, state = exported(src, state)
            torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(state.num_frames_B, next_state.num_frames_B)
