"""Scoring a trained model on test splits: averaged weights, search, reports."""

import json
import logging
import pickle
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.utils.checkpoints import Checkpoint
from speechbrain.utils.distributed import if_main_process, is_distributed_initialized

from common.errors import UserError
from common.files import atomic_write
from inference.bundle import RUN_BUNDLE, write_bundle
from inference.scoring.error_analysis import case_hint
from inference.scoring.reports import (
    SplitScore,
    record_evaluation,
    run_record,
    update_results,
    write_split_report,
)
from modules.weights import digest_of, load_model_weights
from training.brains.asr_brain import ASRBrain
from training.brains.optimization import count_parameters
from training.checkpoints.checkpointer import mean_weights
from training.data.recordings import evaluation_batches
from training.launch.processes import num_ranks, on_main
from training.named_evaluation import Evaluation

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BestWeights:
    """What the best checkpoints say together.

    Attributes:
        model, normalizer: the means of their weights and of their statistics.
        described: what they are: the mean's ``averaged.json``.
    """

    model: dict[str, torch.Tensor]
    normalizer: dict[str, Any]
    described: list[dict[str, Any]]


def average_best(brain: ASRBrain, num_best: int, keep: bool = True) -> str:
    """Load the mean of the best checkpoints, or without any that of an earlier evaluation.

    Args:
        num_best: checkpoints.
        keep: leave the mean as ``save/averaged``, the model that the run's scores are of.

    Returns:
        digest of the weights.

    Raises:
        UserError: the run has neither, or they are damaged or belong to another architecture.
    """
    folder = Path(brain.checkpointer.checkpoints_dir) / "averaged"
    best = on_main(best_weights, brain, num_best)
    if best is None:
        best = on_main(read_averaged, brain, folder)
    elif keep and if_main_process():
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in (("model", best.model), ("normalizer", best.normalizer)):
            with atomic_write(folder / f"{name}.ckpt", "wb") as stream:
                torch.save(content, stream)
        with atomic_write(folder / "averaged.json") as stream:
            json.dump(best.described, stream, indent=2)
    brain.hparams.model.load_state_dict(best.model)
    normalize = brain.hparams.normalize
    normalize._load_statistics_dict(
        {key: _moved(value, normalize.device) for key, value in best.normalizer.items()}
    )
    return digest_of(best.model)[:16]


def best_weights(brain: ASRBrain, num_best: int) -> BestWeights | None:
    """The mean of the best checkpoints; None where there is no checkpoint of a finished epoch.

    Raises:
        UserError: they belong to another architecture.
    """

    def read(best: Sequence[Checkpoint]) -> BestWeights:
        return BestWeights(
            mean_weights(best),
            mean_statistics([_loaded(c.paramfiles["normalizer"]) for c in best]),
            [
                {
                    "checkpoint": c.path.name,
                    "epoch": c.meta["epoch"],
                    brain.best_metric: c.meta[brain.best_metric],
                }
                for c in best
            ],
        )

    key = {f"{brain.best_is}_key": brain.best_metric}
    weights = brain.checkpointer.of_best(read, num_best, **key)
    if weights is not None:
        epochs = ", ".join(str(of_one["epoch"]) for of_one in weights.described)
        logger.info("Evaluating the mean of the best checkpoints (epoch %s)", epochs)
    return weights


