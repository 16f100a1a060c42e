"""Scoring a trained model on test splits: averaged weights, search, reports."""

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.utils.checkpoints import average_checkpoints
from speechbrain.utils.distributed import ddp_barrier, if_main_process, is_distributed_initialized

from common.errors import UserError
from common.files import atomic_write
from inference.bundle import RUN_BUNDLE, write_bundle
from inference.scoring.reports import SplitScore, run_record, update_results, write_split_report
from modules.weights import load_model_weights
from training.brains.asr_brain import ASRBrain
from training.brains.optimization import count_parameters
from training.data.recordings import evaluation_batches

logger = logging.getLogger(__name__)


def average_best(brain: ASRBrain, num_best: int) -> None:
    """Load the mean of the best checkpoints' weights and keep it as ``save/averaged``.

    Without checkpoints the ``save/averaged`` of an earlier evaluation is loaded.

    Raises:
        UserError: the run has neither, or they belong to another architecture.
    """
    folder = Path(brain.checkpointer.checkpoints_dir) / "averaged"
    key = {f"{brain.best_is}_key": brain.best_metric}
    best = brain.checkpointer.find_intact(**key, max_num_checkpoints=num_best)
    if best and if_main_process():
        folder.mkdir(parents=True, exist_ok=True)
        for checkpoint in best:
            # A clear message before averaging meets tensors of different shapes.
            load_model_weights(brain.hparams.model, checkpoint.paramfiles["model"])
        with atomic_write(folder / "model.ckpt", "wb") as stream:
            torch.save(average_checkpoints(best, "model"), stream)
        with atomic_write(folder / "normalizer.ckpt", "wb") as stream:
            stream.write(best[0].paramfiles["normalizer"].read_bytes())
        with atomic_write(folder / "averaged.json") as stream:
            metric = brain.best_metric
            described = [
                {"checkpoint": c.path.name, "epoch": c.meta["epoch"], metric: c.meta[metric]}
                for c in best
            ]
            json.dump(described, stream, indent=2)
    ddp_barrier()
    if not (folder / "model.ckpt").is_file():
        raise UserError(
            f"{brain.checkpointer.checkpoints_dir} holds no finished epoch to evaluate. "
            "Train first, or give the output_folder of a trained run."
        )
    load_model_weights(brain.hparams.model, folder / "model.ckpt")
    brain.hparams.normalize._load(folder / "normalizer.ckpt")
    if if_main_process() and best:
        epochs = ", ".join(str(c.meta["epoch"]) for c in best)
        logger.info("Evaluating the mean of %d checkpoint(s), epochs %s", len(best), epochs)


def evaluate_split(brain: ASRBrain, split: str, dataset: DynamicItemDataset) -> SplitScore | None:
    """Decode one split, every rank its share; returns the score on the main process."""
    loader_kwargs = evaluation_batches(dataset, vars(brain.hparams))
    batches = list(loader_kwargs["batch_sampler"])
    if is_distributed_initialized():
        batches = batches[brain.rank :: torch.distributed.get_world_size()]
    loader_kwargs["batch_sampler"] = batches
    started = time.perf_counter()
    brain.last_test_loss = brain.evaluate(dataset, test_loader_kwargs=loader_kwargs)
    decode_s = time.perf_counter() - started
    transcripts = brain.transcripts
    if is_distributed_initialized():
        shares = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(shares, (transcripts, decode_s))
        transcripts = {key: value for share, _ in shares for key, value in share.items()}
        decode_s = max(seconds for _, seconds in shares)
    if not if_main_process():
        return None
    ids = sorted(transcripts)
    return write_split_report(
        brain.hparams.output_folder,
        split,
        ids,
        [transcripts[i][0] for i in ids],
        [transcripts[i][1] for i in ids],
        audio_s=sum(float(row["duration"]) for row in dataset.data.values()),
        decode_s=decode_s,
    )


def evaluate_splits(
    brain: ASRBrain,
    datasets: Mapping[str, DynamicItemDataset],
    command: list[str],
    test_only: bool = False,
) -> dict[str, SplitScore]:
    """Evaluate every split with the averaged weights; results.json is written after each.

    Args:
        command: the command line, for results.json.
        test_only: this process did not train the model: results.json keeps the record of who did.
    """
    brain.unwrap_modules()
    average_best(brain, brain.hparams.avg_checkpoints)
    scores = {}
    with brain.stop_request:
        for split, dataset in datasets.items():
            score = evaluate_split(brain, split, dataset)
            stats = {}
            if score is not None:
                scores[split] = score
                update_results(
                    brain.hparams.output_folder,
                    {split: score},
                    model=describe_model(brain),
                    run=run_record(
                        seed=brain.hparams.seed,
                        precision=brain.precision,
                        device=brain.device,
                        command=command,
                    ),
                    test_only=test_only,
                )
                stats = {"loss": brain.last_test_loss, "WER": score.wer, "CER": score.cer}
            # On every process: a logger writes on the main one and then waits for the others.
            for stats_logger in brain.loggers:
                stats_logger.log_stats({"split": split}, test_stats=stats)
    return scores


def leave_bundle(output_folder: str | Path) -> None:
    """Write the run's bundle, in place of an earlier one; what prevents it is a warning."""
    run = Path(output_folder)
    try:
        write_bundle(run, run / RUN_BUNDLE)
    except (UserError, OSError) as error:
        logger.warning("The run has no bundle of its model: %s", error)


def describe_model(brain: ASRBrain) -> dict:
    """What results.json says of the model."""
    hparams = brain.hparams
    return {
        "parameters": count_parameters([hparams.model]),
        "encoder_module": hparams.encoder_module,
        "decoder_module": getattr(hparams, "decoder_module", None),
        "token_type": hparams.token_type,
        "output_neurons": hparams.output_neurons,
    }
