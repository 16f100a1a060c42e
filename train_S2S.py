"""Train a joint CTC/attention recogniser and score it on the test splits.

python train_S2S.py hparams/S2S/conmambamamba_small.yaml --data_folder LibriSpeech --no_lm True
torchrun --nproc-per-node=4 train_S2S.py hparams/S2S/conmamba_large.yaml --data_folder LibriSpeech
"""

from collections.abc import Sequence
from dataclasses import dataclass

import speechbrain as sb
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.nnet.losses import kldiv_loss
from speechbrain.utils.Accuracy import AccuracyStats
from torch import Tensor

from decoding.beam_search import CachedBeamSearcher
from decoding.ctc_prefix_scorer import CTCScorer
from decoding.lm_scorers import CachedLMScorer, KenLMScorer
from decoding.scorers import ScorerBuilder, scorer_key
from training.brain import ASRBrain, Encoded
from training.cli import run_script
from training.data import Loaders
from training.errors import UserError
from training.language_model import load_lm_scorer, load_token_ngram
from training.recipe import dataio_prepare, run_recipe
from training.token_noise import replace_tokens

__all__ = ["ASR", "dataio_prepare", "main"]


@dataclass
class S2SOutputs:
    """Encoder output (B, T, D), log probabilities of both branches, and their input."""

    encoder_BTD: Tensor
    ctc_log_probs_BTV: Tensor
    seq_log_probs_BUV: Tensor
    encoded: Encoded


class ASR(ASRBrain):
    """Joint CTC and label-smoothed attention training (``ctc_weight``)."""

    best_metric = "ACC"
    best_is = "max"

    def compute_forward(self, batch: PaddedBatch, stage: sb.Stage) -> S2SOutputs:
        """Waveforms and the tokens so far to log probabilities."""
        batch = batch.to(self.device)
        encoded = self.features(batch, stage)
        tokens_BU = batch.tokens_bos.data.repeat(encoded.copies, 1)
        if stage == sb.Stage.TRAIN and self.hparams.decoder_token_noise:
            tokens_BU = replace_tokens(
                tokens_BU,
                self.hparams.decoder_token_noise,
                self.hparams.pad_index,
                num_special=self.hparams.eos_index + 1,
                vocabulary=self.hparams.output_neurons,
            )
        encoder_BTD, decoder_BUD = self.modules.Transformer(
            encoded.feats, tokens_BU, encoded.wav_lens, pad_idx=self.hparams.pad_index
        )
        return S2SOutputs(
            encoder_BTD,
            self.modules.ctc_lin(encoder_BTD).float().log_softmax(-1),
            self.modules.seq_lin(decoder_BUD).float().log_softmax(-1),
            encoded,
        )

    def compute_objectives(
        self, predictions: S2SOutputs, batch: PaddedBatch, stage: sb.Stage
    ) -> Tensor:
        """``ctc_weight`` times the CTC loss plus the rest of one times the attention loss."""
        encoded, hparams = predictions.encoded, self.hparams
        copies = encoded.copies
        ctc = self.ctc_objective(predictions.ctc_log_probs_BTV, encoded, batch, stage)
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
        num_targets_B = self.num_tokens(batch).to(self.device) + 1
        return (num_targets_B - 0.5) / batch.tokens_eos.data.shape[1]

    def decode(self, outputs: S2SOutputs, batch: PaddedBatch, stage: sb.Stage) -> list[str] | None:
        """Beam search; in validation every ``valid_search_interval`` epochs."""
        if stage == sb.Stage.VALID and not self.searches_this_epoch():
            return None
        search = self.hparams.valid_search if stage == sb.Stage.VALID else self.hparams.test_search
        tokens, _, _, _ = search(outputs.encoder_BTD, outputs.encoded.wav_lens)
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


def add_search(hparams: dict, loaders: Loaders) -> None:
    """Build both searches; the language model joins that of the test splits unless ``no_lm``.

    Without it nothing else changes: same beam, same temperature, same CTC weight.
    """
    del loaders
    ctc = CTCScorer(
        ctc_fc=hparams["ctc_lin"],
        blank_index=hparams["blank_index"],
        eos_index=hparams["eos_index"],
    )
    language_models = [] if hparams["no_lm"] else [load_lm_scorer(hparams)]
    ngram = load_token_ngram(hparams)
    hparams["valid_search"] = _search(hparams, hparams["valid_beam_size"], ctc, [])
    hparams["test_search"] = _search(
        hparams, hparams["test_beam_size"], ctc, language_models, ngram
    )


def _search(
    hparams: dict,
    beam_size: int,
    ctc: CTCScorer,
    language_models: list[CachedLMScorer],
    ngram: KenLMScorer | None = None,
) -> CachedBeamSearcher:
    weights = {scorer_key(scorer): hparams["lm_weight"] for scorer in language_models}
    if not 0 <= hparams["ctc_weight_decode"] < 1:
        raise UserError(
            f"ctc_weight_decode is {hparams['ctc_weight_decode']}; it must be at least 0 and below "
            "1. train_CTC.py decodes with CTC alone."
        )
    weights["ctc"] = hparams["ctc_weight_decode"]
    if ngram is not None:
        weights["kenlm"] = hparams["token_ngram_weight"]
    return CachedBeamSearcher(
        modules=[hparams["Transformer"], hparams["seq_lin"]],
        bos_index=hparams["bos_index"],
        eos_index=hparams["eos_index"],
        min_decode_ratio=hparams["min_decode_ratio"],
        max_decode_ratio=hparams["max_decode_ratio"],
        beam_size=beam_size,
        temperature=hparams["temperature"],
        using_eos_threshold=hparams["using_eos_threshold"],
        eos_threshold=hparams["eos_threshold"],
        length_normalization=hparams["length_normalization"],
        scorer=ScorerBuilder(
            full_scorers=language_models,
            partial_scorers=[ctc] if ngram is None else [ctc, ngram],
            weights=weights,
            scorer_beam_scale=hparams["scorer_beam_scale"],
        ),
    )


def main(argv: Sequence[str]) -> None:
    """Run the recipe with these command-line arguments."""
    run_recipe(argv, ASR, __doc__, add_search)


if __name__ == "__main__":
    run_script(main)
