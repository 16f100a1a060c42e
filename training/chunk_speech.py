"""Cuts the training speech into chunks of words, by the model that is being trained."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import speechbrain as sb
import torch
from speechbrain.utils.distributed import run_on_main
from tqdm import tqdm

from training.alignment import align_words
from training.errors import Interrupted
from training.word_chunks import Chunk, cut_at_pauses, read_chunks, write_chunks

if TYPE_CHECKING:
    from training.brain import ASRBrain

logger = logging.getLogger(__name__)


def chunk_speech(brain: "ASRBrain", loader: Iterable, path: Path) -> list[Chunk]:
    """Chunks of every utterance of ``loader``, kept in ``path``: a resumed run takes them there.

    Raises:
        Interrupted: SIGINT or SIGTERM came.
    """
    first_epoch = brain.hparams.splice_from_epoch
    if path.is_file():
        chunks, origin = read_chunks(path)
        # Those of a later model, or of one that was to know the words sooner, count no more.
        if origin["step"] <= brain.optimizer_step and origin["splice_from_epoch"] == first_epoch:
            return chunks
    chunks = _find_chunks(brain, loader)
    origin = {"step": brain.optimizer_step, "splice_from_epoch": first_epoch}
    run_on_main(write_chunks, args=[path, chunks, origin])
    words = sum(len(chunk.words.split()) for chunk in chunks)
    logger.info("%d words of training speech are cut into %d pieces", words, len(chunks))
    # Those of the main process: another device may round otherwise.
    return read_chunks(path)[0]


@torch.no_grad()
def _find_chunks(brain: "ASRBrain", loader: Iterable) -> list[Chunk]:
    tokenizer, hparams = brain.tokenizer, brain.hparams
    chunks: list[Chunk] = []
    brain.modules.eval()
    # Every process goes through all of it: a forward pass of wrapped modules waits for the others.
    for batch in tqdm(loader, desc="aligning words", disable=brain.noprogressbar):
        _, stop = brain.agree(True, brain.stop_request.signal_number)
        if stop:
            raise Interrupted(stop)
        with brain.evaluation_ctx:
            outputs = brain.compute_forward(batch, sb.Stage.VALID)
        log_probs_BTV = brain.ctc_log_probs(outputs).float().cpu()
        for row, utterance_id in enumerate(batch.id):
            frames = int(outputs.encoded.num_frames_B[row])
            samples = int(batch.num_samples[row])
            tokens = batch.tokens.data[row, : int(brain.num_tokens(batch)[row])].tolist()
            starts_word = [tokenizer.id_to_piece(token).startswith("▁") for token in tokens]
            spans = align_words(
                log_probs_BTV[row, :frames], tokens, starts_word, hparams.blank_index
            )
            words = batch.wrd[row].split()
            # A word whose characters are all unknown has no tokens.
            if spans is None or len(spans) != len(words):
                continue
            step = samples / frames
            chunks += cut_at_pauses(
                batch.sig.data[row, :samples].cpu().numpy(),
                hparams.sample_rate,
                words,
                [(round(first * step), round(last * step)) for first, last in spans],
                utterance_id,
            )
    return chunks