def mean_statistics(normalizers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of what normalisers have collected; where they agree, exactly that."""
    first = normalizers[0]
    mean = dict(first, count=max(state["count"] for state in normalizers))
    for key, value in first.items():
        if isinstance(value, torch.Tensor) and value.numel():
            differences = torch.stack([state[key] - value for state in normalizers])
            mean[key] = value + differences.mean(0)
    return mean


def read_averaged(brain: ASRBrain, folder: Path) -> BestWeights:
    """The ``save/averaged`` of an earlier evaluation.

    Raises:
        UserError: there is none, it is damaged, or it belongs to another architecture.
    """
    model, normalizer = folder / "model.ckpt", folder / "normalizer.ckpt"
    if not model.is_file():
        raise UserError(
            f"{folder.parent} holds no finished epoch to evaluate. "
            "Train first, or give the output_folder of a trained run."
        )
    load_model_weights(brain.hparams.model, model)
    try:
        statistics = _loaded(normalizer)
        mean_statistics([statistics])
    except (OSError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError, EOFError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else "is damaged"
        raise UserError(
            f"{normalizer} {reason}, and there is no checkpoint to make it from. Copy it from "
            "where the run was trained: no other normaliser suits the model."
        ) from None
    return BestWeights(_loaded(model), statistics, [])


def _loaded(path: str | Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


def _moved(value: Any, device: str | torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def evaluate_split(
    brain: ASRBrain, split: str, dataset: DynamicItemDataset, folders: Sequence[Path]
) -> SplitScore | None:
    """Decode one split, every rank its share; returns the score on the main process.

    Args:
        folders: get the reports.
    """
    loader_kwargs = evaluation_batches(dataset, vars(brain.hparams))
    batches = list(loader_kwargs["batch_sampler"])
    if is_distributed_initialized():
        batches = batches[brain.rank :: num_ranks()]
    loader_kwargs["batch_sampler"] = batches
    started = time.perf_counter()
    loss = brain.evaluate(dataset, test_loader_kwargs=loader_kwargs)
    decode_s = time.perf_counter() - started
    transcripts, num_cut = brain.transcripts, brain.num_cut
    if is_distributed_initialized():
        shares = [None] * num_ranks()
        mine = {"texts": transcripts, "s": decode_s, "cut": num_cut}
        torch.distributed.all_gather_object(shares, mine | {"loss": loss, "n": len(batches)})
        transcripts = {key: value for share in shares for key, value in share["texts"].items()}
        decode_s, num_cut = max(s["s"] for s in shares), sum(s["cut"] for s in shares)
        # A process may have had no batch, whose mean is no loss.
        losses = [(share["loss"], share["n"]) for share in shares if share["n"]]
        loss = sum(of_one * n for of_one, n in losses) / max(sum(n for _, n in losses), 1)
    brain.last_test_loss = loss
    if not if_main_process():
        return None
    ids = sorted(transcripts)
    if num_cut:
        logger.warning(
            "%s: %d of %d hypotheses were cut because they did not end: they had as many tokens as "
            "max_decode_ratio (%s per frame) allows.",
            *(split, num_cut, len(ids), brain.hparams.max_decode_ratio),
        )
    score = None
    for folder in folders:
        score = write_split_report(
            folder,
            split,
            ids,
            [transcripts[i][0] for i in ids],
            [transcripts[i][1] for i in ids],
            audio_s=sum(float(row["duration"]) for row in dataset.data.values()),
            decode_s=decode_s,
            speakers={key: row["spk_id"] for key, row in dataset.data.items()},
        )
    if hint := case_hint([transcripts[i] for i in ids], score.wer):
        logger.warning("%s: %s", split, hint)
    return score


def evaluate_splits(
    brain: ASRBrain,
    datasets: Mapping[str, DynamicItemDataset],
    command: list[str],
    evaluation: Evaluation | None = None,
) -> dict[str, SplitScore]:
    """Evaluate every split with the averaged weights; results.json is written after each.

    Args:
        command: the command line, for results.json.
        evaluation: of a run that is not trained now; None ends a training.
    """
    brain.unwrap_modules()
    is_own = evaluation is None or evaluation.is_own
    weights = average_best(brain, brain.hparams.avg_checkpoints, keep=is_own)
    run = Path(brain.hparams.output_folder)
    folders = [run] if is_own else []
    if evaluation is not None:
        folders.append(evaluation.folder)
    meta = {} if is_own else {"evaluation": evaluation.name}
    scores = {}
    brain.stop_request.what_follows = "stopping after this batch"
    with brain.stop_request:
        for split, dataset in datasets.items():
            score = evaluate_split(brain, split, dataset, folders)
            stats = {}
            if score is not None:
                scores[split] = score
                record = run_record(
                    seed=brain.hparams.seed,
                    precision=brain.precision,
                    eval_precision=brain.eval_precision,
                    device=brain.device,
                    command=command,
                )
                if is_own:
                    model = describe_model(brain) | {"weights": weights}
                    update_results(
                        run, {split: score}, model, record if evaluation is None else None
                    )
                if evaluation is not None:
                    record_evaluation(
                        *(evaluation.place, evaluation.name, {split: score}),
                        *(evaluation.settings, record | {"weights": weights}),
                    )
                stats = {"loss": brain.last_test_loss, "WER": score.wer, "CER": score.cer}
            # On every process: a logger writes on the main one and then waits for the others.
            for stats_logger in brain.loggers:
                stats_logger.log_stats(meta | {"split": split}, test_stats=stats)
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
