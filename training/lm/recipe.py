"""From a command line and text to a trained language model that decoding can load."""

import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from speechbrain.utils.distributed import if_main_process
from speechbrain.utils.run_opts import RunOptions

from common.errors import UserError
from common.files import alone_with, atomic_write, file_digest
from decoding.pretrained_lm import LM_FILE, TOKENIZER_FILE
from inference.scoring.reports import kept_results, read_any_results, run_record, store_results
from modules.weights import load_model_weights
from text.tokenizer import (
    MOST_CHARACTERS,
    TOKENIZER_SETTINGS,
    check_letter_case,
    check_unknown_characters,
    count_unknown_characters,
    load_tokenizer,
    train_tokenizer,
)
from training.brains.optimization import count_parameters
from training.checkpoints.checkpointer import mean_weights
from training.checkpoints.fingerprint import (
    VALIDATION_DATA,
    Described,
    check_same,
    file_described,
    read_fingerprint,
    text_digest,
    warn_of_other_validation,
    write_fingerprint,
)
from training.checkpoints.output_layer import outputs_for, outputs_of_run, with_outputs
from training.checkpoints.run_tokenizer import (
    check_tokens_of_weights,
    copy_tokenizer,
    keep_tokenizer,
    tokenizer_of_weights,
)
from training.launch.command_line import CommandLine
from training.launch.processes import num_ranks, on_main
from training.launch.run_lock import sole_run
from training.launch.start import (
    make_output_folder,
    place_for_reports,
    start_run,
    write_hyperparams,
)
from training.launch.yaml_file import read_yaml, resolved_text
from training.lm.brain import LMBrain, Perplexity
from training.lm.text_batches import TextBatches, TextLoader, read_sentences
from training.named_evaluation import checked_name, earlier_evaluations, free_name
from training.reporting.loggers import make_loggers

TRAINING_TEXT = "training text"

SAMPLE_SENTENCES = 50_000
"""Sentences that are searched for characters unknown to the tokenizer, unless these are errors."""


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
    line, hparams, options = start_run(argv, description, with_text_name)
    with nullcontext() if options.test_only else sole_run(hparams["output_folder"]):
        return _run(line, hparams, options, argv)


