"""The moving average of weights: its numbers, its files, and that a run is evaluated with it."""

import pytest
import torch
from torch import nn

from common.errors import UserError
from tests.ctc_runs import checkpoints, command_line, train
from training.brains.weight_average import WeightAverage
from training.launch.settings import check_setting


def network():
    """With a parameter under two names, and a buffer."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[1].weight = model[0].weight
    return model


def test_an_average_is_what_the_recursion_says():
    model = network()
    average = WeightAverage(model, 0.7)
    expected = model[0].bias.detach().double()
    for step in range(1, 40):
        with torch.no_grad():
            model[0].bias.normal_()
        average.update(step)
        decay = min(0.7, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model[0].bias.detach()
    average.put_in()
    torch.testing.assert_close(model[0].bias.detach(), expected.float(), rtol=1e-5, atol=1e-6)


def test_the_model_gets_its_own_weights_back_and_keeps_its_tensors():
    model = network()
    average = WeightAverage(model, 0.9)
    with torch.no_grad():
        model[0].weight.add_(1)
    own, addresses = model[0].weight.detach().clone(), [p.data_ptr() for p in model.parameters()]
    average.take_out()
    for _ in range(2):
        average.put_in()
    torch.testing.assert_close(model[0].weight.detach(), own - 1, rtol=0, atol=1e-6)
    for _ in range(2):
        average.take_out()
    assert torch.equal(model[0].weight, own)
    assert [p.data_ptr() for p in model.parameters()] == addresses


def test_its_file_is_a_state_of_the_model(tmp_path):
    model = network()
    average = WeightAverage(model, 0.9)
    with torch.no_grad():
        model[0].weight.add_(1)
        model[2].running_mean.add_(2)
    average.update(1)
    average._save(tmp_path / "ema.ckpt")
    other = network()
    other.load_state_dict(torch.load(tmp_path / "ema.ckpt", weights_only=True))
    assert torch.equal(other[2].running_mean, model[2].running_mean)
    again = WeightAverage(network(), 0.9)
    again._load(tmp_path / "ema.ckpt")
    average.put_in()
    for a, b, c in zip(model.parameters(), other.parameters(), again.averages, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("value", [1, 1.0, -0.1, "0.9", None])
def test_a_decay_that_is_none_is_named(value):
    with pytest.raises(UserError, match=r"--ema_decay is .*; it must be a number, at least 0 and"):
        check_setting("ema_decay", value, "--")


def weights(path):
    return torch.load(path, map_location="cpu", weights_only=True)


@pytest.mark.slow
def test_a_run_is_evaluated_with_its_average_and_may_begin_or_end_it(tone_corpus, tmp_path):
    options = {"number_of_epochs": 1, "test_splits": "[]", "avg_checkpoints": 1}

    def run(**more):
        assert train(command_line(tone_corpus, tmp_path, **(options | more))) == 0
        return checkpoints(tmp_path)[-1], weights(tmp_path / "save" / "averaged" / "model.ckpt")

    def same(first, second):
        return all(torch.equal(first[name], second[name]) for name in second)

    latest, averaged = run()
    assert not (latest / "ema.ckpt").exists()
    assert same(averaged, weights(latest / "model.ckpt"))
    # The best of one checkpoint is the latest: nothing that came before is as good.
    latest, averaged = run(number_of_epochs=2, ema_decay=0.9, avg_checkpoints=2)
    files = [weights(c / "ema.ckpt") for c in checkpoints(tmp_path) if (c / "ema.ckpt").exists()]
    assert len(files) == 1
    raw = weights(latest / "model.ckpt")
    assert not same(files[0], raw)
    first = weights(checkpoints(tmp_path)[0] / "model.ckpt")
    mean = {name: (first[name] + files[0][name]) / 2 for name in first}
    assert same(averaged, mean)
    latest, _ = run(number_of_epochs=3, avg_checkpoints=2)
    assert not (latest / "ema.ckpt").exists()
