"""Every recipe's model can be bundled; what its search reads from elsewhere is known."""

import pytest

from common.errors import UserError
from inference.config import check_config
from inference.run_config import read_run_config
from tests.ctc_runs import REPOSITORY
from tests.inference.runs import resolved

RECIPES = sorted(
    f"{kind}/{path.stem}"
    for kind in ("CTC", "S2S")
    for path in (REPOSITORY / "hparams" / kind).glob("*.yaml")
)


@pytest.fixture
def config_of(tmp_path):
    def read(name, **overrides):
        (tmp_path / "hyperparams.yaml").write_text(resolved(name, **overrides), encoding="utf-8")
        return read_run_config(tmp_path)

    return read


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_described(config_of, name):
    found = config_of(name, no_lm=True)
    check_config(found.config)
    assert found.config["kind"] == name[:3].lower()
    assert found.lm_source is None
    assert "lm" not in found.config


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("S2S")])
def test_a_language_model_is_described_beside_the_search(config_of, name):
    found = config_of(name, no_lm=False, pretrained_lm_tokenizer_path="some/lm", lm_weight=0.7)
    check_config(found.config)
    assert found.lm_source == "some/lm"
    assert found.config["lm"]["class"] == "TransformerLM"
    (scorer,) = found.config["search"]["scorer"]["full_scorers"]
    assert scorer["class"] == "LMScorer"
    assert scorer["language_model"] == {"ref": "lm"}
    assert found.config["search"]["scorer"]["weights"]["lm"] == 0.7


def test_n_grams_are_left_out_and_named(config_of):
    assert config_of("CTC/demo").config["left_out"] == []
    assert config_of("CTC/demo", kenlm_model_path="w.arpa").config["left_out"] == ["word n-gram"]
    found = config_of("S2S/demo", token_ngram_path="t.arpa").config
    assert found["left_out"] == ["token n-gram"]
    assert set(found["search"]["scorer"]["weights"]) == {"ctc"}


def test_a_threshold_that_leaves_nothing_out_is_a_number(config_of):
    found = config_of("CTC/demo", test_beam_search={"token_prune_min_logp": float("-inf")}).config
    check_config(found)
    assert found["search"]["token_prune_min_logp"] < -1e6


def test_a_file_that_is_no_recipe_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read as a run's"):
        read_run_config(tmp_path)
    for text, message in (
        ("a: 1", "has no compute_features"),
        ("{", "cannot be read"),
        ("", "cannot be read"),
    ):
        (tmp_path / "hyperparams.yaml").write_text(text)
        with pytest.raises(UserError, match=message):
            read_run_config(tmp_path)


def test_a_recipe_without_a_search_setting_is_refused(tmp_path):
    text = resolved("CTC/demo").replace("test_beam_size:", "beam_of_test:")
    (tmp_path / "hyperparams.yaml").write_text(text)
    with pytest.raises(UserError, match="has no test_beam_size"):
        read_run_config(tmp_path)
