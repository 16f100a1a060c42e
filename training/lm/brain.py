"""The Brain of a language model."""

import logging
import math
from dataclasses import dataclass
from typing import Any

import speechbrain as sb
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from text.tokenizer import BOS_ID
from training.brains.run_brain import RunBrain
from training.data.copied_ahead import to_device
from training.launch.processes import num_ranks
from training.lm.text_batches import PAD_ID, TextBatch, TextLoader
from training.seeding import seed_everything

logger = logging.getLogger(__name__)


@dataclass
class Perplexity:
    """Running perplexity per token, ends of sentences included.

    Attributes:
        total_nats: negative log-likelihood of all tokens.
        num_tokens: how many they are.
        num_sentences: of how many sentences.
    """

    total_nats: float = 0.0
    num_tokens: int = 0
    num_sentences: int = 0

    def add(self, mean_nats: float, batch: TextBatch) -> None:
        """Counts a batch whose tokens have this mean negative log-likelihood."""
        tokens = int(batch.num_tokens_B.sum())
        self.total_nats += mean_nats * tokens
        self.num_tokens += tokens
        self.num_sentences += int((batch.tokens_bos[:, 0] == BOS_ID).sum())

    @property
    def value(self) -> float:
        """The perplexity; infinity beyond what a number can hold."""
        try:
            return math.exp(self.total_nats / self.num_tokens)
        except OverflowError:
            return math.inf


class LMBrain(RunBrain):
    """Trains a model from tokens (batch, U) to logits (batch, U, V) to predict each next token.

    ``text_loader``, of the training text, is set before ``fit``.
    """

    best_metric = "PPL"
    amount_unit = "tokens"
    text_loader: TextLoader

    def compute_forward(self, batch: TextBatch, stage: sb.Stage) -> Tensor:
        """Tokens to logits (B, U, V)."""
        if stage == sb.Stage.TRAIN:
            # Dropout depends on the place in the run, so that a resumed run is the unbroken one.
            seed_everything(self.hparams.seed, self.epoch, self.step, self.rank)
        return self.modules.model(to_device(batch.tokens_bos, self.device))

    def compute_objectives(self, predictions: Tensor, batch: TextBatch, stage: sb.Stage) -> Tensor:
        """Mean cross-entropy per token in nats; smoothed labels in training only."""
        training = stage == sb.Stage.TRAIN
        loss = cross_entropy(
            predictions.float().flatten(0, 1),
            to_device(batch.tokens_eos, self.device).flatten(),
            ignore_index=PAD_ID,
            label_smoothing=self.hparams.label_smoothing if training else 0.0,
        )
        if training:
            self.num_cut += batch.num_cut
        else:
            self.perplexity.add(float(loss), batch)
        return loss

    def describe(self, batch: TextBatch) -> str:
        """The first sentence, as tokens."""
        return f"{len(batch.num_tokens_B)} sentences, first tokens {batch.tokens_bos[0].tolist()}"

    def amount(self, batch: TextBatch) -> float:
        """Tokens that are predicted."""
        return float(batch.num_tokens_B.sum())

    def is_last_batch(self) -> bool:
        """Whether the batch in work is the last one of the epoch."""
        return self.text_loader.gave_last

    def position(self) -> Any:
        """The count of batches says it, as long as they are the same batches."""
        return {"order": self.text_loader.dataset.order()}

    def go_on_from(self, position: Any) -> bool:
        """Enter an epoch amid its batches, if they are those of the checkpoint."""
        text = self.text_loader.dataset
        text.set_position(1, self.step, self.rank, num_ranks())
        return position == {"order": text.order()}

    def on_stage_start(self, stage, epoch=None):
        """Seed the stage; go to its first batch of text, or start counting."""
        super().on_stage_start(stage, epoch)
        if stage == sb.Stage.TRAIN:
            self.num_cut = 0
            self.text_loader.dataset.set_position(epoch, self.step, self.rank, num_ranks())
        else:
            self.perplexity = Perplexity()

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Log an epoch; say how many of its sentences were cut."""
        super().on_stage_end(stage, stage_loss, epoch)
        if stage == sb.Stage.TRAIN and self.num_cut:
            text = self.text_loader.dataset
            logger.warning(
                "Epoch %d%s: %d sentences were cut to max_sentence_tokens (%d).",
                epoch,
                f" from batch {text.first_batch + 1} on" if text.first_batch else "",
                self.num_cut,
                text.max_sentence_tokens,
            )

    def validation_stats(self, loss: float) -> dict[str, float]:
        """Mean cross-entropy per token, and the perplexity."""
        return {
            "loss": self.perplexity.total_nats / self.perplexity.num_tokens,
            "PPL": self.perplexity.value,
        }

    def perplexity_of(self, text: DataLoader) -> Perplexity:
        """Perplexity of a held-out text."""
        self.evaluate(text)
        return self.perplexity
