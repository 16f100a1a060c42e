"""What an evaluation beside a run's own one is called, and what it is told from others by."""

import json

import pytest

from training.named_evaluation import free_name, search_settings


def test_numbers_that_json_does_not_have_are_settings_too():
    text = "test_beam_search: {token_prune_min_logp: -.inf, beam_prune_logp: -12.0}\nalpha: .nan\n"
    settings = search_settings(text)
    assert settings == {
        "test_beam_search": {"token_prune_min_logp": "-inf", "beam_prune_logp": -12},
        "alpha": "nan",
    }
    assert json.loads(json.dumps(settings, allow_nan=False)) == search_settings(text)


@pytest.mark.parametrize("letter", ["a", "ö", "語", "😀"])
def test_a_folder_can_have_the_name_in_any_script(letter, tmp_path):
    name = "x" + 200 * letter
    first = free_name(name, {"beam": 1}, {})
    second = free_name(name, {"beam": 2}, {first: {"splits": {}, "settings": {"beam": 1}}})
    assert second == f"{first}-2"
    assert name.startswith(first)
    assert len(first.encode()) > 110
    (tmp_path / second).mkdir()
