"""Facts that hold for every encoder, through the network that wraps it."""

import random

import pytest
import torch
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig

from modules.lengths import relative_lengths
from tests.modules.networks import (
    CAUSAL_ENCODERS,
    ENCODER_OPTIONS,
    INPUT_SIZE,
    assert_same_gradients,
    gradients,
    padded_batch,
    small_network,
)

LENGTHS = [19, 11, 8, 3, 1]
CHUNKS = DynChunkTrainConfig(chunk_size=4, left_context_size=1)

ENCODINGS = [
    *((name, False, None) for name in ENCODER_OPTIONS),
    *((name, True, None) for name in CAUSAL_ENCODERS),
    *((name, False, CHUNKS) for name in CAUSAL_ENCODERS),
]


def encoding_id(value) -> str | None:
    if isinstance(value, DynChunkTrainConfig):
        return "chunks"
    return None if value is not None else "whole"


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("encoder", "causal", "chunks"), ENCODINGS, ids=encoding_id)
def test_an_item_in_a_batch_equals_the_item_alone(encoder, causal, chunks, training):
    network = small_network(encoder, causal=causal).train(training)
    src, lengths_B = padded_batch(LENGTHS)
    alone = []
    for row, length in zip(src, LENGTHS, strict=True):
        alone.append(network.encode(row[None, :length], dynchunktrain_config=chunks)[0])
        alone[-1].sin().sum().backward()
    wanted_gradients = gradients(network)

    wav_len = relative_lengths(lengths_B, src.shape[1])
    out_BTD = network.encode(src, wav_len, dynchunktrain_config=chunks)
    together = [out[:length] for out, length in zip(out_BTD, LENGTHS, strict=True)]
    sum(out.sin().sum() for out in together).backward()

    for out, wanted in zip(together, alone, strict=True):
        torch.testing.assert_close(out, wanted, atol=1e-4, rtol=1e-4)
    assert_same_gradients(gradients(network), wanted_gradients)


@pytest.mark.parametrize("encoder", ENCODER_OPTIONS)
def test_nan_in_the_padding_reaches_neither_output_nor_gradient(encoder):
    network = small_network(encoder)
    src, lengths_B = padded_batch([9, 4])
    src[1, 4:] = float("nan")
    out_BTD = network.encode(src, relative_lengths(lengths_B, 9))
    (out_BTD[0].sum() + out_BTD[1, :4].sum()).backward()
    assert out_BTD[1, :4].isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients(network).values())


@pytest.mark.parametrize("encoder", CAUSAL_ENCODERS)
def test_a_causal_frame_has_no_gradient_to_later_frames(encoder):
    network = small_network(encoder, causal=True)
    src = torch.randn(2, 17, INPUT_SIZE, requires_grad=True)
    network.encode(src)[:, :9].sin().sum().backward()
    assert not src.grad[:, 9:].any()
    assert src.grad[:, :9].any(dim=-1).all()


@pytest.mark.parametrize("encoder", CAUSAL_ENCODERS)
def test_a_frame_has_no_gradient_behind_its_chunk(encoder):
    network = small_network(encoder)
    src = torch.randn(1, 14, INPUT_SIZE, requires_grad=True)
    network.encode(src, dynchunktrain_config=CHUNKS)[:, 5].sin().sum().backward()
    assert not src.grad[:, 8:].any()
    assert src.grad[:, 7].any()


@pytest.mark.parametrize("encoder", ENCODER_OPTIONS)
def test_an_encoder_that_is_not_causal_sees_the_future(encoder):
    network = small_network(encoder)
    src = torch.randn(1, 17, INPUT_SIZE, requires_grad=True)
    network.encode(src)[:, 0].sin().sum().backward()
    assert src.grad[:, 16].any()


@pytest.mark.parametrize("encoder", ENCODER_OPTIONS)
def test_gradient_checkpointing_changes_no_gradient(encoder):
    src, lengths_B = padded_batch(LENGTHS)
    wav_len = relative_lengths(lengths_B, src.shape[1])
    found = []
    for checkpointing in (False, True):
        network = small_network(encoder, dropout=0.3, gradient_checkpointing=checkpointing)
        torch.manual_seed(5)
        network.train().encode(src, wav_len).sin().sum().backward()
        found.append(gradients(network))
    assert_same_gradients(found[1], found[0])


def saved_bytes(network, src) -> int:
    """Bytes that the forward keeps for its backward, parameters excepted."""
    storages = {p.untyped_storage().data_ptr(): 0 for p in network.parameters()}

    def note(tensor):
        storage = tensor.untyped_storage()
        storages.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = network.encode(src)
    assert out.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("encoder", ["transformer", "conformer", "conmamba", "mamba"])
def test_gradient_checkpointing_keeps_less_for_the_backward(encoder):
    src = torch.randn(2, 40, INPUT_SIZE)
    kept = [
        saved_bytes(small_network(encoder, gradient_checkpointing=checkpointing).train(), src)
        for checkpointing in (False, True)
    ]
    assert kept[1] < 0.5 * kept[0]


@pytest.mark.parametrize("encoder", ENCODER_OPTIONS)
def test_intermediate_layers_are_what_a_shallower_network_gives(encoder):
    deep = small_network(encoder, num_encoder_layers=3)
    shallow = small_network(encoder, num_encoder_layers=1)
    shallow.load_state_dict(deep.state_dict(), strict=False)
    src = torch.randn(1, 9, INPUT_SIZE)
    out_BTD, (first, third) = deep.encode(src, intermediate_layers=[1, 3])
    torch.testing.assert_close(first, shallow.encode(src))
    torch.testing.assert_close(third, out_BTD)
    torch.testing.assert_close(out_BTD, deep.encode(src))


def test_hidden_states_of_all_layers_can_be_asked_for_at_construction():
    network = small_network(output_hidden_states=True)
    out_BTD, hidden = network.encode(torch.randn(1, 9, INPUT_SIZE))
    assert len(hidden) == 2
    torch.testing.assert_close(hidden[-1], out_BTD)


def test_processes_that_draw_layers_alike_leave_out_the_same():
    network = small_network("conmamba", layerdrop_prob=0.5).train()
    src, outputs = torch.randn(1, 9, INPUT_SIZE), []
    for process, seed in ((1, 5), (2, 5), (3, 6)):
        torch.manual_seed(process)
        network.encoder.layer_draw = random.Random(seed)
        outputs.append([network.encode(src) for _ in range(8)])
    torch.testing.assert_close(outputs[0], outputs[1])
    assert any(not torch.equal(a, b) for a, b in zip(outputs[0], outputs[2], strict=True))


@pytest.mark.parametrize("encoder", ["transformer", "conformer", "conmamba", "mamba"])
def test_layerdrop_leaves_layers_out_of_training_alone(encoder):
    network = small_network(encoder, layerdrop_prob=1.0, positional_encoding=None)
    src = torch.randn(1, 9, INPUT_SIZE)
    whole = network.encode(src)
    dropped = network.train().encode(src)
    torch.testing.assert_close(dropped, network.encoder.norm(network.custom_src_module(src)))
    assert not torch.allclose(whole, dropped, atol=0.1)