def _run(
    line: CommandLine, hparams: dict, options: RunOptions, argv: Sequence[str]
) -> dict[str, Perplexity]:
    folder = Path(hparams["output_folder"])
    tokenizer_file = Path(hparams["save_folder"]) / "tokenizer.model"
    if options.test_only:
        on_main(_require_trained, tokenizer_file)
    place = on_main(place_for_reports, folder) if options.test_only else folder
    make_output_folder(place, options.test_only)
    if options.test_only:
        outputs = hparams["output_neurons"]
        if "output_neurons" not in line.overrides:
            outputs = on_main(outputs_of_run, folder) or outputs
        line, hparams = with_outputs(line, hparams, outputs)
        hparams["checkpointer"].only_reads = True
    else:
        outputs = on_main(prepare_training, line, hparams, tokenizer_file)
        line, hparams = with_outputs(line, hparams, outputs)
        hparams["checkpointer"].check_architecture()
        on_main(record_training, line, hparams, tokenizer_file)
    tokenizer = load_tokenizer(tokenizer_file, hparams["output_neurons"])
    if line.resume is not None:
        weights = hparams["checkpointer"].checkpoint_at(line.resume).paramfiles["model"]
        check_tokens_of_weights("--resume", weights, tokenizer)
    if line.init_from is not None and not options.test_only:
        check_tokens_of_weights("--init_from", line.init_from, tokenizer)
        load_model_weights(hparams["model"], Path(line.init_from), "file")
    check_positions(hparams)
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
                skip_unknown=hparams["unknown_characters"] == "skip",
            )
        )
        for name, paths in texts.items()
        if paths
    }
    for name, loader in held_out.items():
        policy = hparams["unknown_characters"]
        check_characters(loader.dataset, policy, f"{name}_text")
        if loader.dataset.is_empty():
            raise UserError(
                f"{name}_text: {', '.join(texts[name])} has no sentence to score"
                + (" without unknown characters." if policy == "skip" else " in known characters.")
            )
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
        check_characters(text, hparams["unknown_characters"], "train_text")
        text.chunk_sentences = on_main(text.fit_parts, num_ranks())
        brain.text_loader = TextLoader(text, hparams["num_workers"])
        if getattr(hparams["noam_scheduler"], "total_steps", 0) is None:
            raise UserError(
                "noam_scheduler has no total_steps, and how many an epoch of text has is not known "
                "before: give a number."
            )
        brain.fit(hparams["counter"], brain.text_loader, held_out["valid"])
    brain.unwrap_modules()
    is_own = not (options.test_only and (folder / "lm" / LM_FILE).is_file())
    is_own = is_own or _as_trained(folder, hparams, "avg_checkpoints")
    export(brain, tokenizer_file, folder / "lm", place == folder and is_own)
    evaluation = None
    if options.test_only:
        settings: dict[str, Any] = {"texts": {name: texts[name] for name in held_out}}
        settings["eval_precision"] = brain.eval_precision
        if not is_own:
            settings["avg_checkpoints"] = hparams["avg_checkpoints"]
        if not _as_trained(folder, hparams, "max_sentence_tokens"):
            settings["max_sentence_tokens"] = hparams["max_sentence_tokens"]
        if hparams["unknown_characters"] == "skip":
            settings["unknown_characters"] = "skip"
        evaluation = on_main(name_evaluation, place, line.eval_name, settings), settings
    brain.stop_request.what_follows = "stopping after this batch"
    with brain.stop_request:
        scores = {name: brain.perplexity_of(text) for name, text in held_out.items()}
    if if_main_process():
        command = [Path(sys.argv[0]).name, *argv]
        write_results(place, brain, scores, command, evaluation)
        for name, score in scores.items():
            print(f"{name}: perplexity {score.value:.2f} over {score.num_tokens} tokens")
        if place == folder:
            print(f"Language model and tokenizer: {folder / 'lm'}")
    return scores


def with_text_name(line: CommandLine) -> CommandLine:
    """The command line with ``text_name``, where neither it nor the file gives that."""
    values = read_yaml(line.param_file) | line.overrides
    texts = paths_of(values.get("train_text"))
    if "text_name" not in values or values["text_name"] is not None or not texts:
        return line
    name = Path(texts[0]).name.split(".")[0]
    return replace(line, overrides={**line.overrides, "text_name": name})


def _require_trained(tokenizer_file: Path) -> None:
    if not tokenizer_file.is_file():
        raise UserError(
            f"{tokenizer_file} is missing: --test_only needs the output_folder of a trained run."
        )


def prepare_training(line: CommandLine, hparams: Mapping, tokenizer_file: Path) -> int:
    """Tokenizer of a training; a run goes on with the text that it began with.

    Returns:
        the outputs that the model is to have.

    Raises:
        UserError: see ``prepare_tokenizer``; or the run's checkpoints were trained on another text.
    """
    folder = Path(hparams["output_folder"])
    has_checkpoints = bool(hparams["checkpointer"].list_checkpoints())
    earlier = read_fingerprint(folder) if has_checkpoints else {}
    check_same(folder, earlier, {TRAINING_TEXT: _text_described(hparams)})
    outputs = prepare_tokenizer(line, hparams, tokenizer_file)
    check_same(folder, earlier, {"tokenizer": file_described(tokenizer_file)})
    return outputs


def record_training(line: CommandLine, hparams: Mapping, tokenizer_file: Path) -> None:
    """Leaves what the run is trained with and on."""
    resolved = resolved_text(line.param_file, line.overrides)
    parts: dict[str, Described] = {
        TRAINING_TEXT: _text_described(hparams),
        "tokenizer": file_described(tokenizer_file),
        "hyperparameters": {"file": str(line.param_file), "sha256": text_digest(resolved)},
        VALIDATION_DATA: _files_described(paths_of(hparams["valid_text"])),
    }
    if hparams["checkpointer"].list_checkpoints():
        warn_of_other_validation(read_fingerprint(hparams["output_folder"]), parts)
    write_hyperparams(line, hparams["output_folder"])
    write_fingerprint(hparams["output_folder"], parts)


