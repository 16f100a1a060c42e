"""What a model is, for people and for programs."""

import json

import pytest

from common.files import file_digest
from inference.inspect import main


@pytest.fixture
def facts(run, capsys):
    """Of each run's bundle, as JSON gives them."""
    assert main([str(run / "bundle"), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_has_what_the_run_knows(facts, run):
    results = json.loads((run / "results.json").read_text())
    assert facts["is"] == "bundle"
    assert facts["parameters"] == results["model"]["parameters"]
    assert facts["results"] == results["splits"]
    assert facts["network"]["encoder_module"] == results["model"]["encoder_module"]
    assert facts["frames_per_second"] == 25
    assert facts["tokens"]["outputs"] == 31
    assert facts["features"]["n_mels"] == 80
    assert facts["training"]["dev_splits"] == ["dev-clean"]
    for name, file in facts["files"].items():
        assert file["bytes"] == (run / "bundle" / name).stat().st_size
        assert file["sha256"] == file_digest(run / "bundle" / name)


def test_text_has_it_too(run, capsys, facts):
    assert main([str(run / "bundle")]) == 0
    text = capsys.readouterr().out
    for wanted in (
        f"{facts['parameters']:,}",
        "25 a second",
        "test-clean",
        facts["files"]["model.safetensors"]["sha256"],
        "conmamba, 1 layers",
    ):
        assert wanted in text
    assert ("mamba, 1 layers" in text.partition("decoder")[2]) == (facts["kind"] == "s2s")


def test_a_run_is_inspected_like_its_bundle(run, capsys, facts):
    assert main([str(run), "--json"]) == 0
    of_run = json.loads(capsys.readouterr().out)
    assert of_run["is"] == "run"
    assert "save/averaged/model.ckpt" in of_run["files"]
    for key in ("network", "parameters", "tokens", "features", "results", "search"):
        assert of_run[key] == facts[key]


def test_a_damaged_bundle_is_an_error(bundle, capsys):
    (bundle / "model.safetensors").write_bytes(b"x")
    assert main([str(bundle)]) == 2
    assert "model.safetensors is not the file" in capsys.readouterr().err
