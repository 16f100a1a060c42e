"""The Brain of a recogniser: what the CTC and the S2S script share."""

from dataclasses import dataclass
from pathlib import Path

import speechbrain as sb
import torch
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.utils.metric_stats import ErrorRateStats
from torch import Tensor

from modules.lengths import num_feature_frames, relative_lengths
from training.augment import SpectrogramAugmentation, SpeedPerturbation
from training.chunk_speech import chunk_speech
from training.data import SkippedUtterances, evaluation_batches
from training.losses import (
    consistency_loss,
    ctc_loss,
    flat_start_loss,
    mean_over_feasible,
    min_ctc_frames,
)
from training.run_brain import RunBrain
from training.seeding import seed_everything
from training.splicing import Splicing


@dataclass
class Encoded:
    """Front-end output of a batch and the targets that go with it.

    Attributes:
        feats: (B, T, F, C) front-end frames.
        num_frames_B: integer frames of each item.
        copies: how many augmented copies of the batch stand one after the other in it.
    """

    feats: Tensor
    num_frames_B: Tensor
    copies: int

    @property
    def wav_lens(self) -> Tensor:
        """Fraction of the longest item of the batch."""
        return relative_lengths(self.num_frames_B, self.feats.shape[1])


class ASRBrain(RunBrain):
    """Training loop of a recogniser: features, augmentation, decoding and error rates.

    Subclasses give ``compute_forward``, whose outputs have ``ctc_log_probs_BTV`` and ``encoded``,
    ``compute_objectives`` and ``decode``, and set ``best_metric`` (key of ``validation_stats``) and
    ``best_is`` ("min" or "max").
    """

    best_metric = "WER"
    best_is = "min"
    amount_unit = "audio_s"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        hparams = self.hparams
        self.tokenizer = getattr(hparams, "tokenizer", None)
        self.skipped = SkippedUtterances(Path(hparams.output_folder) / "skipped.csv")
        self.perturbation: SpeedPerturbation | None = None
        self.splicing: Splicing | None = None
        self.unperturbed: DynamicItemDataset | None = None
        self.spectrogram_augmentation = SpectrogramAugmentation(
            getattr(hparams, "spectrogram_augmentations", []), hparams.seed
        )
        self.last_test_loss = float("nan")
        self.transcripts: dict[str, tuple[str, str]] = {}
        hparams.compute_features.to(self.device)

    def describe(self, batch: PaddedBatch) -> str:
        """The ids of the utterances."""
        return ", ".join(batch.id)

    def amount(self, batch: PaddedBatch) -> float:
        """Seconds of audio; a perturbed or spliced utterance counts as that of the manifest."""
        return float(sum(batch.duration))

    def augments(self, stage: sb.Stage) -> bool:
        """Whether this stage is trained on augmented speech: from ``augment_from_epoch`` on."""
        return stage == sb.Stage.TRAIN and self.epoch >= self.hparams.augment_from_epoch

    def features(self, batch: PaddedBatch, stage: sb.Stage) -> Encoded:
        """Filterbank, normalisation, augmentation (see ``augments``) and front end.

        With a ``consistency_weight`` what is augmented is repeated, each copy augmented anew.
        """
        hparams = self.hparams
        copies = 1
        wav_BS = batch.sig.data
        num_samples_B = batch.num_samples.to(wav_BS.device)
        # Filterbank energies span more decades than bfloat16 has bits.
        with torch.autocast(wav_BS.device.type, enabled=False), torch.no_grad():
            feats_BTM = hparams.compute_features(wav_BS, num_samples_B)
            frames_B = num_feature_frames(num_samples_B)
            feats_BTM = self.modules.normalize(
                feats_BTM, relative_lengths(frames_B, feats_BTM.shape[1]), epoch=self.epoch
            )
        if self.augments(stage):
            copies = 2 if hparams.consistency_weight else 1
            feats_BTM = torch.cat(
                [
                    self.spectrogram_augmentation(feats_BTM, frames_B, batch.id, self.epoch, view)
                    for view in range(copies)
                ]
            )
            frames_B = frames_B.repeat(copies)
        # From here on only dropout draws random numbers.
        if stage == sb.Stage.TRAIN:
            seed_everything(hparams.seed, self.epoch, self.step, self.rank)
        return Encoded(
            self.modules.CNN(feats_BTM, frames_B),
            hparams.CNN.out_frames(frames_B),
            copies,
        )

    def ctc_objective(
        self, log_probs_BTV: Tensor, encoded: Encoded, batch: PaddedBatch, stage: sb.Stage
    ) -> Tensor:
        """CTC loss, mean over utterances; in training with the consistency of the two copies.

        The first ``flat_start_epochs`` train with ``flat_start_loss``, whose priors fade out in the
        second half of them: set free at once, alignments can fall back to blanks.
        """
        hparams, training = self.hparams, stage == sb.Stage.TRAIN
        arguments = (
            log_probs_BTV,
            batch.tokens.data.repeat(encoded.copies, 1),
            encoded.num_frames_B,
            self.num_tokens(batch).to(self.device).repeat(encoded.copies),
            hparams.blank_index,
        )
        if training and self.epoch <= hparams.flat_start_epochs:
            remaining = 1 - (self.epoch - 1) / hparams.flat_start_epochs
            loss_B, feasible_B = flat_start_loss(*arguments, prior_scale=min(1.0, 2 * remaining))
        else:
            loss_B, feasible_B = ctc_loss(*arguments)
        loss = mean_over_feasible(loss_B, feasible_B)
        if training:
            self.note_infeasible(list(batch.id), feasible_B, encoded, batch)
            if encoded.copies > 1:
                loss = loss + hparams.consistency_weight * consistency_loss(
                    log_probs_BTV, encoded.num_frames_B, feasible_B
                )
        return loss

    def note_infeasible(
        self, ids: list[str], feasible_B: Tensor, encoded: Encoded, batch: PaddedBatch
    ) -> None:
        """List utterances that were too short for their tokens in skipped.csv."""
        if bool(feasible_B.all()):
            return
        num_tokens_B = self.num_tokens(batch).cpu()
        needed_B = min_ctc_frames(batch.tokens.data.cpu(), num_tokens_B)
        rows = range(len(ids))
        reasons = {
            ids[i]: f"{int(encoded.num_frames_B[i])} frames for {int(needed_B[i])} "
            "(tokens and repetitions) after speed perturbation"
            for i in rows
            # A spliced utterance is none of the corpus, and another one next time.
            if not bool(feasible_B[i]) and batch.said[i] == batch.wrd[i]
        }
        self.skipped.add(reasons)

    @staticmethod
    def num_tokens(batch: PaddedBatch) -> Tensor:
        """Integer token counts (B,)."""
        return torch.round(batch.tokens.lengths * batch.tokens.data.shape[1]).long()

    def on_stage_start(self, stage, epoch=None):
        """Seed the stage, reset what is measured in it."""
        if stage == sb.Stage.TRAIN and self.splicing is not None:
            # Before seeds and clock: a resumed run may find this done.
            self.prepare_splicing(epoch)
        super().on_stage_start(stage, epoch)
        if stage == sb.Stage.TRAIN:
            if self.perturbation is not None:
                self.perturbation.epoch = epoch
            return
        self.wer_stats = ErrorRateStats()
        self.cer_stats = ErrorRateStats(split_tokens=True)
        self.transcripts = {}
        self.on_scoring_start(stage)

    def prepare_splicing(self, epoch: int) -> None:
        """From ``splice_from_epoch`` on: cut the speech as soon as the model knows its words."""
        self.splicing.epoch = epoch
        if epoch >= self.hparams.splice_from_epoch and not self.splicing.pieces:
            loader = self.make_dataloader(
                self.unperturbed,
                sb.Stage.VALID,
                ckpt_prefix=None,
                **evaluation_batches(self.unperturbed, vars(self.hparams)),
            )
            path = Path(self.hparams.save_folder) / "word_chunks.json"
            self.splicing.use(chunk_speech(self, loader, path, epoch))

    def on_scoring_start(self, stage: sb.Stage) -> None:
        """Hook of the subclasses: reset further statistics."""

    def validation_stats(self, loss: float) -> dict[str, float]:
        """Figures of a validation; WER and CER in percent."""
        return {
            "loss": loss,
            "WER": self.wer_stats.summarize("error_rate"),
            "CER": self.cer_stats.summarize("error_rate"),
        }

    def score(self, outputs, batch: PaddedBatch, stage: sb.Stage) -> None:
        """Decode, and collect the transcripts and, in validation, the errors."""
        hypotheses = self.decode(outputs, batch, stage)
        if hypotheses is not None:
            references = list(batch.wrd)
            if stage == sb.Stage.VALID:
                words = [text.split() for text in hypotheses]
                for stats in (self.wer_stats, self.cer_stats):
                    stats.append(list(batch.id), words, [text.split() for text in references])
            self.transcripts.update(
                zip(batch.id, zip(references, hypotheses, strict=True), strict=True)
            )

    def decode(self, outputs, batch: PaddedBatch, stage: sb.Stage) -> list[str] | None:
        """Hook of the subclasses: texts of a batch, or None where this stage does not decode."""
        raise NotImplementedError
