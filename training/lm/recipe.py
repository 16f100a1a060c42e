"""From a command line and text to a trained language model that decoding can load."""

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from speechbrain.utils.checkpoints import average_checkpoints
from speechbrain.utils.distributed import ddp_barrier, if_main_process
from speechbrain.utils.run_opts import RunOptions

from common.errors import UserError
from common.files import atomic_write, file_digest
from decoding.pretrained_lm import LM_FILE, TOKENIZER_FILE
from inference.scoring.reports import run_record
from modules.weights import load_model_weights
from text.tokenizer import (
    TOKENIZER_SETTINGS,
    check_unknown_characters,
    count_unknown_characters,
    load_tokenizer,
    train_tokenizer,
)
from training.brains.optimization import count_parameters
from training.checkpoints.fingerprint import (
    Described,
    check_same,
    read_fingerprint,
    text_digest,
    write_fingerprint,
)
from training.checkpoints.run_tokenizer import copy_tokenizer, keep_tokenizer
from training.launch.command_line import CommandLine
from training.launch.processes import on_main
from training.launch.run_lock import sole_run
from training.launch.start import make_output_folder, start_run, write_hyperparams
from training.launch.yaml_file import resolved_text
from training.lm.brain import LMBrain, Perplexity
from training.lm.text_batches import TextBatches, TextLoader, read_sentences
from training.reporting.loggers import make_loggers

logger = logging.getLogger(__name__)

SAMPLE_SENTENCES = 50_000
"""Sentences that are searched for characters unknown to the tokenizer."""


def run_lm_recipe(argv: Sequence[str], description: str) -> dict[str, Perplexity]:
    """Prepares, trains (or resumes), evaluates, and leaves ``lm.ckpt`` and ``tokenizer.ckpt``.

    Args:
        argv: arguments of the command line, the YAML file first.
        description: of the script.

    Returns:
        perplexities of ``valid_text`` and ``test_text`` with the averaged weights.

    Raises:
        UserError: something that the user can mend.
        Interrupted: SIGINT or SIGTERM; the run can be resumed.
    """
    line, hparams, options = start_run(argv, description)
    with nullcontext() if options.test_only else sole_run(hparams["output_folder"]):
        return _run(line, hparams, options, argv)


def _run(
    line: CommandLine, hparams: dict, options: RunOptions, argv: Sequence[str]
) -> dict[str, Perplexity]:
    folder = Path(hparams["output_folder"])
    tokenizer_file = Path(hparams["save_folder"]) / "tokenizer.model"
    if options.test_only:
        on_main(_require_trained, tokenizer_file)
        hparams["checkpointer"].only_reads = True
    make_output_folder(hparams, options.test_only)
    if not options.test_only:
        on_main(prepare_training, line, hparams, tokenizer_file)
    tokenizer = load_tokenizer(tokenizer_file, hparams["output_neurons"])
    if line.init_from is not None and not options.test_only:
        load_model_weights(hparams["model"], Path(line.init_from), "file")
    brain = LMBrain(
        modules=hparams["modules"],
        opt_class=hparams["opt_class"],
        hparams=hparams,
        run_opts=options,
        checkpointer=hparams["checkpointer"],
    )
    texts = {"valid": paths_of(hparams["valid_text"]), "test": paths_of(hparams["test_text"])}
    held_out = {
        name: TextLoader(
            TextBatches(
                paths,
                tokenizer,
                hparams["max_batch_tokens"],
                max_sentence_tokens=hparams["max_sentence_tokens"],
            )
        )
        for name, paths in texts.items()
        if paths
    }
    for name, paths in texts.items():
        if paths and next(read_sentences(paths), None) is None:
            raise UserError(f"{name}_text: {', '.join(paths)} has no sentence: nothing to score.")
    if not options.test_only:
        if "valid" not in held_out:
            raise UserError(
                "valid_text is empty; the best checkpoints are chosen by its perplexity."
            )
        brain.loggers += make_loggers(hparams)
        brain.resume_from = line.resume
        text = TextBatches(
            paths_of(hparams["train_text"]),
            tokenizer,
            hparams["max_batch_tokens"],
            seed=hparams["seed"],
            num_parts=hparams["text_parts"],
            max_sentence_tokens=hparams["max_sentence_tokens"],
            skip_unknown=hparams["unknown_characters"] == "skip",
        )
        warn_of_unknown_characters(text, hparams["unknown_characters"])
        brain.text_loader = TextLoader(text, hparams["num_workers"])
        brain.fit(hparams["counter"], brain.text_loader, held_out["valid"])
    brain.unwrap_modules()
    export(brain, tokenizer_file, folder / "lm")
    with brain.stop_request:
        scores = {name: brain.perplexity_of(text) for name, text in held_out.items()}
    if if_main_process():
        command = [Path(sys.argv[0]).name, *argv]
        write_results(brain, scores, command)
        for name, score in scores.items():
            print(f"{name}: perplexity {score.value:.2f} over {score.num_tokens} tokens")
        print(f"Language model and tokenizer: {folder / 'lm'}")
    return scores


def _require_trained(tokenizer_file: Path) -> None:
    if not tokenizer_file.is_file():
        raise UserError(
            f"{tokenizer_file} is missing: --test_only needs the output_folder of a trained run."
        )


