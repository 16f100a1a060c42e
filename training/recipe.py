"""From a command line to a trained and evaluated model; both scripts run through here."""

import hashlib
import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from speechbrain.utils.distributed import if_main_process
from speechbrain.utils.run_opts import RunOptions

from common.errors import UserError
from common.files import file_digest
from decoding.pretrained_lm import TOKENIZER_FILE, fetch_pretrained
from inference.scoring.reports import results_table
from modules.weights import load_model_weights
from text.tokenizer import (
    TOKENIZER_SETTINGS,
    check_unknown_characters,
    count_unknown_characters,
    load_tokenizer,
    train_tokenizer,
)
from training.brains.asr_brain import ASRBrain
from training.checkpoints.fingerprint import (
    Described,
    check_same,
    read_fingerprint,
    rows_digest,
    text_digest,
    write_fingerprint,
)
from training.checkpoints.run_tokenizer import copy_tokenizer, keep_tokenizer
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
from training.launch.command_line import CommandLine
from training.launch.processes import on_main
from training.launch.run_lock import sole_run
from training.launch.start import make_output_folder, start_run, write_hyperparams
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


def prepare_tokenizer(hparams: dict) -> None:
    """The run's tokenizer file: the language model's, or trained from the training transcripts.

    Raises:
        UserError: the run's checkpoints were trained with another than what is asked for now.
    """
    model_file = tokenizer_file(hparams)
    keep = partial(keep_tokenizer, model_file, checkpointer=hparams["checkpointer"])
    if uses_pretrained_tokenizer(hparams):
        source = hparams["pretrained_lm_tokenizer_path"]

        def copy() -> None:
            folder = model_file.parent / "pretrained"
            copy_tokenizer(fetch_pretrained(source, TOKENIZER_FILE, folder), model_file)

        keep({"tokenizer": "of the language model"}, source, copy)
        return
    rows = read_rows(Path(hparams["output_folder"]) / train_manifest(hparams), "")
    transcripts = [row["wrd"] for row in rows.values()]
    settings = {name: hparams[name] for name in TOKENIZER_SETTINGS}
    digest = hashlib.sha256("\n".join(transcripts).encode()).hexdigest()
    keep(settings, digest, partial(train_tokenizer, transcripts, model_file, **settings))


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
    make_lists_of_splits(hparams, run_opts.test_only)
    try:
        hparams["speech_encoder"].check_widths()
    except ValueError as error:
        raise UserError(f"{line.param_file}: {error}") from None
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
    test_only, checkpointer = run_opts.test_only, hparams["checkpointer"]
    evaluation = None
    if test_only:
        on_main(_require_trained, tokenizer_file(hparams))
        checkpointer.only_reads = True
        make_output_folder(hparams, test_only)
        evaluation = on_main(
            plan_evaluation,
            hparams,
            resolved_text(line.param_file, line.overrides),
            run_opts.eval_precision,
            line.eval_name,
        )
    else:
        checkpointer.check_architecture()
        make_output_folder(hparams, test_only)
        on_main(prepare_training, line, hparams)
    loaders = dataio_prepare(hparams, test_only, evaluation and evaluation.manifests)
    hparams["tokenizer"] = loaders.tokenizer
    prepare_searches(hparams, loaders.tokenizer)
    if line.init_from is not None and not test_only:
        load_model_weights(hparams["model"], Path(line.init_from), "file")
    brain = brain_class(
        modules=hparams["modules"],
        opt_class=hparams["opt_class"],
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=checkpointer,
    )
    if not test_only:
        brain.loggers += make_loggers(hparams)
    brain.resume_from = line.resume
    if not test_only:
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
        print(f"\n{results_table(scores)}\n\nReports: {reports}")
        logger.info("Command: %s", shlex.join(command))
    return brain


def _require_trained(tokenizer: Path) -> None:
    if not tokenizer.is_file():
        raise UserError(
            f"{tokenizer} is missing: --test_only needs the output_folder of a trained run."
        )


def prepare_training(line: CommandLine, hparams: dict) -> None:
    """Manifests, tokenizer and records of a training; a run goes on with what it began with.

    Raises:
        UserError: something cannot be prepared, or the run's checkpoints were trained on something
            else. The run's files are as they were, then.
    """
    folder = Path(hparams["output_folder"])
    has_checkpoints = bool(hparams["checkpointer"].list_checkpoints())
    earlier = read_fingerprint(folder) if has_checkpoints else {}
    if earlier and not hparams["skip_prep"]:
        splits = [*hparams["train_splits"], *hparams["dev_splits"], *hparams["test_splits"]]
        names = [train_manifest(hparams), *(f"{split}.csv" for split in splits)]
        with beside(folder, names) as scratch:
            prepare_manifests(hparams, scratch, test_only=False)
            check_same(folder, earlier, {TRAINING_DATA: _training_data(hparams, scratch)})
            move_manifests(scratch, folder)
    else:
        prepare_manifests(hparams, folder, test_only=False)
    parts = {TRAINING_DATA: _training_data(hparams, folder)}
    check_same(folder, earlier, parts)
    prepare_tokenizer(hparams)
    model_file = tokenizer_file(hparams)
    parts["tokenizer"] = {"file": str(model_file), "sha256": file_digest(model_file)}
    check_same(folder, earlier, parts)
    parts["hyperparameters"] = {
        "file": str(line.param_file),
        "sha256": text_digest(resolved_text(line.param_file, line.overrides)),
    }
    for split in hparams["test_splits"]:
        rows = manifest_rows(folder / f"{split}.csv")
        parts[f"test split {split}"] = {"sha256": rows_digest(rows)}
    write_hyperparams(line, folder)
    write_fingerprint(folder, parts)


def _training_data(hparams: dict, folder: Path) -> Described:
    rows = manifest_rows(folder / train_manifest(hparams))
    return {
        "corpus": str(hparams["data_folder"]),
        "splits": " ".join(hparams["train_splits"]),
        "utterances": f"{len(rows)} utterances",
        "sha256": rows_digest(rows),
    }
