"""CTC losses of inner layers: their weight, whose output layer they have, and what is refused."""

from types import SimpleNamespace

import pytest
import speechbrain as sb
import torch
from torch import nn

from common.errors import EXIT_USER_ERROR
from inference.bundle import read_bundle, write_bundle
from tests.ctc_runs import command_line, metrics, train
from tests.inference.runs import make_run
from training.brains.asr_brain import ASRBrain, FrontEndOutput
from training.losses.ctc import ctc_loss


def stub(conditioning=None, **hparams):
    """What the two methods read of a Brain."""
    encoder = (
        SimpleNamespace() if conditioning is None else SimpleNamespace(conditioning=conditioning)
    )
    torch.manual_seed(2)
    return SimpleNamespace(
        hparams=SimpleNamespace(
            blank_index=0,
            flat_start_epochs=0,
            inter_ctc_weight=0.25,
            consistency_weight=0.0,
            Transformer=SimpleNamespace(encoder=encoder),
            **hparams,
        ),
        modules=SimpleNamespace(ctc_lin=nn.Linear(4, 5)),
        epoch=1,
        device="cpu",
        note_infeasible=lambda *_: None,
    )


@pytest.mark.parametrize("stage", [sb.Stage.TRAIN, sb.Stage.VALID])
def test_inner_layers_weigh_together_what_the_key_says(stage):
    brain = stub()
    tokens, num_tokens = torch.tensor([[1, 2], [3, 0]]), torch.tensor([2, 1])
    batch = SimpleNamespace(
        tokens=SimpleNamespace(data=tokens), num_tokens=num_tokens, id=["a", "b"]
    )
    frames = torch.tensor([7, 6])
    outputs = [torch.randn(2, 7, 5).log_softmax(-1) for _ in range(3)]
    loss = ASRBrain.ctc_objective(
        brain, outputs, FrontEndOutput(None, frames, [7, 6], 1), batch, stage
    )
    each = [ctc_loss(x, tokens, frames, num_tokens)[0].mean() for x in outputs]
    torch.testing.assert_close(loss, 0.75 * each[0] + 0.25 * (each[1] + each[2]) / 2)
    alone = ASRBrain.ctc_objective(
        brain, outputs[:1], FrontEndOutput(None, frames, [7, 6], 1), batch, stage
    )
    torch.testing.assert_close(alone, each[0])


@pytest.mark.parametrize("own", [False, True])
def test_inner_layers_share_the_output_layer_unless_they_have_one(own):
    conditioning = SimpleNamespace(ctc_lin=nn.Linear(4, 5)) if own else None
    brain = stub(conditioning)
    encoder_BTD, *inner = torch.randn(3, 2, 7, 4)
    found = ASRBrain.ctc_log_probs(brain, encoder_BTD, inner)
    layer = conditioning.ctc_lin if own else brain.modules.ctc_lin
    wanted = [brain.modules.ctc_lin(encoder_BTD), *map(layer, inner)]
    torch.testing.assert_close(found, [x.log_softmax(-1) for x in wanted])


def test_a_run_trains_inner_layers_and_refuses_others(tone_corpus, tmp_path, capsys):
    keys = {"num_encoder_layers": 2, "number_of_epochs": 1, "test_splits": "[]"}
    losses = []
    for folder, more in (("plain", {}), ("inner", {"inter_ctc_layers": "[1]"})):
        assert train(command_line(tone_corpus, tmp_path / folder, **keys, **more)) == 0
        losses.append(metrics(tmp_path / folder)[0]["train_loss"])
    assert losses[0] != losses[1]
    arguments = command_line(tone_corpus, tmp_path / "x", **keys, inter_ctc_layers="[2]")
    assert train(arguments) == EXIT_USER_ERROR
    assert "inter_ctc_layers is [2]; of 2 layers, those between 1 and 1" in capsys.readouterr().err


def test_a_bundle_has_what_inner_layers_tell(tmp_path):
    options = {"num_encoder_layers": 3, "inter_ctc_layers": [1, 2], "self_conditioning": True}
    run = make_run(tmp_path / "run", "CTC/an4", **options)
    state = torch.load(run / "save" / "averaged" / "model.ckpt", weights_only=True)
    told = "1.encoder.conditioning.feedback.weight"
    state[told] = torch.randn_like(state[told])
    torch.save(state, run / "save" / "averaged" / "model.ckpt")
    encoder = read_bundle(write_bundle(run, tmp_path / "bundle")).encoder.Transformer.encoder
    assert encoder.conditioned_layers == {1, 2}
    torch.testing.assert_close(encoder.conditioning.feedback.weight.detach(), state[told])