def prepare_training(line: CommandLine, hparams: Mapping, tokenizer_file: Path) -> None:
    """Tokenizer and records of a training; a run goes on with the text that it began with.

    Raises:
        UserError: see ``prepare_tokenizer``; or the run's checkpoints were trained on another text.
    """
    folder, texts = Path(hparams["output_folder"]), paths_of(hparams["train_text"])
    for path in texts:
        if not Path(path).is_file():
            raise UserError(f"There is no text file {path}.")
    digests = [file_digest(path) for path in texts]
    parts: dict[str, Described] = {
        "training text": {"files": " ".join(texts), "sha256": text_digest(" ".join(digests))}
    }
    has_checkpoints = bool(hparams["checkpointer"].list_checkpoints())
    earlier = read_fingerprint(folder) if has_checkpoints else {}
    check_same(folder, earlier, parts)
    prepare_tokenizer(hparams, tokenizer_file)
    parts["tokenizer"] = {"file": str(tokenizer_file), "sha256": file_digest(tokenizer_file)}
    check_same(folder, earlier, parts)
    parts["hyperparameters"] = {
        "file": str(line.param_file),
        "sha256": text_digest(resolved_text(line.param_file, line.overrides)),
    }
    write_hyperparams(line, folder)
    write_fingerprint(folder, parts)


def paths_of(value: str | Sequence[str] | None) -> list[str]:
    """One path or a list of them, as a YAML file may have it."""
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)


def prepare_tokenizer(hparams: Mapping, tokenizer_file: Path) -> None:
    """Copies ``tokenizer_path``, or trains a tokenizer on the first sentences of the text.

    Raises:
        UserError: there is no such file, the text does not support the tokenizer, or the run's
            checkpoints were trained with another one.
    """
    keep = partial(keep_tokenizer, tokenizer_file, checkpointer=hparams["checkpointer"])
    source = hparams["tokenizer_path"]
    if source is not None:
        if not Path(source).is_file():
            raise UserError(
                f"tokenizer_path {source} is no file. Give the recogniser's save/tokenizer.model, "
                "or null to train a tokenizer on the text."
            )
        load_tokenizer(source, hparams["output_neurons"])
        digest = file_digest(source)
        # Two files of one name are two tokenizers.
        keep({"tokenizer": digest[:12]}, digest, partial(copy_tokenizer, source, tokenizer_file))
        return
    texts = paths_of(hparams["train_text"])
    settings = {name: hparams[name] for name in TOKENIZER_SETTINGS}

    def train() -> None:
        sentences = islice(read_sentences(texts), hparams["tokenizer_sentences"])
        train_tokenizer(sentences, tokenizer_file, **settings)

    # A corpus of gigabytes is told by its size, not read.
    sizes = [[Path(path).name, Path(path).stat().st_size] for path in texts if Path(path).is_file()]
    keep(settings, [hparams["tokenizer_sentences"], *sizes], train)


def warn_of_unknown_characters(text: TextBatches, policy: str) -> None:
    """Lists characters of the first sentences that the tokenizer does not know.

    Raises:
        UserError: there are some, and ``policy`` is "error".
    """
    sample = islice(read_sentences(text.paths), SAMPLE_SENTENCES)
    unknown = count_unknown_characters(text.tokenizer, sample)
    check_unknown_characters(unknown, policy, "Training text")


def export(brain: LMBrain, tokenizer_file: Path, folder: Path) -> None:
    """Writes the mean of the best checkpoints and the tokenizer as a recogniser loads them.

    Without checkpoints the model of an earlier export is kept.

    Raises:
        UserError: the run has neither.
    """
    model_file = folder / LM_FILE
    best = brain.checkpointer.find_intact(
        min_key=brain.best_metric, max_num_checkpoints=brain.hparams.avg_checkpoints
    )
    if best and if_main_process():
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(model_file, "wb") as stream:
            torch.save(average_checkpoints(best, "model"), stream)
        with atomic_write(folder / TOKENIZER_FILE, "wb") as stream:
            stream.write(tokenizer_file.read_bytes())
    ddp_barrier()
    if not model_file.is_file():
        raise UserError(
            f"{brain.checkpointer.checkpoints_dir} holds no finished epoch to evaluate. "
            "Train first, or give the output_folder of a trained run."
        )
    load_model_weights(brain.hparams.model, model_file, "file")


def write_results(brain: LMBrain, scores: Mapping[str, Perplexity], command: list[str]) -> None:
    """Writes ``results.json``: perplexities, the model's size, and how to repeat the run."""
    results = {
        "splits": {
            name: {
                "perplexity": score.value,
                "tokens": score.num_tokens,
                "sentences": score.num_sentences,
            }
            for name, score in scores.items()
        },
        "model": {
            "parameters": count_parameters([brain.hparams.model]),
            "token_type": brain.hparams.token_type,
            "output_neurons": brain.hparams.output_neurons,
        },
        "run": run_record(
            seed=brain.hparams.seed,
            precision=brain.precision,
            device=brain.device,
            command=command,
        ),
    }
    with atomic_write(Path(brain.hparams.output_folder) / "results.json") as stream:
        json.dump(results, stream, indent=2)
        stream.write("\n")
