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
from torch import Tensor

from decoding.ctc_beam_search import ctc_greedy
from decoding.searches import make_ctc_search
from training.brains.asr_brain import ASRBrain, FrontEndOutput
from training.recipe import dataio_prepare, run_recipe

__all__ = ["ASR", "dataio_prepare", "main"]


@dataclass
class CTCOutputs:
    """Log probabilities (B, T, V), float32, and what they were computed from."""

    ctc_log_probs_BTV: Tensor
    front_end: FrontEndOutput


class ASR(ASRBrain):
    """CTC training; two augmented copies per utterance where ``consistency_weight`` is not 0."""

    best_metric = "WER"
    best_is = "min"

    def compute_forward(self, batch: PaddedBatch, stage: sb.Stage) -> CTCOutputs:
        """Waveforms to log probabilities."""
        batch = batch.to(self.device)
        front_end = self.front_end(batch, stage)
        encoder_BTD, _ = self.modules.Transformer(
            front_end.frames_BTFC, None, front_end.num_frames_B
        )
        logits_BTV = self.modules.ctc_lin(encoder_BTD)
        return CTCOutputs(logits_BTV.float().log_softmax(-1), front_end)

    def compute_objectives(
        self, predictions: CTCOutputs, batch: PaddedBatch, stage: sb.Stage
    ) -> Tensor:
        """CTC loss per utterance, plus the consistency of the two copies."""
        return self.ctc_objective(
            predictions.ctc_log_probs_BTV, predictions.front_end, batch, stage
        )

    def decode(self, outputs: CTCOutputs, batch: PaddedBatch, stage: sb.Stage) -> list[str]:
        """Greedy in validation, beam search in test."""
        # A character tokenizer may have fewer tokens than the output layer has places for.
        size = self.tokenizer.get_piece_size()
        log_probs_BTV = outputs.ctc_log_probs_BTV[..., :size].cpu().numpy()
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
