"""The Brain of a recogniser: what the CTC and the S2S script share."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import speechbrain as sb
import torch
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.utils.distributed import if_main_process, is_distributed_initialized
from speechbrain.utils.metric_stats import ErrorRateStats
from torch import Tensor
from tqdm import tqdm

from common.errors import Interrupted, UserError
from modules.normalization import CountedStatistics
from modules.speech_encoder import SpeechEncoder
from text.tokenizer import tokens_of
from training.brains.graphs import (
    CudaRecorder,
    GraphedEncoder,
    GraphedFrontEnd,
    check_graphs,
)
from training.brains.run_brain import RunBrain
from training.data.augmentation import SpectrogramAugmentation, SpeedPerturbation
from training.data.copied_ahead import CopiedAhead, to_device
from training.data.recordings import (
    SkippedUtterances,
    evaluation_batches,
    padded_samples,
    read_rows,
)
from training.losses.ctc import consistency_loss, ctc_loss, flat_start_loss, mean_over_feasible
from training.splicing.cut_speech import Emissions, WordCutter, cut_speech
from training.splicing.splice import Splicing


@dataclass
class FrontEndOutput:
    """Front-end frames of a batch, in training those of augmented speech.

    Attributes:
        frames_BTFC: frames, zero beyond each item's own.
        num_frames_B: integer frames of each item.
        num_frames: the same as numbers of the host.
        copies: how many augmented copies of the batch stand one after the other in it.
    """

    frames_BTFC: Tensor
    num_frames_B: Tensor
    num_frames: list[int]
    copies: int


class ASRBrain(RunBrain):
    """Training loop of a recogniser: features, augmentation, decoding and error rates.

    Subclasses give ``compute_forward``, whose outputs have ``ctc_log_probs`` and ``front_end``,
    ``compute_objectives`` and ``decode``, and set ``best_metric`` (key of ``validation_stats``) and
    ``best_is`` ("min" or "max").
    """

    best_metric = "WER"
    best_is = "min"
    amount_unit = "audio_s"
    memory_keys = ("max_batch_length_train", "max_batch_ex", "batch_size")
    memory_keys_of_evaluation = ("max_batch_length_val", "test_beam_size")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        hparams = self.hparams
        self.tokenizer = getattr(hparams, "tokenizer", None)
        self.skipped = SkippedUtterances(Path(hparams.output_folder) / "skipped.csv")
        self.perturbation: SpeedPerturbation | None = None
        self.splicing: Splicing | None = None
        self.unperturbed: DynamicItemDataset | None = None
        self.statistics: CountedStatistics | None = None
        # An evaluation augments nothing, whatever the run was trained with.
        augmentations = [] if self.test_only else getattr(hparams, "spectrogram_augmentations", [])
        self.spectrogram_augmentation = SpectrogramAugmentation(augmentations, hparams.seed)
        self.last_test_loss = float("nan")
        self.num_cut = 0
        self.transcripts: dict[str, tuple[str, str]] = {}
        self.speech_encoder: SpeechEncoder = hparams.speech_encoder
        self.speech_encoder.compute_features.to(self.device)
        if hparams.cuda_graphs and not self.test_only:
            check_graphs(hparams, self)
        num_layers = len(hparams.Transformer.encoder.layers)
        if hparams.inter_ctc_layers and max(hparams.inter_ctc_layers) >= num_layers:
            raise UserError(
                f"inter_ctc_layers is {hparams.inter_ctc_layers}; of {num_layers} layers, those "
                f"between 1 and {num_layers - 1} are inner ones."
            )

    def describe(self, batch: PaddedBatch) -> str:
        """The ids of the utterances."""
        return ", ".join(batch.id)

    def amount(self, batch: PaddedBatch) -> float:
        """Seconds of audio; a perturbed or spliced utterance counts as that of the manifest."""
        return float(sum(batch.duration))

    def describe_size(self, batch: PaddedBatch) -> str:
        """Utterances and seconds."""
        longest_s = float(max(batch.duration))
        return (
            f"{len(batch.id)} utterances with {self.amount(batch):.0f} s of audio, the longest of "
            f"{longest_s:.1f} s"
        )

    def fit(self, epoch_counter, train_set, valid_set=None, *args, **kwargs):
        """As the parent's, where absolute positions reach all that is trained and scored on.

        Raises:
            UserError: they do not.
            Interrupted: see the parent's.
        """
        folder = Path(self.hparams.output_folder)
        speeds = getattr(getattr(self.perturbation, "perturb", None), "speeds", ())
        beyond = self._beyond_positions("training", train_set.data, min([100, *speeds]))
        beyond += self._beyond_positions("validation", valid_set.data)
        for split in self.hparams.test_splits:
            beyond += self._beyond_positions(split, read_rows(folder / f"{split}.csv", ""))
        self._require_none(beyond)
        super().fit(epoch_counter, train_set, valid_set, *args, **kwargs)

    def evaluate(self, test_set, *args, **kwargs):
        """As SpeechBrain's, where absolute positions reach all of the set.

        Raises:
            UserError: they do not.
        """
        self._require_none(self._beyond_positions("test", test_set.data))
        return super().evaluate(test_set, *args, **kwargs)

    def _beyond_positions(
        self, part: str, rows: Mapping[str, dict], slowest_percent: float = 100
    ) -> list[tuple[int, str]]:
        """What absolute positions do not reach: the longest need, and what has it."""
        network, needs = self.hparams.Transformer, []
        if network.has_absolute_positions:
            key = max(rows, key=lambda key: rows[key]["duration"])
            seconds = rows[key]["duration"] * 100 / slowest_percent
            samples = padded_samples(math.ceil(seconds * self.hparams.sample_rate))
            frames = int(self.speech_encoder.num_frames(samples))
            text = f"{part} utterance {key} ({seconds:.0f} s) needs {frames} frames"
            needs.append((frames, text))
        if network.has_absolute_targets:
            for key, row in rows.items():
                # A character is at most four tokens, its bytes.
                if 4 * len(row["wrd"]) + 2 > network.max_length:
                    tokens = len(tokens_of(self.tokenizer, row["wrd"])) + 1
                    needs.append((tokens, f"{part} utterance {key} needs {tokens} tokens"))
        return [need for need in needs if need[0] > network.max_length]

    def _require_none(self, beyond: Sequence[tuple[int, str]]) -> None:
        if beyond:
            most, text = max(beyond)
            raise UserError(
                f"Absolute positions end at max_length {self.hparams.Transformer.max_length}; "
                f"{text}. Cut or leave out what is longer, or train a new model with "
                f"--Transformer '{{max_length: {most}}}'."
            )

    def augments(self, stage: sb.Stage) -> bool:
        """Whether this stage is trained on augmented speech: from ``augment_from_epoch`` on."""
        return stage == sb.Stage.TRAIN and self.epoch >= self.hparams.augment_from_epoch

    def features(self, batch: PaddedBatch, epoch: int) -> tuple[Tensor, Tensor]:
        """Normalised features (B, T, M), from which the normaliser may learn, and their frames."""
        encoder = self.speech_encoder
        if self.statistics is not None:
            self.statistics.num_frames = int(encoder.num_feature_frames(batch.num_samples).sum())
        num_samples_B = to_device(batch.num_samples, self.device)
        return encoder.features(batch.sig.data, num_samples_B, epoch)

    def front_end(self, batch: PaddedBatch, stage: sb.Stage) -> FrontEndOutput:
        """Features, augmentation (see ``augments``) and front-end frames.

        With a ``consistency_weight`` what is augmented is repeated, each copy augmented anew.
        """
        hparams, encoder, copies = self.hparams, self.speech_encoder, 1
        lengths = encoder.num_feature_frames(batch.num_samples).tolist()
        feats_BTM, num_frames_B = self.features(batch, self.epoch)
        if self.augments(stage):
            copies = 2 if hparams.consistency_weight else 1
            feats_BTM = self.spectrogram_augmentation.copies(
                feats_BTM, lengths, batch.id, self.epoch, copies
            )
            num_frames_B = num_frames_B.repeat(copies)
        # From here on only dropout draws random numbers.
        if stage == sb.Stage.TRAIN:
            self.seed_step()
        frames_BTFC, num_frames_B = encoder.frontend(feats_BTM, num_frames_B)
        lengths = encoder.num_frames(batch.num_samples).tolist() * copies
        return FrontEndOutput(frames_BTFC, num_frames_B, lengths, copies)

    def inner_layers(self, stage: sb.Stage) -> list[int]:
        """Encoder layers whose outputs this stage trains with CTC, too."""
        return self.hparams.inter_ctc_layers if stage == sb.Stage.TRAIN else []

    def ctc_log_probs(self, encoder_BTD: Tensor, inner: Sequence[Tensor] = ()) -> list[Tensor]:
        """Log probabilities (B, T, V), float32, of the encoder's output, then of inner layers.

        Inner layers share the output layer, or have that of their self-conditioning.
        """
        conditioning = getattr(self.hparams.Transformer.encoder, "conditioning", None)
        of_output = [encoder_BTD] if conditioning is not None else [encoder_BTD, *inner]
        logits = list(self.modules.ctc_lin(torch.cat(of_output)).chunk(len(of_output)))
        if conditioning is not None and inner:
            logits += conditioning.ctc_lin(torch.cat(list(inner))).chunk(len(inner))
        return [logits_BTV.float().log_softmax(-1) for logits_BTV in logits]

    def ctc_objective(
        self,
        all_log_probs: Sequence[Tensor],
        front_end: FrontEndOutput,
        batch: PaddedBatch,
        stage: sb.Stage,
    ) -> Tensor:
        """CTC loss, mean over utterances; in training with the consistency of the two copies.

        Args:
            all_log_probs: what ``ctc_log_probs`` gave. Inner layers weigh ``inter_ctc_weight``
                together (arXiv:2102.03216) and have no part in the consistency.

        The first ``flat_start_epochs`` train with ``flat_start_loss``, whose priors fade out in the
        second half of them: set free at once, alignments can fall back to blanks.
        """
        hparams, training = self.hparams, stage == sb.Stage.TRAIN
        arguments = (
            batch.tokens.data.repeat(front_end.copies, 1),
            front_end.num_frames_B,
            to_device(batch.num_tokens, self.device).repeat(front_end.copies),
            hparams.blank_index,
        )
        criterion = ctc_loss
        if training and self.epoch <= hparams.flat_start_epochs:
            remaining = 1 - (self.epoch - 1) / hparams.flat_start_epochs
            criterion = partial(flat_start_loss, prior_scale=min(1.0, 2 * remaining))
        log_probs_BTV, *inner = all_log_probs
        loss_B, feasible_B = criterion(log_probs_BTV, *arguments)
        loss = mean_over_feasible(loss_B, feasible_B)
        if inner:
            losses = [mean_over_feasible(*criterion(one_BTV, *arguments)) for one_BTV in inner]
            loss = torch.lerp(loss, torch.stack(losses).mean(), hparams.inter_ctc_weight)
        if training:
            self.note_infeasible(front_end, batch)
            if front_end.copies > 1:
                loss = loss + hparams.consistency_weight * consistency_loss(
                    log_probs_BTV, front_end.num_frames_B, feasible_B
                )
        return loss

    def note_infeasible(self, front_end: FrontEndOutput, batch: PaddedBatch) -> None:
        """List utterances that were too short for their tokens in skipped.csv.

        Their CTC loss is zero; the attention loss of a joint model learns from them.
        """
        items = zip(
            batch.id, batch.said, batch.wrd, batch.num_tokens, batch.min_frames, strict=True
        )
        reasons = {
            utterance_id: f"{frames} frames for {int(needed)} (tokens and repetitions) after speed "
            "perturbation: no CTC loss"
            for (utterance_id, said, words, num_tokens, needed), frames in zip(
                items, front_end.num_frames, strict=False
            )
            # A spliced utterance is none of the corpus, and another one next time.
            if (frames < needed or num_tokens == 0) and said == words
        }
        if reasons:
            self.skipped.add(reasons)

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
        self.num_cut = 0
        self.on_scoring_start(stage)

    def prepare_splicing(self, epoch: int) -> None:
        """From ``splice_from_epoch`` on: cut the speech as soon as the model knows its words."""
        hparams = self.hparams
        self.splicing.epoch = epoch
        if epoch < hparams.splice_from_epoch or self.splicing.pieces:
            return
        cutter = WordCutter(
            self.tokenizer, hparams.sample_rate, hparams.splice_min_log_prob, hparams.blank_index
        )
        origin = {
            "step": self.optimizer_step,
            "epoch": epoch,
            "first_epoch": hparams.splice_from_epoch,
        }
        self._hear_levels()
        path = Path(hparams.save_folder) / "segments.json"
        self.splicing.use(cut_speech(self.emissions, cutter, path, origin))

    def _hear_levels(self) -> None:
        """Levels of the features, where a first epoch that splices has heard no speech yet."""
        normalize = self.hparams.normalize
        if normalize.norm_type != "global" or normalize.count:
            return
        normalize.train()
        for batch in self._recorded("levels of the features"):
            self.features(batch.to(self.device), epoch=0)
        normalize.eval()

    def emissions(self) -> Emissions:
        """The training speech as it was recorded, and what the CTC branch makes of it.

        Raises:
            Interrupted: SIGINT or SIGTERM came.
        """
        self.modules.eval()
        for batch in self._recorded("aligning words"):
            with torch.no_grad(), self.evaluation_ctx:
                outputs = self.compute_forward(batch, sb.Stage.VALID)
            yield batch, outputs.ctc_log_probs[0], outputs.front_end.num_frames_B

    def _recorded(self, doing: str) -> Iterator[PaddedBatch]:
        """Batches of the training speech as it was recorded, until a signal comes."""
        loader = self.make_dataloader(
            self.unperturbed,
            sb.Stage.VALID,
            ckpt_prefix=None,
            **evaluation_batches(self.unperturbed, vars(self.hparams)),
        )
        hidden = self.noprogressbar or not if_main_process()
        for batch in tqdm(loader, desc=doing, disable=hidden):
            self._end_if_asked_to()
            yield batch

    def _end_if_asked_to(self) -> None:
        _, stop = self.agree(True, self.stop_request.signal_number)
        if stop:
            raise Interrupted(stop)

    def _fit_train(self, train_set, epoch, enable):
        if torch.device(self.device).type == "cuda":
            train_set = CopiedAhead(train_set, self.device)
        super()._fit_train(train_set, epoch, enable)

    def on_fit_start(self):
        """As the parent's; the front end that is called is the one that synchronises gradients."""
        super().on_fit_start()
        self.speech_encoder.CNN = self.modules.CNN
        if torch.device(self.device).type == "cuda" and not is_distributed_initialized():
            self.statistics = CountedStatistics(self.hparams.normalize)
        if self.hparams.cuda_graphs:
            most, dtype = self.hparams.cuda_graphs, self.training_dtype
            stack, front_end = self.hparams.Transformer.encoder, self.hparams.CNN
            inner_layers = self.hparams.inter_ctc_layers
            stack.forward = GraphedEncoder(stack, most, CudaRecorder(), dtype, inner_layers)
            front_end.forward = GraphedFrontEnd(front_end, most, CudaRecorder(), dtype)

    def casts_weights(self) -> bool:
        """As the parent's; a captured step casts by itself."""
        return super().casts_weights() and not self.hparams.cuda_graphs

    def unwrap_modules(self) -> None:
        """As the parent's, for the front end too."""
        super().unwrap_modules()
        self.speech_encoder.CNN = self.modules.CNN

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
