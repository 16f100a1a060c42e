"""Both recipes train in the precisions of a GPU; in fp16 they find a scale for the gradients."""

import itertools
import json
import math

import pytest
import torch

import train_CTC
import train_S2S
from tests.ctc_runs import CONMAMBA, CONMAMBAMAMBA, TINY_S2S, command_line, metrics, train
from training.brains.run_brain import RunBrain

# The scale of fp16 begins too high: the first few steps only halve it.
STEPS = 10
PLACES = [
    ("cpu", "bf16"),
    pytest.param("cuda", "bf16", marks=pytest.mark.gpu),
    pytest.param("cuda", "fp16", marks=pytest.mark.gpu),
]
RECIPES = {
    "CTC": (train_CTC.main, CONMAMBA, {"test_beam_size": 2}),
    "S2S": (train_S2S.main, CONMAMBAMAMBA, TINY_S2S),
}


@pytest.fixture
def steps(monkeypatch):
    """The scale of the gradients and all weights, after each step of a run."""
    noted = []
    end_of_batch = RunBrain.on_fit_batch_end

    def note(brain, *args):
        end_of_batch(brain, *args)
        weights = [p.detach().cpu().flatten() for p in brain.hparams.model.parameters()]
        noted.append((brain.scaler.get_scale(), torch.cat(weights)))

    monkeypatch.setattr(RunBrain, "on_fit_batch_end", note)
    # Curves are tested elsewhere.
    monkeypatch.setattr("training.brains.run_brain.plot_curves", lambda *args, **kwargs: None)
    return noted


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("device", "precision"), PLACES)
def test_every_step_trains_or_lowers_the_scale(
    recipe, precision, device, steps, tone_corpus, tmp_path
):
    main, yaml_file, keys = RECIPES[recipe]
    keys = keys | {
        "device": device,
        "precision": precision,
        "number_of_epochs": 1,
        "dynamic_batching": False,
        "batch_size": 1,
        "test_splits": "[test-other]",
    }
    assert train(command_line(tone_corpus, tmp_path, yaml_file, **keys), main) == 0
    assert len(steps) == STEPS
    trained = 0
    for (scale_before, before), (scale, after) in itertools.pairwise(steps):
        assert after.isfinite().all()
        if torch.equal(before, after):
            assert scale == scale_before / 2
        else:
            assert scale == scale_before
            trained += 1
    assert trained > 0
    assert (steps[0][0] > 1) == (precision == "fp16")
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert results["run"]["precision"] == precision
    assert results["run"]["device"].startswith(device)
    losses = [entry["train_loss"] for entry in metrics(tmp_path) if "train_loss" in entry]
    assert len(losses) == STEPS
    assert all(map(math.isfinite, losses))
