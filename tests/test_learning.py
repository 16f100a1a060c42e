"""A recogniser learns: trained on a dozen utterances, it writes them down when it hears them."""

import json

import pytest

import train_CTC
import train_S2S
from tests.ctc_runs import CONMAMBA, CONMAMBAMAMBA, TINY_S2S, command_line, train
from tests.generated_corpus import make_corpus

UTTERANCES = 12
SPLIT = "train-clean-100"
CTC = (train_CTC.main, CONMAMBA, {})
S2S = (train_S2S.main, CONMAMBAMAMBA, TINY_S2S | {"valid_search_interval": 1000})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("dozen") / "LibriSpeech", {SPLIT: UTTERANCES})


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "recipe", [pytest.param(CTC, id="CTC"), pytest.param(S2S, id="S2S", marks=pytest.mark.slow)]
)
def test_a_recogniser_learns_a_dozen_utterances(recipe, corpus, tmp_path):
    main, yaml_file, keys = recipe
    keys = keys | {
        "dev_splits": f"[{SPLIT}]",
        "test_splits": f"[{SPLIT}]",
        "speed_perturb": "null",
        "spectrogram_augmentations": "[]",
        "transformer_dropout": 0.0,
        "d_model": 32,
        "num_encoder_layers": 2,
        "d_ffn": 64,
        "n_warmup_steps": 20,
        "number_of_epochs": 40,
        "avg_checkpoints": 1,
        "dynamic_batching": False,
        "batch_size": 2,
        "test_beam_size": 4,
    }
    assert train(command_line(corpus, tmp_path, yaml_file, **keys), main) == 0
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    scores = results["splits"][SPLIT]
    assert scores["utterances"] == UTTERANCES
    assert scores["wer"] < 5
