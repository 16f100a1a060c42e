import pytest
import torch
from torch import nn

from modules.dropout import Dropout, replace_dropout
from ops import dropout
from tests.modules.networks import small_network


def test_elements_are_zero_with_probability_p_and_scaled_otherwise():
    y = Dropout(0.25)(torch.ones(400, 100))
    torch.testing.assert_close(y.unique(), torch.tensor([0.0, 4 / 3]))
    assert (y == 0).double().mean().item() == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize(("p", "training"), [(0.3, False), (0.0, True)])
def test_without_dropping_the_input_comes_back(p, training):
    x = torch.randn(9)
    assert torch.equal(Dropout(p).train(training)(x), x)


def test_probability_one_drops_everything():
    assert not Dropout(1.0)(torch.ones(9)).any()


def test_replacement_reaches_every_depth_and_keeps_probabilities():
    module = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(0.25)), nn.Dropout(0.5))
    replace_dropout(module)
    assert [type(m) for m in (module[1][0], module[2])] == [Dropout, Dropout]
    assert (module[1][0].p, module[2].p) == (0.25, 0.5)


def test_what_the_kernel_does_not_take_is_dropped_by_torch(monkeypatch):
    monkeypatch.setattr(dropout, "dropout", lambda *call: pytest.fail("not torch's"))
    y = Dropout(0.5)(torch.ones(400, dtype=torch.float64))
    torch.testing.assert_close(y.unique(), torch.tensor([0.0, 2.0], dtype=torch.float64))


@pytest.mark.parametrize("encoder", ["transformer", "conformer", "conmamba", "mamba"])
def test_networks_have_no_slow_dropout(encoder):
    network = small_network(encoder, dropout=0.1, num_decoder_layers=1)
    assert nn.Dropout not in {type(module) for module in network.modules()}
