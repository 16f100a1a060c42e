"""From a command line to a trained and evaluated model; both scripts run through here."""

import hashlib
import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from speechbrain.utils.distributed import if_main_process
from speechbrain.utils.run_opts import RunOptions

from common.errors import UserError
from common.files import file_digest
from decoding.pretrained_lm import TOKENIZER_FILE, fetch_pretrained
from decoding.searches import check_known_words
from inference.bundle import WEIGHTS_FILE, first_weights
from inference.scoring.reports import results_table
from modules.weights import load_weights, read_weights, with_new_decoder
from text.tokenizer import (
    MOST_CHARACTERS,
    TOKENIZER_SETTINGS,
    check_letter_case,
    check_unknown_characters,
    count_unknown_characters,
    load_tokenizer,
    train_tokenizer,
)
from training.brains.asr_brain import ASRBrain
from training.checkpoints.fingerprint import (
    VALIDATION_DATA,
    Described,
    check_same,
    check_seed_of_scores,
    file_described,
    read_fingerprint,
    rows_digest,
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
from training.data.augmentation import SpeedPerturbation
from training.data.preparation import (
    audio_root,
    beside,
    check_distinct,
    make_lists_of_splits,
    manifest_rows,
    move_manifests,
    prepare_manifests,
    train_manifest,
)
from training.data.recordings import (
    Loaders,
    SkippedUtterances,
    evaluation_batches,
    leave_out,
    make_dataset,
    read_rows,
    sorted_by_duration,
    training_batches,
    unalignable,
    with_characters,
)
from training.evaluation import evaluate_splits, leave_bundle
from training.launch.command_line import CommandLine, load_hparams
from training.launch.processes import on_main
from training.launch.run_lock import sole_run
from training.launch.start import (
    make_output_folder,
    place_for_reports,
    start_run,
    write_hyperparams,
)
from training.launch.yaml_file import resolved_text
from training.named_evaluation import plan_evaluation
from training.reporting.loggers import make_loggers
from training.splicing.splice import Splicing

logger = logging.getLogger(__name__)

TRAINING_DATA = "training data"


def tokenizer_file(hparams: dict) -> Path:
    """Where the run keeps its sentencepiece model."""
    return Path(hparams["save_folder"]) / "tokenizer.model"


def uses_pretrained_tokenizer(hparams: dict) -> bool:
    """Whether the tokenizer comes from the language model's source: always from a local folder,
    from the hub only for a language model that is really used."""
    source = hparams.get("pretrained_lm_tokenizer_path")
    return bool(source) and (Path(source).is_dir() or not hparams["no_lm"])


def with_input_size(line: CommandLine, hparams: dict) -> tuple[CommandLine, dict]:
    """Command line and hyperparameters of a network that takes what the front end makes.

    Raises:
        UserError: the parts do not fit, and ``input_size`` is given.
    """
    encoder, network = hparams["speech_encoder"], line.overrides.get("Transformer") or {}
    try:
        width = encoder.frontend_width()
        if width != encoder.Transformer.input_size and "input_size" not in network:
            given = {"Transformer": {**network, "input_size": width}}
            line = replace(line, overrides=line.overrides | given)
            hparams = load_hparams(line.param_file, line.overrides)
            encoder = hparams["speech_encoder"]
        encoder.check_widths()
    except ValueError as error:
        raise UserError(f"{line.param_file}: {error}") from None
    return line, hparams


def prepare_tokenizer(line: CommandLine, hparams: dict) -> int:
    """The run's tokenizer file: the language model's, that of the first weights, or a new one.

    Returns:
        the outputs that the model is to have: what the user says, or a run began with; else as many
        as the tokenizer asks for.

    Raises:
        UserError: the run's checkpoints were trained with another than what is asked for now.
    """
    model_file, outputs = tokenizer_file(hparams), hparams["output_neurons"]
    keep = partial(keep_tokenizer, model_file, checkpointer=hparams["checkpointer"])
    follows = "output_neurons" not in line.overrides
    characters = hparams["token_type"] == "char"
    pretrained = uses_pretrained_tokenizer(hparams)
    first = None
    if line.init_from is not None and not pretrained:
        first = tokenizer_of_weights(line.init_from, hparams["token_type"])
    if pretrained:
        source = hparams["pretrained_lm_tokenizer_path"]

        def copy() -> None:
            folder = model_file.parent / "pretrained"
            copy_tokenizer(fetch_pretrained(source, TOKENIZER_FILE, folder), model_file)

        keep({"tokenizer": "of the language model"}, source, copy)
    else:
        settings = {name: hparams[name] for name in TOKENIZER_SETTINGS}
        if characters and follows:
            # There are as many as there are.
            del settings["output_neurons"]
        if first is not None:
            keep(settings, file_digest(first), partial(copy_tokenizer, first, model_file))
        else:
            rows = manifest_rows(Path(hparams["output_folder"]) / train_manifest(hparams))
            transcripts = [row.wrd for row in rows]
            digest = hashlib.sha256("\n".join(transcripts).encode()).hexdigest()
            limits = {"output_neurons": MOST_CHARACTERS} | settings
            keep(settings, digest, partial(train_tokenizer, transcripts, model_file, **limits))
    if not follows:
        return outputs
    if hparams["checkpointer"].list_checkpoints():
        return outputs_of_run(hparams["output_folder"]) or outputs
    num_tokens = load_tokenizer(model_file, MOST_CHARACTERS).get_piece_size()
    if pretrained:
        local = Path(hparams["pretrained_lm_tokenizer_path"])
        return outputs_for(local / TOKENIZER_FILE, num_tokens)
    if first is not None:
        return outputs_for(first, num_tokens)
    if characters and "token_type" in line.overrides:
        # The number in the file is that of another kind of tokens.
        return num_tokens
    return max(outputs, num_tokens)


def dataio_prepare(
    hparams: dict, test_only: bool = False, manifests: str | Path | None = None
) -> Loaders:
    """Datasets and batches of a run whose manifests and tokenizer exist.

    Args:
        hparams: of the recipe's YAML.
        test_only: leave the training and validation sets out; nothing of them needs to exist.
        manifests: folder of the manifests; by default the ``output_folder``.
    """
    folder = Path(hparams["output_folder"])
    manifests = folder if manifests is None else Path(manifests)
    splits = list(hparams["test_splits"])
    if not test_only:
        splits = [*hparams["train_splits"], *hparams["dev_splits"], *splits]
    data_root = audio_root(hparams, splits)
    tokenizer = load_tokenizer(tokenizer_file(hparams), hparams["output_neurons"])
    sample_rate = hparams["sample_rate"]
    dataset_of = partial(make_dataset, resample=hparams["resample"])
    tests = {
        split: dataset_of(read_rows(manifests / f"{split}.csv", data_root), tokenizer, sample_rate)
        for split in hparams["test_splits"]
    }
    loaders = Loaders(train=None, valid=None, tests=tests, tokenizer=tokenizer)
    if test_only:
        return loaders

    rows = read_rows(manifests / train_manifest(hparams), data_root)
    policy = hparams["unknown_characters"]
    check_letter_case(tokenizer, (row["wrd"] for row in rows.values()), "The training transcripts")
    unknown = count_unknown_characters(tokenizer, (row["wrd"] for row in rows.values()))
    check_unknown_characters(unknown, policy, "Training transcripts")
    skipped = unalignable(rows, tokenizer, sample_rate, hparams["speech_encoder"].num_frames)
    if policy == "skip":
        skipped |= with_characters(rows, unknown)
    if if_main_process():
        SkippedUtterances(folder / "skipped.csv").add(skipped)
        if skipped:
            logger.warning("%d training utterances are left out: see skipped.csv", len(skipped))
    rows = sorted_by_duration(leave_out(rows, set(skipped)), hparams["sorting"])
    if hparams.get("speed_perturb") is not None:
        loaders.perturbation = SpeedPerturbation(
            hparams["speed_perturb"], hparams["seed"], hparams["augment_from_epoch"]
        )
    if hparams["spliced_share"]:
        loaders.splicing = Splicing(
            hparams["spliced_share"], hparams["seed"], rows, hparams["resample"]
        )
        loaders.unperturbed = dataset_of(rows, tokenizer, sample_rate)
    loaders.train = dataset_of(rows, tokenizer, sample_rate, loaders.perturbation, loaders.splicing)
    loaders.train_sampler, loaders.train_kwargs = training_batches(loaders.train, hparams)
    dev_sets = {s: read_rows(manifests / f"{s}.csv", data_root) for s in hparams["dev_splits"]}
    check_distinct(dev_sets.items())
    dev = {key: row for rows in dev_sets.values() for key, row in rows.items()}
    loaders.valid = dataset_of(dev, tokenizer, sample_rate)
    loaders.valid_kwargs = evaluation_batches(loaders.valid, hparams)
    return loaders


def run_recipe(
    argv: Sequence[str],
    brain_class: type[ASRBrain],
    description: str,
    prepare_searches: Callable[[dict, SentencePieceProcessor], None],
) -> ASRBrain:
    """Prepare, train (or resume), evaluate.

    Args:
        argv: arguments of the command line, the YAML file first.
        brain_class: the recipe's Brain.
        prepare_searches: completes the searches of the hparams with what needs the tokenizer.

    Raises:
        UserError: something that the user can mend.
        Interrupted: SIGINT or SIGTERM; the run can be resumed.
    """
    line, hparams, run_opts = start_run(argv, description)
    line, hparams = with_input_size(line, hparams)
    make_lists_of_splits(hparams, run_opts.test_only)
    if run_opts.test_only:
        on_main(_require_trained, tokenizer_file(hparams))
    # An evaluation reads, and writes where no other does.
    with nullcontext() if run_opts.test_only else sole_run(hparams["output_folder"]):
        return _run(line, hparams, run_opts, brain_class, prepare_searches, argv)


def _run(
    line: CommandLine,
    hparams: dict,
    run_opts: RunOptions,
    brain_class: type[ASRBrain],
    prepare_searches: Callable[[dict, SentencePieceProcessor], None],
    argv: Sequence[str],
) -> ASRBrain:
    test_only, folder = run_opts.test_only, Path(hparams["output_folder"])
    evaluation = None
    place = on_main(place_for_reports, folder) if test_only else folder
    make_output_folder(place, test_only)
    if test_only:
        outputs = hparams["output_neurons"]
        if "output_neurons" not in line.overrides:
            outputs = on_main(outputs_of_run, folder) or outputs
        line, hparams = with_outputs(line, hparams, outputs)
        make_lists_of_splits(hparams, test_only)
        evaluation = on_main(
            plan_evaluation,
            hparams,
            resolved_text(line.param_file, line.overrides),
            run_opts.eval_precision,
            line.eval_name,
            place,
        )
        hparams["checkpointer"].only_reads = True
    else:
        outputs = on_main(prepare_training, line, hparams)
        line, hparams = with_outputs(line, hparams, outputs)
        make_lists_of_splits(hparams, test_only)
        hparams["checkpointer"].check_architecture()
        on_main(record_training, line, hparams)
    checkpointer = hparams["checkpointer"]
    loaders = dataio_prepare(hparams, test_only, evaluation and evaluation.manifests)
    hparams["tokenizer"] = loaders.tokenizer
    prepare_searches(hparams, loaders.tokenizer)
    rows = (row for dataset in loaders.tests.values() for row in dataset.data.values())
    words = {word for row in rows for word in row["wrd"].split()}
    on_main(
        check_known_words,
        hparams["test_search"],
        words,
        f"kenlm_model_path {hparams.get('kenlm_model_path')}",
    )
    if line.resume is not None:
        weights = checkpointer.checkpoint_at(line.resume).paramfiles["model"]
        check_tokens_of_weights("--resume", weights, loaders.tokenizer)
    if line.init_from is not None and not test_only:
        check_tokens_of_weights("--init_from", line.init_from, loaders.tokenizer)
        first, model = Path(line.init_from), hparams["model"]
        is_bundle = first.name == WEIGHTS_FILE
        state = first_weights(first.parent) if is_bundle else read_weights(first)
        if "seq_lin" in hparams:
            state = with_new_decoder(state, model)
        load_weights(model, state, first, "file")
    brain = brain_class(
        modules=hparams["modules"],
        opt_class=hparams["opt_class"],
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=checkpointer,
    )
    if not test_only:
        brain.loggers += make_loggers(hparams)
    elif place != folder:
        brain.loggers = []
    brain.resume_from = line.resume
    if not test_only:
        fit_schedule(hparams, loaders, run_opts.grad_accumulation_factor)
        brain.train_sampler = loaders.train_sampler
        brain.perturbation = loaders.perturbation
        brain.splicing, brain.unperturbed = loaders.splicing, loaders.unperturbed
        brain.fit(
            hparams["counter"],
            loaders.train,
            loaders.valid,
            train_loader_kwargs=loaders.train_kwargs,
            valid_loader_kwargs=loaders.valid_kwargs,
        )
    command = [Path(sys.argv[0]).name, *argv]
    scores = evaluate_splits(brain, loaders.tests, command, evaluation)
    if if_main_process():
        if evaluation is None or evaluation.is_own:
            leave_bundle(hparams["output_folder"])
        reports = hparams["output_folder"] if evaluation is None else evaluation.folder
        if scores:
            print(f"\n{results_table(scores)}")
        print(f"\nReports: {reports}")
        logger.info("Command: %s", shlex.join(command))
    return brain


def fit_schedule(hparams: dict, loaders: Loaders, batches_per_step: int) -> None:
    """A schedule whose ``total_steps`` is null ends with the last epoch."""
    schedule = hparams["noam_scheduler"]
    steps = hparams["number_of_epochs"] * -(-loaders.train_sampler.num_whole() // batches_per_step)
    warmup = getattr(schedule, "n_warmup_steps", 0)
    if getattr(schedule, "total_steps", 0) is not None:
        if steps < 2 * warmup and if_main_process():
            logger.warning(
                "The learning rate rises for %d optimiser steps (n_warmup_steps), and all epochs "
                "have %d: give fewer, or take a file for small corpora (docs/data.md).",
                *(warmup, steps),
            )
        return
    first = schedule.n_warmup_steps + schedule.n_hold_steps + 1
    if steps < first and if_main_process():
        logger.warning(
            "The learning rate never falls: all epochs have %d optimiser steps, and it rises and "
            "stays for %d (n_warmup_steps, n_hold_steps).",
            *(steps, first - 1),
        )
    schedule.end_at(max(steps, first))


def _require_trained(tokenizer: Path) -> None:
    if not tokenizer.is_file():
        raise UserError(
            f"{tokenizer} is missing: --test_only needs the output_folder of a trained run."
        )


def prepare_training(line: CommandLine, hparams: dict) -> int:
    """Manifests and tokenizer of a training; a run goes on with what it began with.

    Returns:
        see ``prepare_tokenizer``.

    Raises:
        UserError: something cannot be prepared, or the run's checkpoints were trained on something
            else. The run's files are as they were, then.
    """
    folder, earlier = Path(hparams["output_folder"]), _fingerprint_of_checkpoints(hparams)
    if earlier:
        check_seed_of_scores(folder, hparams["seed"])
    if earlier and not hparams["skip_prep"]:
        splits = [*hparams["train_splits"], *hparams["dev_splits"], *hparams["test_splits"]]
        names = [train_manifest(hparams), *(f"{split}.csv" for split in splits)]
        with beside(folder, names) as scratch:
            prepare_manifests(hparams, scratch, test_only=False)
            check_same(folder, earlier, {TRAINING_DATA: _training_data(hparams, scratch)})
            move_manifests(scratch, folder)
    else:
        prepare_manifests(hparams, folder, test_only=False)
    check_same(folder, earlier, {TRAINING_DATA: _training_data(hparams, folder)})
    outputs = prepare_tokenizer(line, hparams)
    check_same(folder, earlier, {"tokenizer": file_described(tokenizer_file(hparams))})
    return outputs


def record_training(line: CommandLine, hparams: dict) -> None:
    """Leaves what the run is trained with and on."""
    folder = Path(hparams["output_folder"])
    resolved = resolved_text(line.param_file, line.overrides)
    parts: dict[str, Described] = {
        TRAINING_DATA: _training_data(hparams, folder),
        "tokenizer": file_described(tokenizer_file(hparams)),
        "hyperparameters": {"file": str(line.param_file), "sha256": text_digest(resolved)},
        VALIDATION_DATA: _validation_data(hparams),
    }
    warn_of_other_validation(_fingerprint_of_checkpoints(hparams), parts)
    for split in hparams["test_splits"]:
        rows = manifest_rows(folder / f"{split}.csv")
        parts[f"test split {split}"] = {"sha256": rows_digest(rows)}
    write_hyperparams(line, folder)
    write_fingerprint(folder, parts)


def _fingerprint_of_checkpoints(hparams: dict) -> dict[str, Described]:
    has_checkpoints = bool(hparams["checkpointer"].list_checkpoints())
    return read_fingerprint(hparams["output_folder"]) if has_checkpoints else {}


def _validation_data(hparams: dict) -> Described:
    folder, splits = Path(hparams["output_folder"]), hparams["dev_splits"]
    rows = [row for split in splits for row in manifest_rows(folder / f"{split}.csv")]
    return {"splits": " ".join(splits), "sha256": rows_digest(rows)}


def _training_data(hparams: dict, folder: Path) -> Described:
    rows = manifest_rows(folder / train_manifest(hparams))
    return {
        "corpus": str(hparams["data_folder"]),
        "splits": " ".join(hparams["train_splits"]),
        "utterances": f"{len(rows)} utterances",
        "sha256": rows_digest(rows),
    }