def _text_described(hparams: Mapping) -> Described:
    return _files_described(paths_of(hparams["train_text"]))


def _files_described(texts: list[str]) -> Described:
    digests = " ".join(file_digest(path) for path in texts)
    return {"files": " ".join(texts), "sha256": text_digest(digests)}


def paths_of(value: str | Sequence[str] | None) -> list[str]:
    """One path or a list of them, as a YAML file may have it."""
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)


def prepare_tokenizer(line: CommandLine, hparams: Mapping, tokenizer_file: Path) -> int:
    """Copies ``tokenizer_path`` or the tokenizer of the first weights, or trains one.

    One is trained on the first sentences of the text.

    Returns:
        the outputs that the model is to have: what the user says, or a run began with; else as many
        as the tokenizer asks for.

    Raises:
        UserError: the file is no tokenizer, the text does not support the tokenizer, or the run's
            checkpoints were trained with another one.
    """
    keep = partial(keep_tokenizer, tokenizer_file, checkpointer=hparams["checkpointer"])
    source, outputs = hparams["tokenizer_path"], hparams["output_neurons"]
    follows = "output_neurons" not in line.overrides
    characters = hparams["token_type"] == "char"
    if source is not None:
        num_tokens = load_tokenizer(
            source, MOST_CHARACTERS if follows else outputs
        ).get_piece_size()
        digest = file_digest(source)
        # Two files of one name are two tokenizers.
        keep({"tokenizer": digest[:12]}, digest, partial(copy_tokenizer, source, tokenizer_file))
        wanted = outputs_for(source, num_tokens)
    else:
        texts = paths_of(hparams["train_text"])
        settings = {name: hparams[name] for name in TOKENIZER_SETTINGS}
        if characters and follows:
            # There are as many as there are.
            del settings["output_neurons"]
        limits = {"output_neurons": MOST_CHARACTERS} | settings

        def train() -> None:
            sentences = islice(read_sentences(texts), hparams["tokenizer_sentences"])
            train_tokenizer(sentences, tokenizer_file, **limits)

        # A corpus of gigabytes is told by its size, not read.
        sizes = [[Path(path).name, Path(path).stat().st_size] for path in texts]
        first = line.init_from and tokenizer_of_weights(line.init_from, hparams["token_type"])
        if first:
            keep(settings, file_digest(first), partial(copy_tokenizer, first, tokenizer_file))
        else:
            keep(settings, [hparams["tokenizer_sentences"], *sizes], train)
        wanted = load_tokenizer(tokenizer_file, MOST_CHARACTERS).get_piece_size()
        if first:
            wanted = outputs_for(first, wanted)
    if not follows:
        return outputs
    if hparams["checkpointer"].list_checkpoints():
        return outputs_of_run(hparams["output_folder"]) or outputs
    return wanted


def check_positions(hparams: Mapping) -> None:
    """Refuses sentences that may be longer than absolute positions reach.

    Raises:
        UserError: they may.
    """
    encoding = getattr(hparams["model"], "positional_encoding", None)
    most, longest = getattr(encoding, "max_len", math.inf), hparams["max_sentence_tokens"]
    # The sign that a sentence begins has a position, too.
    if longest + 1 > most:
        raise UserError(
            f"max_sentence_tokens is {longest}, and the positional_encoding of the model ends at "
            f"{most}: give --max_sentence_tokens {most - 1} or less."
        )


def check_characters(text: TextBatches, policy: str, where: str) -> None:
    """Lists characters that the tokenizer does not know.

    Raises:
        UserError: the text is in another letter case than the tokens; or there are such
            characters, and ``policy`` is "error": then all sentences are searched, else the first.
    """
    sentences = read_sentences(text.paths)
    sample = list(islice(sentences, SAMPLE_SENTENCES))
    check_letter_case(text.tokenizer, sample, where)
    rest = sentences if policy == "error" else ()
    unknown = count_unknown_characters(text.tokenizer, chain(sample, rest))
    if policy != "error" and next(sentences, None) is not None:
        where += f" (its first {SAMPLE_SENTENCES:,} sentences)"
    check_unknown_characters(unknown, policy, where)


