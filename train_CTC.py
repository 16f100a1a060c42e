"""Train a CTC recogniser and score it on the test splits.

python train_CTC.py hparams/CTC/conmamba_small.yaml --data_folder LibriSpeech --precision bf16
torchrun --nproc-per-node=4 train_CTC.py hparams/CTC/conmamba_large.yaml --data_folder LibriSpeech
"""

from collections.abc import Sequence
from dataclasses import dataclass

import speechbrain as sb
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.decoders.ctc import CTCBeamSearcher, ctc_greedy_decode
from torch import Tensor

from training.brain import ASRBrain, Encoded
from training.cli import run_script
from training.data import Loaders
from training.errors import UserError
from training.recipe import dataio_prepare, run_recipe
from training.tokenizer import vocabulary

__all__ = ["ASR", "dataio_prepare", "main"]


@dataclass
class CTCOutputs:
    """Log probabilities (B, T, V), float32, and what they were computed from."""

    ctc_log_probs_BTV: Tensor
    encoded: Encoded


class ASR(ASRBrain):
    """CTC training; two augmented copies per utterance where ``consistency_weight`` is not 0."""

    best_metric = "WER"
    best_is = "min"

    def compute_forward(self, batch: PaddedBatch, stage: sb.Stage) -> CTCOutputs:
        """Waveforms to log probabilities."""
        batch = batch.to(self.device)
        encoded = self.features(batch, stage)
        encoder_BTD, _ = self.modules.Transformer(encoded.feats, None, encoded.wav_lens)
        logits_BTV = self.modules.ctc_lin(encoder_BTD)
        return CTCOutputs(logits_BTV.float().log_softmax(-1), encoded)

    def compute_objectives(
        self, predictions: CTCOutputs, batch: PaddedBatch, stage: sb.Stage
    ) -> Tensor:
        """CTC loss per utterance, plus the consistency of the two copies."""
        return self.ctc_objective(predictions.ctc_log_probs_BTV, predictions.encoded, batch, stage)

    def decode(self, outputs: CTCOutputs, batch: PaddedBatch, stage: sb.Stage) -> list[str]:
        """Greedy in validation, beam search in test."""
        lengths_B = outputs.encoded.num_frames_B
        # A character tokenizer may have fewer tokens than the output layer has places for.
        log_probs_BTV = outputs.ctc_log_probs_BTV[..., : self.tokenizer.get_piece_size()]
        frames = log_probs_BTV.shape[1]
        if stage == sb.Stage.VALID:
            tokens = ctc_greedy_decode(
                log_probs_BTV, lengths_B / frames, blank_id=self.hparams.blank_index
            )
            return [self.tokenizer.decode(ids) for ids in tokens]
        # The searcher truncates length * frames: half a frame more keeps rounding out of it.
        beams = self.hparams.test_search(log_probs_BTV, (lengths_B + 0.5) / frames)
        return [beam[0].text for beam in beams]


def add_search(hparams: dict, loaders: Loaders) -> None:
    """Build the test search, which needs the tokenizer's vocabulary."""
    try:
        hparams["test_search"] = CTCBeamSearcher(
            vocab_list=vocabulary(loaders.tokenizer),
            blank_index=hparams["blank_index"],
            kenlm_model_path=hparams["kenlm_model_path"],
            alpha=hparams["alpha"],
            beta=hparams["beta"],
            beam_size=hparams["test_beam_size"],
            beam_prune_logp=hparams["beam_prune_logp"],
            token_prune_min_logp=hparams["token_prune_min_logp"],
            prune_history=hparams["prune_history"],
        )
    except ImportError:
        raise UserError("--kenlm_model_path needs kenlm: pip install -e '.[ngram]'") from None
    except OSError as error:
        raise UserError(f"kenlm_model_path {hparams['kenlm_model_path']}: {error}") from None


def main(argv: Sequence[str]) -> None:
    """Run the recipe with these command-line arguments."""
    run_recipe(argv, ASR, __doc__, add_search)


if __name__ == "__main__":
    run_script(main)
