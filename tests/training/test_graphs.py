"""Steps that are captured for a few shapes train as steps that are not."""

import json
from types import SimpleNamespace

import pytest
import torch

import train_CTC
import train_S2S
from common.errors import UserError
from modules.frontend import ConvolutionFrontEnd
from tests.ctc_runs import CONMAMBA, CONMAMBAMAMBA, TINY_S2S, command_line, train
from tests.modules.networks import assert_same_gradients, gradients, padded_batch, small_network
from training.brains import asr_brain
from training.brains.graphs import GraphedEncoder, GraphedFrontEnd, check_graphs
from training.shapes import rounded_up

LENGTHS = [37, 20, 9]


def rerun(work):
    """What stands for a graph where there is no GPU: the work itself, into the same memory."""
    results = work()

    def again():
        for result, new in zip(results, work(), strict=True):
            result.copy_(new)

    return results, again


def step(network, lengths):
    """Valid outputs and gradients of a training step."""
    torch.manual_seed(0)
    x_BTD, lengths_B = padded_batch(lengths)
    out_BTD = network.encode(x_BTD, lengths_B)
    assert out_BTD.shape[:2] == x_BTD.shape[:2]
    valid = [out[:length] for out, length in zip(out_BTD, lengths, strict=True)]
    sum(out.sin().sum() for out in valid).backward()
    found = gradients(network)
    network.zero_grad()
    return [out.detach() for out in valid], found


@pytest.mark.parametrize("encoder", ["conmamba", "mamba"])
def test_padding_to_a_shape_changes_no_output_and_no_gradient(encoder, one_thread):
    network = small_network(encoder).train()
    graphed = GraphedEncoder(network.encoder, 4, rerun)
    plain = [step(network, lengths) for lengths in (LENGTHS, LENGTHS, [19] * 17)]
    network.encoder.forward = graphed
    found = [step(network, lengths) for lengths in (LENGTHS, LENGTHS, [19] * 17)]
    for (outputs, grads), (wanted, wanted_grads) in zip(found, plain, strict=True):
        for output, reference in zip(outputs, wanted, strict=True):
            torch.testing.assert_close(output, reference, rtol=1e-5, atol=1e-5)
        assert_same_gradients(grads, wanted_grads)
    assert list(graphed.calls.steps) == [(3, 40, 16)]


def test_inner_outputs_are_captured_where_training_wants_them(one_thread):
    network = small_network("conmamba", num_encoder_layers=3).train()
    x_BTD, lengths_B = padded_batch([16, 11])

    def passes(layers):
        results = []
        for _ in range(3):
            out_BTD, inner = network.encode(x_BTD, lengths_B, intermediate_layers=layers)
            sum(x[1, :11].sin().sum() for x in (out_BTD, *inner)).backward()
            results += [x.detach().clone() for x in (out_BTD, *inner)]
            results += [grad.clone() for grad in gradients(network).values()]
            network.zero_grad()
        return results

    wanted = passes([1, 2])
    graphed = GraphedEncoder(network.encoder, 2, rerun, inner_layers=[1, 2])
    network.encoder.forward = graphed
    for found, reference in zip(passes([1, 2]), wanted, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-5, atol=1e-5)
    assert list(graphed.calls.steps) == [(2, 16, 16)]
    passes([1])
    assert graphed.calls.seen.total() == 3


def test_a_shape_is_captured_when_it_comes_again_and_no_more_than_were_allowed():
    network = small_network("conmamba").train()
    graphed = GraphedEncoder(network.encoder, 2, rerun)
    network.encoder.forward = graphed
    for frames in (16, 18, 16, 20, 18, 20, 20):
        step(network, [frames, 5])
    assert list(graphed.calls.steps) == [(2, 16, 16), (2, 18, 16)]


def test_a_front_end_in_graphs_is_the_front_end(one_thread):
    torch.manual_seed(0)
    front_end = ConvolutionFrontEnd((None, None, 20), out_channels=(4, 4), dropout=0.0).train()
    batches = [(torch.randn(2, 33, 20), torch.tensor([33, 7])) for _ in range(3)]

    def pass_through():
        results = []
        for feats_BTM, num_frames_B in batches:
            out = front_end(feats_BTM, num_frames_B)
            out.sin().sum().backward()
            results += [out.detach().clone(), *(p.grad.clone() for p in front_end.parameters())]
            front_end.zero_grad()
        return results

    wanted = pass_through()
    front_end.forward = GraphedFrontEnd(front_end, 2, rerun)
    for found, reference in zip(pass_through(), wanted, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-5, atol=1e-5)
    assert list(front_end.forward.calls.steps) == [(2, 36, 20)]


