"""Weights that do not fit, or are none, are one error each."""

import pytest
import torch

from common.errors import UserError
from modules.weights import load_model_weights


class Weights(torch.nn.Module):
    """A model of one layer."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)


def test_parameters_on_one_side_alone_are_named(tmp_path):
    path = tmp_path / "model.ckpt"
    state = Weights().state_dict()
    torch.save({"layer.weight": state["layer.weight"], "other": state["layer.bias"]}, path)
    with pytest.raises(UserError) as caught:
        load_model_weights(Weights(), path)
    assert "layer.bias: the model has it, the checkpoint does not" in str(caught.value)
    assert "other: the checkpoint has it, the model does not" in str(caught.value)
    assert "2 parameters differ" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 not a zip"])
def test_a_file_that_holds_no_weights_is_one_error(tmp_path, content):
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not a file of model weights"):
        load_model_weights(Weights(), path)


@pytest.mark.parametrize("content", [torch.zeros(3), [1, 2], {"layer.weight": 3}])
def test_a_torch_file_of_something_else_is_one_error(tmp_path, content):
    path = tmp_path / "model.ckpt"
    torch.save(content, path)
    with pytest.raises(UserError):
        load_model_weights(Weights(), path)


def test_a_missing_file_of_weights_is_one_error(tmp_path):
    with pytest.raises(UserError, match=r"model\.ckpt"):
        load_model_weights(Weights(), tmp_path / "model.ckpt")
