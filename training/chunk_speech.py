"""Cuts the training speech into chunks of words, by the model that is being trained."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import speechbrain as sb
import torch
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.utils.distributed import if_main_process, run_on_main
from torch import Tensor
from tqdm import tqdm

from training.alignment import align_words
from training.errors import Interrupted
from training.word_chunks import Chunk, cut_at_pauses, read_chunks, write_chunks

if TYPE_CHECKING:
    from training.brain import ASRBrain

logger = logging.getLogger(__name__)

# A model that is sure of fewer utterances than this part has not learnt the words yet.
_ENOUGH = 0.5


def chunk_speech(brain: "ASRBrain", loader: Iterable, path: Path, epoch: int) -> list[Chunk]:
    """Chunks of the utterances of ``loader`` that the model is sure of; none if they are too few.

    They are kept in ``path`` and taken from there by a resumed run. While there are none, each
    epoch's beginning tries again.

    Raises:
        Interrupted: SIGINT or SIGTERM came.
    """
    first_epoch = brain.hparams.splice_from_epoch
    if path.is_file():
        chunks, origin = read_chunks(path)
        # Those of a later model, or of one that was to know the words sooner, count no more.
        valid = origin["step"] <= brain.optimizer_step and origin["first_epoch"] == first_epoch
        if valid and (chunks or origin["epoch"] == epoch):
            return chunks
    chunks = _find_chunks(brain, loader)
    origin = {"step": brain.optimizer_step, "epoch": epoch, "first_epoch": first_epoch}
    run_on_main(write_chunks, args=[path, chunks, origin])
    # Those of the main process, which alone has cut.
    return read_chunks(path)[0]


@torch.no_grad()
def _find_chunks(brain: "ASRBrain", loader: Iterable) -> list[Chunk]:
    chunks: list[Chunk] = []
    utterances = sure = 0
    brain.modules.eval()
    hidden = brain.noprogressbar or not if_main_process()
    # Every process goes through all of it: a forward pass of wrapped modules waits for the others.
    for batch in tqdm(loader, desc="aligning words", disable=hidden):
        _, stop = brain.agree(True, brain.stop_request.signal_number)
        if stop:
            raise Interrupted(stop)
        with brain.evaluation_ctx:
            outputs = brain.compute_forward(batch, sb.Stage.VALID)
        if if_main_process():
            log_probs_BTV = outputs.ctc_log_probs_BTV.float().cpu()
            of_each = _chunks_of_batch(brain, batch, log_probs_BTV, outputs.encoded.num_frames_B)
            utterances += len(of_each)
            sure += sum(found is not None for found in of_each)
            chunks += [chunk for found in of_each if found for chunk in found]
    if not if_main_process():
        return []
    if sure < _ENOUGH * utterances:
        logger.info(
            "Nothing is spliced in this epoch: the model aligns only %d of %d utterances with "
            "confidence (splice_min_log_prob)",
            sure,
            utterances,
        )
        return []
    words = sum(len(chunk.words.split()) for chunk in chunks)
    logger.info(
        "%d pieces with %d words are cut from %d of %d utterances",
        len(chunks),
        words,
        sure,
        utterances,
    )
    return chunks


def _chunks_of_batch(
    brain: "ASRBrain", batch: PaddedBatch, log_probs_BTV: Tensor, num_frames_B: Tensor
) -> list[list[Chunk] | None]:
    """The chunks of each utterance; None where the model is not sure of its words."""
    hparams, of_each = brain.hparams, []
    counts = brain.num_tokens(batch).tolist()
    for row, utterance_id in enumerate(batch.id):
        frames, samples = int(num_frames_B[row]), int(batch.num_samples[row])
        tokens = batch.tokens.data[row, : counts[row]].tolist()
        alignment = align_words(
            log_probs_BTV[row, :frames],
            tokens,
            [brain.tokenizer.id_to_piece(token) for token in tokens],
            hparams.blank_index,
        )
        words = batch.wrd[row].split()
        if (
            alignment is None
            or alignment.log_prob_per_token < hparams.splice_min_log_prob
            or len(alignment.spans) != len(words)
        ):
            of_each.append(None)
            continue
        step = samples / frames
        of_each.append(
            cut_at_pauses(
                batch.sig.data[row, :samples].cpu().numpy(),
                hparams.sample_rate,
                words,
                [(round(first * step), round(last * step)) for first, last in alignment.spans],
                utterance_id,
            )
        )
    return of_each