def _as_trained(folder: Path, hparams: Mapping, key: str) -> bool:
    """Whether a setting is that of the training."""
    try:
        return read_yaml(folder / "hyperparams.yaml")[key] == hparams[key]
    except (UserError, KeyError):
        return False


def export(brain: LMBrain, tokenizer_file: Path, folder: Path, keep: bool) -> None:
    """Loads the mean of the best checkpoints; writes it and the tokenizer as a recogniser wants it.

    Without checkpoints the model of an earlier export is taken.

    Args:
        keep: whether to write them.

    Raises:
        UserError: the run has neither.
    """
    brain.hparams.model.load_state_dict(on_main(_mean, brain, tokenizer_file, folder, keep))


def _mean(
    brain: LMBrain, tokenizer_file: Path, folder: Path, keep: bool
) -> dict[str, torch.Tensor]:
    model_file = folder / LM_FILE
    num_best = brain.hparams.avg_checkpoints
    mean = brain.checkpointer.of_best(mean_weights, num_best, min_key=brain.best_metric)
    if mean is not None:
        if keep:
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(model_file, "wb") as stream:
                torch.save(mean, stream)
            with atomic_write(folder / TOKENIZER_FILE, "wb") as stream:
                stream.write(tokenizer_file.read_bytes())
        return mean
    if not model_file.is_file():
        raise UserError(
            f"{brain.checkpointer.checkpoints_dir} holds no finished epoch to evaluate, or none "
            "whose perplexity is a finite number. Train first, or give the output_folder of a "
            "trained run."
        )
    load_model_weights(brain.hparams.model, model_file, "file")
    return torch.load(model_file, map_location="cpu", weights_only=True)


def name_evaluation(place: Path, chosen: str | None, settings: Mapping[str, Any]) -> str:
    """What an evaluation is called: as the user says, else after its texts.

    Raises:
        UserError: the user's name is that of another evaluation.
    """
    earlier = earlier_evaluations(place, read_any_results)
    if chosen is not None:
        return checked_name(chosen, settings, earlier)
    paths = [path for of_text in settings["texts"].values() for path in of_text]
    name = "+".join(dict.fromkeys(Path(path).name.split(".")[0] for path in paths))
    if "avg_checkpoints" in settings:
        name += f"_best{settings['avg_checkpoints']}"
    return free_name(name, settings, earlier)


def write_results(
    place: Path,
    brain: LMBrain,
    scores: Mapping[str, Perplexity],
    command: list[str],
    evaluation: tuple[str, Mapping[str, Any]] | None,
) -> None:
    """Writes ``results.json``: perplexities, the model's size, and how to repeat the run.

    Args:
        place: folder of ``results.json``.
        evaluation: name and settings of one that no training precedes; it stands in
            ``evaluations``, and the training's own results stay.
    """
    path = place / "results.json"
    splits = {
        name: {
            # JSON has no infinity.
            "perplexity": score.value if math.isfinite(score.value) else None,
            "tokens": score.num_tokens,
            "sentences": score.num_sentences,
        }
        for name, score in scores.items()
    }
    run = run_record(
        seed=brain.hparams.seed,
        precision=brain.precision,
        eval_precision=brain.eval_precision,
        device=brain.device,
        command=command,
    )
    with alone_with(path):
        results = kept_results(path, read_any_results)
        if evaluation is None:
            results |= {"splits": splits, "model": _model_described(brain), "run": run}
        else:
            name, settings = evaluation
            entry = {"splits": splits, "settings": dict(settings), "run": run}
            results.setdefault("evaluations", {})[name] = entry
        store_results(path, results)


def _model_described(brain: LMBrain) -> dict:
    return {
        "parameters": count_parameters([brain.hparams.model]),
        "token_type": brain.hparams.token_type,
        "output_neurons": brain.hparams.output_neurons,
    }
