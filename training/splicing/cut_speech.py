"""Cuts the training speech into segments of words, by the model that is being trained."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import sentencepiece as spm
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.utils.distributed import if_main_process
from torch import Tensor

from decoding.ctc_alignment import align_words
from training.launch.processes import on_main
from training.splicing.segments import Segment, cut_at_pauses, read_segments, write_segments

logger = logging.getLogger(__name__)

# A model that is sure of fewer utterances than this part has not learnt the words yet.
_ENOUGH = 0.5

Emissions = Iterable[tuple[PaddedBatch, Tensor, Tensor]]
"""Batches, their CTC log probabilities (batch, time, vocabulary) and integer frames (batch,)."""


@dataclass(frozen=True)
class WordCutter:
    """Cuts utterances of which the model is sure.

    Attributes:
        tokenizer: of the model.
        sample_rate: of the recordings.
        min_log_prob: of an utterance's best path, per token; below it the model is not sure.
        blank: the blank's id.
    """

    tokenizer: spm.SentencePieceProcessor
    sample_rate: int
    min_log_prob: float
    blank: int = 0

    def __call__(
        self, batch: PaddedBatch, log_probs_BTV: Tensor, num_frames_B: Tensor
    ) -> list[list[Segment] | None]:
        """The segments of each utterance; None where the model is not sure of its words."""
        log_probs_BTV = log_probs_BTV.float().cpu()
        of_each: list[list[Segment] | None] = []
        for row, utterance_id in enumerate(batch.id):
            frames, samples = int(num_frames_B[row]), int(batch.num_samples[row])
            tokens = batch.tokens.data[row, : int(batch.num_tokens[row])].tolist()
            alignment = align_words(
                log_probs_BTV[row, :frames],
                tokens,
                [self.tokenizer.id_to_piece(token) for token in tokens],
                self.blank,
            )
            words = batch.wrd[row].split()
            if (
                alignment is None
                or alignment.log_prob_per_token < self.min_log_prob
                or len(alignment.spans) != len(words)
            ):
                of_each.append(None)
                continue
            step = samples / frames
            spans = [(round(first * step), round(last * step)) for first, last in alignment.spans]
            wav_S = batch.sig.data[row, :samples].cpu().numpy()
            of_each.append(cut_at_pauses(wav_S, self.sample_rate, words, spans, utterance_id))
        return of_each


def cut_speech(
    emissions: Callable[[], Emissions],
    cut: WordCutter,
    path: Path,
    origin: Mapping[str, int],
) -> list[Segment]:
    """Segments of the utterances that the model is sure of; none if they are too few.

    They are kept in ``path`` and taken from there by a resumed run. While there are none, each
    epoch's beginning tries again.

    Args:
        emissions: goes through the training speech; every process must, for a forward pass of
            wrapped modules waits for the others.
        origin: where in the run this is: ``step``, ``epoch``, and ``first_epoch``, in which cutting
            is tried.
    """
    kept = on_main(_kept_segments, path, origin)
    if kept is not None:
        return kept
    segments = _find_segments(emissions(), cut)
    # Those of the main process, which alone has cut, as they are read back from the file.
    return on_main(_keep_segments, path, segments, origin)


def _kept_segments(path: Path, origin: Mapping[str, int]) -> list[Segment] | None:
    if not path.is_file():
        return None
    try:
        segments, found = read_segments(path)
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("%s is damaged (%s): the speech is cut anew.", path, error)
        return None
    # Those of a later model, or of one that was to know the words sooner, count no more.
    valid = found["step"] <= origin["step"] and found["first_epoch"] == origin["first_epoch"]
    if valid and (segments or found["epoch"] == origin["epoch"]):
        return segments
    return None


def _keep_segments(path: Path, segments: list[Segment], origin: Mapping[str, int]) -> list[Segment]:
    write_segments(path, segments, origin)
    return read_segments(path)[0]


def _find_segments(emissions: Emissions, cut: WordCutter) -> list[Segment]:
    of_each: list[list[Segment] | None] = []
    for batch, log_probs_BTV, num_frames_B in emissions:
        if if_main_process():
            of_each += cut(batch, log_probs_BTV, num_frames_B)
    if not if_main_process():
        return []
    sure = [segments for segments in of_each if segments is not None]
    if len(sure) < _ENOUGH * len(of_each):
        logger.info(
            "Nothing is spliced in this epoch: the model aligns only %d of %d utterances with "
            "confidence (splice_min_log_prob)",
            len(sure),
            len(of_each),
        )
        return []
    found = [segment for segments in sure for segment in segments]
    logger.info(
        "%d pieces with %d words are cut from %d of %d utterances",
        len(found),
        sum(len(segment.words.split()) for segment in found),
        len(sure),
        len(of_each),
    )
    return found
