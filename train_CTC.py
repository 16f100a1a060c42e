"""Train a CTC recogniser and score it on the test splits.

python train_CTC.py hparams/CTC/conmamba_small.yaml --data_folder LibriSpeech --precision bf16
torchrun --nproc-per-node=4 train_CTC.py hparams/CTC/conmamba_large.yaml --data_folder LibriSpeech
"""

from collections.abc import Sequence
from dataclasses import dataclass

from training.launch.command_line import check_arguments, run_script

if __name__ == "__main__":
    # Help and mistakes are answered before torch is imported, which takes seconds.
    check_arguments(__doc__)

import speechbrain as sb
from sentencepiece import SentencePieceProcessor
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.utils.dynamic_chunk_training import (
    DynChunkTrainConfig,
    DynChunkTrainConfigRandomSampler,
)
from speechbrain.utils.metric_stats import ErrorRateStats
from torch import Tensor

from decoding.ctc_beam_search import ctc_greedy
from decoding.searches import make_ctc_search
from training.brains.asr_brain import ASRBrain, FrontEndOutput
from training.recipe import dataio_prepare, run_recipe

__all__ = ["ASR", "dataio_prepare", "main"]


@dataclass
class CTCOutputs:
    """What ``ASRBrain.ctc_log_probs`` gave, and what it was computed from."""

    ctc_log_probs: list[Tensor]
    front_end: FrontEndOutput


class ASR(ASRBrain):
    """CTC training; two augmented copies per utterance where ``consistency_weight`` is not 0."""

    def compute_forward(self, batch: PaddedBatch, stage: sb.Stage) -> CTCOutputs:
        """Waveforms to log probabilities."""
        batch = batch.to(self.device, non_blocking=True)
        front_end = self.front_end(batch, stage)
        return CTCOutputs(self._log_probs(front_end, stage, self.draw_chunks(stage)), front_end)

    def _log_probs(
        self, front_end: FrontEndOutput, stage: sb.Stage, chunks: DynChunkTrainConfig | None
    ) -> list[Tensor]:
        inner_layers = self.inner_layers(stage)
        encoded, _ = self.modules.Transformer(
            front_end.frames_BTFC,
            None,
            front_end.num_frames_B,
            dynchunktrain_config=chunks,
            intermediate_layers=inner_layers,
        )
        encoder_BTD, inner = encoded if inner_layers else (encoded, [])
        return self.ctc_log_probs(encoder_BTD, inner)

    def draw_chunks(self, stage: sb.Stage) -> DynChunkTrainConfig | None:
        """What a training batch is cut into; None shows every frame the whole utterance."""
        sampler = self._chunk_sampler()
        return sampler(stage) if sampler is not None and stage == sb.Stage.TRAIN else None

    def _chunk_sampler(self) -> DynChunkTrainConfigRandomSampler | None:
        # A causal network streams as it is and takes no chunks.
        if self.hparams.Transformer.causal:
            return None
        return getattr(self.hparams, "dynchunktrain_config_sampler", None)

    def on_scoring_start(self, stage: sb.Stage) -> None:
        """Reset the errors in chunks."""
        self.chunked_wer_stats = ErrorRateStats()

    def score(self, outputs: CTCOutputs, batch: PaddedBatch, stage: sb.Stage) -> None:
        """As the parent's; in validation once more in chunks, if there are any."""
        super().score(outputs, batch, stage)
        sampler = self._chunk_sampler()
        if sampler is None or stage != sb.Stage.VALID or sampler.valid_config is None:
            return
        front_end = outputs.front_end
        log_probs = self._log_probs(front_end, stage, sampler.valid_config)
        hypotheses = self.decode(CTCOutputs(log_probs, front_end), batch, stage)
        self.chunked_wer_stats.append(
            list(batch.id),
            [text.split() for text in hypotheses],
            [text.split() for text in batch.wrd],
        )

    def validation_stats(self, loss: float) -> dict[str, float]:
        """As the parent's, and the WER in chunks under their length, ``WER_640ms`` for instance."""
        stats = super().validation_stats(loss)
        if self.chunked_wer_stats.scores:
            frames = self._chunk_sampler().valid_config.chunk_size
            encoder = self.speech_encoder
            rate = encoder.compute_features.compute_STFT.sample_rate
            chunk_ms = round(1000 * frames * encoder.stride_samples / rate)
            stats[f"WER_{chunk_ms}ms"] = self.chunked_wer_stats.summarize("error_rate")
        return stats

    def compute_objectives(
        self, predictions: CTCOutputs, batch: PaddedBatch, stage: sb.Stage
    ) -> Tensor:
        """CTC loss per utterance, plus the consistency of the two copies."""
        return self.ctc_objective(predictions.ctc_log_probs, predictions.front_end, batch, stage)

    def decode(self, outputs: CTCOutputs, batch: PaddedBatch, stage: sb.Stage) -> list[str]:
        """Greedy in validation, beam search in test."""
        # A character tokenizer may have fewer tokens than the output layer has places for.
        size = self.tokenizer.get_piece_size()
        log_probs_BTV = outputs.ctc_log_probs[0][..., :size].cpu().numpy()
        num_frames_B = outputs.front_end.num_frames_B.cpu().numpy()
        if stage == sb.Stage.VALID:
            blank = self.hparams.blank_index
            return [
                self.tokenizer.decode([token.id for token in ctc_greedy(item[:frames], blank)])
                for item, frames in zip(log_probs_BTV, num_frames_B, strict=True)
            ]
        return [beams[0].text for beams in self.hparams.test_search(log_probs_BTV, num_frames_B)]


def prepare_searches(hparams: dict, tokenizer: SentencePieceProcessor) -> None:
    """Make the test search, which needs the tokenizer's vocabulary."""
    hparams["test_search"] = make_ctc_search(
        hparams["test_searcher"], hparams["test_beam_search"], tokenizer
    )


def main(argv: Sequence[str]) -> None:
    """Run the recipe with these command-line arguments."""
    run_recipe(argv, ASR, __doc__, prepare_searches)


if __name__ == "__main__":
    run_script(main)
