"""A training step gives the GPU its work and waits for nothing."""

import pytest
import torch

import train_CTC
import train_S2S
from tests.ctc_runs import CONMAMBA, CONMAMBAMAMBA, TINY_S2S, command_line, train
from training.brains.run_brain import RunBrain

RECIPES = {"CTC": (train_CTC.main, CONMAMBA, {}), "S2S": (train_S2S.main, CONMAMBAMAMBA, TINY_S2S)}


class PatientCTC(torch.autograd.Function):
    """torch's CTC loss, which copies its lengths and waits, with its gradient at once."""

    @staticmethod
    def forward(ctx, loss_function, log_probs, *arguments):
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        with torch.enable_grad():
            leaf = log_probs.detach().requires_grad_()
            loss_B = loss_function(leaf, *arguments, reduction="none", zero_infinity=True)
            (grad,) = torch.autograd.grad(loss_B.sum(), leaf)
        torch.cuda.set_sync_debug_mode(mode)
        ctx.save_for_backward(grad)
        return loss_B.detach()

    @staticmethod
    def backward(ctx, grad_B):
        return None, ctx.saved_tensors[0] * grad_B[None, :, None], None, None, None, None


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_waits_for_nothing(recipe, precision, tone_corpus, tmp_path, monkeypatch):
    main, yaml_file, keys = RECIPES[recipe]
    fit_batch, loss_function = RunBrain.fit_batch, torch.nn.functional.ctc_loss
    watched = []

    def ctc_loss(log_probs, tokens, num_frames_B, num_tokens_B, blank, **options):
        return PatientCTC.apply(loss_function, log_probs, tokens, num_frames_B, num_tokens_B, blank)

    def watched_fit(brain, batch):
        # The first steps compile, and the last one of an epoch reads the losses.
        if brain.step < 3 or brain.is_last_batch():
            return fit_batch(brain, batch)
        torch.cuda.set_sync_debug_mode("error")
        try:
            watched.append(brain.step)
            return fit_batch(brain, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(RunBrain, "fit_batch", watched_fit)
    monkeypatch.setattr("training.losses.ctc.F.ctc_loss", ctc_loss)
    keys = keys | {
        "device": "cuda",
        "precision": precision,
        "number_of_epochs": 1,
        "dynamic_batching": False,
        "batch_size": 2,
        "log_interval_steps": 1000,
        "test_splits": "[]",
    }
    assert train(command_line(tone_corpus, tmp_path, yaml_file, **keys), main) == 0
    assert len(watched) == 2
