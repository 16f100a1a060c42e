"""Train a joint CTC/attention recogniser and score it on the test splits.

python train_S2S.py hparams/S2S/conmambamamba_small.yaml --data_folder LibriSpeech --no_lm True
torchrun --nproc-per-node=4 train_S2S.py hparams/S2S/conmamba_large.yaml --data_folder LibriSpeech
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from training.launch.command_line import check_arguments, run_script

if __name__ == "__main__":
    # Help and mistakes are answered before torch is imported, which takes seconds.
    check_arguments(__doc__)

import speechbrain as sb
from sentencepiece import SentencePieceProcessor
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.nnet.losses import kldiv_loss
from speechbrain.utils.Accuracy import AccuracyStats
from torch import Tensor

from decoding.searches import prepare_joint_search
from modules.lengths import relative_lengths
from training.brains.asr_brain import ASRBrain, FrontEndOutput
from training.data.copied_ahead import to_device
from training.data.token_noise import replace_tokens
from training.recipe import dataio_prepare, run_recipe

__all__ = ["ASR", "dataio_prepare", "main"]


@dataclass
class S2SOutputs:
    """Encoder output (B, T, D), log probabilities of both branches, and their input.

    Those of the CTC branch are what ``ASRBrain.ctc_log_probs`` gave.
    """

    encoder_BTD: Tensor
    ctc_log_probs: list[Tensor]
    seq_log_probs_BUV: Tensor
    front_end: FrontEndOutput


class ASR(ASRBrain):
    """Joint CTC and label-smoothed attention training (``ctc_weight``)."""

    best_metric = "ACC"
    best_is = "max"

    def compute_forward(self, batch: PaddedBatch, stage: sb.Stage) -> S2SOutputs:
        """Waveforms and the tokens so far to log probabilities."""
        batch = batch.to(self.device, non_blocking=True)
        front_end = self.front_end(batch, stage)
        tokens_BU = batch.tokens_bos.data.repeat(front_end.copies, 1)
        if stage == sb.Stage.TRAIN and self.hparams.decoder_token_noise:
            tokens_BU = replace_tokens(
                tokens_BU,
                self.hparams.decoder_token_noise,
                self.hparams.pad_index,
                num_special=self.hparams.eos_index + 1,
                vocabulary=self.hparams.output_neurons,
            )
        inner_layers = self.inner_layers(stage)
        encoded, decoder_BUD = self.modules.Transformer(
            front_end.frames_BTFC,
            tokens_BU,
            front_end.num_frames_B,
            pad_idx=self.hparams.pad_index,
            intermediate_layers=inner_layers,
        )
        encoder_BTD, inner = encoded if inner_layers else (encoded, [])
        return S2SOutputs(
            encoder_BTD,
            self.ctc_log_probs(encoder_BTD, inner),
            self.modules.seq_lin(decoder_BUD).float().log_softmax(-1),
            front_end,
        )

    def compute_objectives(
        self, predictions: S2SOutputs, batch: PaddedBatch, stage: sb.Stage
    ) -> Tensor:
        """``ctc_weight`` times the CTC loss plus the rest of one times the attention loss."""
        front_end, hparams = predictions.front_end, self.hparams
        copies = front_end.copies
        ctc = self.ctc_objective(predictions.ctc_log_probs, front_end, batch, stage)
        seq = kldiv_loss(
            predictions.seq_log_probs_BUV,
            batch.tokens_eos.data.repeat(copies, 1),
            length=self.target_lens(batch).repeat(copies),
            label_smoothing=hparams.label_smoothing if stage == sb.Stage.TRAIN else 0.0,
            reduction="batchmean",
            pad_idx=hparams.pad_index,
        )
        if stage != sb.Stage.TRAIN:
            self.accuracy.append(
                predictions.seq_log_probs_BUV, batch.tokens_eos.data, self.target_lens(batch)
            )
        return hparams.ctc_weight * ctc + (1 - hparams.ctc_weight) * seq

    def target_lens(self, batch: PaddedBatch) -> Tensor:
        """Decoder targets (tokens and eos) as a fraction of the longest.

        SpeechBrain masks positions at or above this times the width: half a token less keeps
        rounding from letting a padded one in.
        """
        num_targets_B = to_device(batch.num_tokens, self.device) + 1
        return (num_targets_B - 0.5) / batch.tokens_eos.data.shape[1]

    def decode(self, outputs: S2SOutputs, batch: PaddedBatch, stage: sb.Stage) -> list[str] | None:
        """Beam search; in validation every ``valid_search_interval`` epochs."""
        if stage == sb.Stage.VALID and not self.searches_this_epoch():
            return None
        search = self.hparams.valid_search if stage == sb.Stage.VALID else self.hparams.test_search
        wav_lens = relative_lengths(outputs.front_end.num_frames_B, outputs.encoder_BTD.shape[1])
        cut_before = getattr(search, "num_cut", 0)
        tokens, _, _, _ = search(outputs.encoder_BTD, wav_lens)
        self.num_cut += getattr(search, "num_cut", 0) - cut_before
        # Specials are no text, and the output layer may be wider than the tokenizer.
        first, size = self.hparams.eos_index + 1, self.tokenizer.get_piece_size()
        return [self.tokenizer.decode([t for t in ids if first <= t < size]) for ids in tokens]

    def searches_this_epoch(self) -> bool:
        """Whether this epoch's validation decodes; the last one's always does."""
        hparams = self.hparams
        return self.epoch % hparams.valid_search_interval == 0 or (
            self.epoch == hparams.number_of_epochs
        )

    def on_scoring_start(self, stage: sb.Stage) -> None:
        """Start counting correct tokens."""
        self.accuracy = AccuracyStats()

    def validation_stats(self, loss: float) -> dict[str, float]:
        """Loss and token accuracy (percent); WER and CER of the epochs that decode."""
        stats = super().validation_stats(loss) if self.searches_this_epoch() else {"loss": loss}
        return {**stats, "ACC": 100 * self.accuracy.summarize()}


def prepare_searches(hparams: dict, tokenizer: SentencePieceProcessor) -> None:
    """Complete both searches with the scorers that need the tokenizer."""
    folder = Path(hparams["save_folder"]) / "pretrained"
    for name in ("valid_search", "test_search"):
        prepare_joint_search(hparams[name], tokenizer, hparams["output_neurons"], folder)


def main(argv: Sequence[str]) -> None:
    """Run the recipe with these command-line arguments."""
    run_recipe(argv, ASR, __doc__, prepare_searches)


if __name__ == "__main__":
    run_script(main)