def test_graphs_leave_what_autograd_keeps_of_the_weights_alone(one_thread):
    network = small_network("conmamba").train()
    network.encoder.forward = GraphedEncoder(network.encoder, 1, rerun)
    weight, touched = network.encoder.layers[0].mamba.in_proj.weight, []
    weight.register_hook(touched.append)
    for _ in range(3):
        step(network, [16, 5])
    # By the first step alone, which no graph has taken over yet.
    assert len(touched) == 1


def test_gradients_of_several_batches_add_up_whichever_way_they_went(one_thread):
    lengths = ([16, 5], [16, 5], [18], [16, 5], [17, 3])
    gathered = []
    for graphs in (0, 1):
        network = small_network("conmamba").train()
        if graphs:
            network.encoder.forward = GraphedEncoder(network.encoder, graphs, rerun)
        for optimizer_step in range(2):
            for item in lengths:
                torch.manual_seed(optimizer_step)
                x_BTD, lengths_B = padded_batch(item)
                network.encode(x_BTD, lengths_B)[0].sin().sum().backward()
            gathered.append({name: grad.clone() for name, grad in gradients(network).items()})
            network.zero_grad()
    assert_same_gradients(gathered[2], gathered[0])
    assert_same_gradients(gathered[3], gathered[1])


def test_evaluation_and_inner_outputs_go_the_plain_way():
    network = small_network("conmamba")
    graphed = GraphedEncoder(network.encoder, 2, rerun)
    network.encoder.forward = graphed
    x_BTD, lengths_B = padded_batch(LENGTHS)
    network.eval().encode(x_BTD, lengths_B)
    network.train().encode(x_BTD, lengths_B, intermediate_layers=[1])
    with torch.no_grad():
        network.encode(x_BTD, lengths_B)
    assert not graphed.calls.seen


def test_shapes_are_few_and_little_is_padded():
    counts = range(1, 3001)
    for per_octave in (8, 16):
        rounded = [rounded_up(count, per_octave) for count in counts]
        most = 1 + 1 / per_octave
        assert all(count <= up <= most * count for count, up in zip(counts, rounded, strict=True))
        assert len(set(rounded)) <= 2 * per_octave + per_octave * 8


@pytest.mark.parametrize(("recipe", "keys"), [("CTC", {}), ("S2S", TINY_S2S)], ids=["CTC", "S2S"])
def test_the_losses_of_twenty_steps_are_those_without(
    recipe, keys, tone_corpus, tmp_path, monkeypatch, one_thread
):
    main, yaml_file = {
        "CTC": (train_CTC.main, CONMAMBA),
        "S2S": (train_S2S.main, CONMAMBAMAMBA),
    }[recipe]
    keys = keys | {
        "number_of_epochs": 4,
        "dynamic_batching": False,
        "batch_size": 1,
        "transformer_dropout": 0.0,
        "grad_accumulation_factor": 2,
        "test_splits": "[]",
    }
    captured = []

    def recorder():
        captured.append([])

        def record(work, own=captured[-1]):
            own.append(work)
            return rerun(work)

        return record

    monkeypatch.setattr(asr_brain, "check_graphs", lambda *arguments: None)
    monkeypatch.setattr(asr_brain, "CudaRecorder", recorder)
    losses = {}
    for graphs in (0, 3):
        folder = tmp_path / str(graphs)
        arguments = command_line(tone_corpus, folder, yaml_file, **keys, cuda_graphs=graphs)
        assert train(arguments, main) == 0
        entries = map(json.loads, (folder / "metrics.jsonl").read_text("utf-8").splitlines())
        losses[graphs] = [entry["train_loss"] for entry in entries if "train_loss" in entry]
    assert len(losses[0]) == 20
    torch.testing.assert_close(losses[3], losses[0], rtol=1e-5, atol=1e-5)
    # The front end's graphs may not use memory that is the encoder's meanwhile.
    assert len(captured) == 2
    assert all(0 < len(own) <= 3 * 2 for own in captured)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "cpu"}, "needs CUDA"),
        ({"encoder_module": "conformer"}, "encoders that attend"),
        ({"distributed": True}, "several processes"),
        ({"compile": True}, "--compile"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing"),
        ({"layerdrop_prob": 0.1}, "layerdrop_prob"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, reason, monkeypatch):
    asked = {
        "device": "cuda",
        "compile": False,
        "encoder_module": "conmamba",
        "gradient_checkpointing": False,
        "layerdrop_prob": 0.0,
    } | changes
    encoder = SimpleNamespace(layerdrop_prob=asked.pop("layerdrop_prob"))
    distributed = asked.pop("distributed", False)
    monkeypatch.setattr("training.brains.graphs.is_distributed_initialized", lambda: distributed)
    hparams = SimpleNamespace(cuda_graphs=8, Transformer=SimpleNamespace(encoder=encoder), **asked)
    with pytest.raises(UserError, match=f"cuda_graphs is 8, but .*{reason}"):
        check_graphs(hparams, hparams)
