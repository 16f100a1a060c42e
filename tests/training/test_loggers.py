"""Which run a logger writes to."""

import pytest

from common.errors import UserError
from training.reporting.loggers import make_loggers, run_id


def test_a_folder_keeps_its_id_and_another_gets_another(tmp_path):
    first = run_id(tmp_path / "a" / "3402")
    assert run_id(tmp_path / "a" / "3402") == first
    assert run_id(tmp_path / "b" / "3402") != first


def test_weights_and_biases_without_a_login_is_one_message(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def init(**options):
        raise wandb.errors.UsageError("No API key configured.\nUse `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", init)
    keys = {"use_tensorboard": False, "use_wandb": True, "wandb_entity": None}
    with pytest.raises(UserError, match=r"No API key configured\. .*WANDB_MODE=offline"):
        make_loggers(keys | {"wandb_project": "p", "output_folder": str(tmp_path / "a" / "b")})
