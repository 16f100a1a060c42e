"""What the weights and statistics of an evaluation are made from."""

import shutil

import pytest
import torch

from common.errors import EXIT_USER_ERROR
from tests.ctc_runs import checkpoints, command_line, train
from training.evaluation import mean_statistics


def statistics(count, mean, std):
    return {"count": count, "glob_mean": torch.tensor(mean), "glob_std": torch.tensor(std)}


def test_statistics_that_agree_stay_as_they_are_and_others_are_averaged():
    frozen = statistics(90, [0.1, -20.3], [0.7, 3.3])
    mean = mean_statistics([frozen, dict(frozen), dict(frozen)])
    assert mean["count"] == 90
    torch.testing.assert_close(mean, frozen, rtol=0, atol=0)
    mean = mean_statistics([statistics(10, [1.0], [2.0]), statistics(30, [2.0], [4.0])])
    torch.testing.assert_close(mean, statistics(30, [1.5], [3.0]))


@pytest.fixture
def copy(tiny_run, tmp_path):
    return shutil.copytree(tiny_run, tmp_path / "copy")


def evaluate(corpus, folder):
    keys = {"number_of_epochs": 1, "lr_adam": 1e-6, "test_splits": "[test-other]"}
    return train(command_line(corpus, folder, flags=["--test_only"], **keys))


def test_a_normaliser_that_is_gone_is_made_again_from_the_checkpoints(copy, tone_corpus):
    normalizer = copy / "save" / "averaged" / "normalizer.ckpt"
    before = torch.load(normalizer, weights_only=True)
    normalizer.unlink()
    assert evaluate(tone_corpus, copy) == 0
    torch.testing.assert_close(torch.load(normalizer, weights_only=True), before)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(b"not"), "is damaged"),
        (lambda path: torch.save([1], path), "is damaged"),
    ],
)
def test_without_checkpoints_it_is_named(copy, tone_corpus, capsys, spoil, reason):
    for checkpoint in checkpoints(copy):
        shutil.rmtree(checkpoint)
    spoil(copy / "save" / "averaged" / "normalizer.ckpt")
    assert evaluate(tone_corpus, copy) == EXIT_USER_ERROR
    assert f"normalizer.ckpt {reason}, and there is no checkpoint" in capsys.readouterr().err
