"""Training for streaming: batches in chunks, validation at full context and in chunks."""

import pytest
import speechbrain as sb
import torch
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig

import train_CTC
from inference import StreamingRecognizer
from tests.ctc_runs import REPOSITORY, command_line, metrics, train, untouched_process
from training.recipe import run_recipe

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


class EachCopyAlone(train_CTC.ASR):
    """Draws given chunks, and compares what a step gives of a copy with what that copy gives."""

    drawn: tuple[DynChunkTrainConfig | None, ...] = ()
    compared = 0

    def draw_chunks(self, stage):
        """The next of those given."""
        self.turn = getattr(self, "turn", -1) + 1
        return self.drawn[self.turn % len(self.drawn)]

    def compute_forward(self, batch, stage):
        """As the parent's, and compared in training."""
        outputs = super().compute_forward(batch, stage)
        if stage == sb.Stage.TRAIN:
            front_end = outputs.front_end
            frames_BTFC, num_frames_B = front_end.frames_BTFC, front_end.num_frames_B
            half = len(num_frames_B) // 2
            for rows, chunks in zip((slice(half), slice(half, None)), self.drawn, strict=True):
                alone = self._log_probs(frames_BTFC[rows], num_frames_B[rows], stage, chunks)
                for of_step_BTV, alone_BTV in zip(outputs.ctc_log_probs, alone, strict=True):
                    torch.testing.assert_close(of_step_BTV[rows], alone_BTV)
            type(self).compared += 1
        return outputs


@pytest.mark.parametrize(
    "drawn",
    [
        (None, DynChunkTrainConfig(2, 8)),
        (DynChunkTrainConfig(3, 8), DynChunkTrainConfig(1, 8)),
        (DynChunkTrainConfig(2, 8), DynChunkTrainConfig(2, 8)),
    ],
    ids=["whole and chunks", "two sizes", "one size"],
)
def test_each_copy_of_a_batch_has_chunks_of_its_own(tone_corpus, tmp_path, monkeypatch, drawn):
    monkeypatch.setattr(EachCopyAlone, "drawn", drawn)
    monkeypatch.setattr(EachCopyAlone, "compared", 0)
    keys = SHORT | {
        "consistency_weight": 0.2,
        "augment_from_epoch": 1,
        "transformer_dropout": 0.0,
        "num_encoder_layers": 2,
        "inter_ctc_layers": "[1]",
        "optimizer_step_limit": 2,
    }
    arguments = command_line(tone_corpus, tmp_path / "run", YAML, **keys)
    with untouched_process():
        run_recipe(arguments, EachCopyAlone, "", train_CTC.prepare_searches)
    assert EachCopyAlone.compared == 2
