"""Training for streaming: batches in chunks, validation at full context and in chunks."""

import pytest

from inference import StreamingRecognizer
from tests.ctc_runs import REPOSITORY, command_line, metrics, train

pytestmark = pytest.mark.usefixtures("one_thread")
YAML = REPOSITORY / "hparams" / "CTC" / "conmamba_small_streaming.yaml"
SHORT = {"number_of_epochs": 1, "test_splits": "[test-clean]", "avg_checkpoints": 1}


@pytest.mark.parametrize("encoder", ["conmamba", "conformer"])
def test_a_run_validates_in_chunks_and_leaves_a_model_that_streams(tone_corpus, tmp_path, encoder):
    keys = SHORT | {"encoder_module": encoder, "chunk_size_min": 2, "chunk_size_max": 5}
    folder = tmp_path / "run"
    assert train(command_line(tone_corpus, folder, YAML, **keys)) == 0
    (validation,) = [entry for entry in metrics(folder) if "wer" in entry]
    assert validation["wer_640ms"] >= 0
    asr = StreamingRecognizer.from_bundle(folder / "bundle", device="cpu", chunk_ms=320)
    assert asr.finish(asr.open()).text == ""


def test_chunks_make_the_loss_another_and_are_drawn_again_in_a_resumed_run(tone_corpus, tmp_path):
    losses = {}
    for name, prob in (("chunks", 1.0), ("again", 1.0), ("whole", 0.0)):
        keys = SHORT | {"chunkwise_prob": prob, "chunk_size_min": 1, "chunk_size_max": 3}
        folder = tmp_path / name
        assert train(command_line(tone_corpus, folder, YAML, **keys, optimizer_step_limit=3)) == 0
        losses[name] = [e["train_loss"] for e in metrics(folder) if "train_loss" in e]
    assert losses["chunks"] == losses["again"] != losses["whole"]


def test_a_causal_network_takes_no_chunks(tone_corpus, tmp_path):
    keys = {"causal": True, "mamba_config": "{d_state: 4, bidirectional: False}"}
    folder = tmp_path / "run"
    assert train(command_line(tone_corpus, folder, YAML, **(SHORT | keys))) == 0
    assert not any("wer_640ms" in entry for entry in metrics(folder))
