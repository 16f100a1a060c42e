"""From a command line to a trained and evaluated model; both scripts run through here."""

import hashlib
import logging
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from speechbrain.utils.distributed import if_main_process, run_on_main

from common.errors import UserError
from corpora.librispeech import find_data_root
from decoding.pretrained_lm import TOKENIZER_FILE, fetch_pretrained
from inference.scoring.reports import results_table
from librispeech_prepare import prepare_librispeech
from modules.weights import load_model_weights
from text.tokenizer import (
    TOKENIZER_SETTINGS,
    check_unknown_characters,
    count_unknown_characters,
    load_tokenizer,
    train_tokenizer,
)
from training.brains.asr_brain import ASRBrain
from training.checkpoints.run_tokenizer import copy_tokenizer, keep_tokenizer
from training.data.augmentation import SpeedPerturbation
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
from training.launch.start import make_output_folder, start_run
from training.reporting.loggers import make_loggers
from training.splicing.splice import Splicing

logger = logging.getLogger(__name__)


def train_manifest(hparams: Mapping) -> str:
    """Name of the manifest of all training splits; one of a split's own is not overwritten."""
    splits = {*hparams["train_splits"], *hparams["dev_splits"], *hparams["test_splits"]}
    name = "train"
    while name in splits and hparams["train_splits"] != [name]:
        name = f"all_{name}"
    return f"{name}.csv"


def check_splits(hparams: dict, test_only: bool) -> None:
    """Make lists of splits that were given as one name.

    Raises:
        UserError: there is nothing to train or to validate on.
    """
    for key in ("train_splits", "dev_splits", "test_splits"):
        if isinstance(hparams[key], str):
            hparams[key] = [hparams[key]]
        if not hparams[key] and key != "test_splits" and not test_only:
            raise UserError(f"{key} is empty. Name at least one split, such as '[dev-clean]'.")


def prepare_manifests(hparams: dict, test_only: bool) -> None:
    """Write the manifests that this run reads; of a test-only run, those of the test splits."""
    train = [] if test_only else list(hparams["train_splits"])
    dev = [] if test_only else list(hparams["dev_splits"])
    # A split may be validated on and tested on: its manifest is one.
    test = [split for split in hparams["test_splits"] if split not in [*train, *dev]]
    try:
        prepare_librispeech(
            hparams["data_folder"],
            hparams["output_folder"],
            tr_splits=train,
            dev_splits=dev,
            te_splits=test,
            merge_lst=train,
            merge_name=train_manifest(hparams) if train else None,
            skip_prep=hparams["skip_prep"],
            held_out_speakers=hparams["held_out_speakers"],
            skip_bad=hparams["skip_bad"],
        )
    except ValueError as error:
        raise UserError(str(error)) from error


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


def dataio_prepare(hparams: dict, test_only: bool = False) -> Loaders:
    """Datasets and batches of a run whose manifests and tokenizer exist.

    Args:
        hparams: of the recipe's YAML.
        test_only: leave the training and validation sets out; nothing of them needs to exist.
    """
    folder = Path(hparams["output_folder"])
    splits = list(hparams["test_splits"])
    if not test_only:
        splits = [*hparams["train_splits"], *hparams["dev_splits"], *splits]
    try:
        data_root = find_data_root(hparams["data_folder"], splits)
    except ValueError as error:
        raise UserError(str(error)) from None
    tokenizer = load_tokenizer(tokenizer_file(hparams), hparams["output_neurons"])
    sample_rate = hparams["sample_rate"]
    tests = {
        split: make_dataset(read_rows(folder / f"{split}.csv", data_root), tokenizer, sample_rate)
        for split in hparams["test_splits"]
    }
    loaders = Loaders(train=None, valid=None, tests=tests, tokenizer=tokenizer)
    if test_only:
        return loaders

    rows = read_rows(folder / train_manifest(hparams), data_root)
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
        loaders.splicing = Splicing(hparams["spliced_share"], hparams["seed"], rows)
        loaders.unperturbed = make_dataset(rows, tokenizer, sample_rate)
    loaders.train = make_dataset(
        rows, tokenizer, sample_rate, loaders.perturbation, loaders.splicing
    )
    loaders.train_sampler, loaders.train_kwargs = training_batches(loaders.train, hparams)
    dev = {}
    for split in hparams["dev_splits"]:
        dev.update(read_rows(folder / f"{split}.csv", data_root))
    loaders.valid = make_dataset(dev, tokenizer, sample_rate)
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
    test_only = run_opts.test_only
    check_splits(hparams, test_only)
    try:
        hparams["speech_encoder"].check_widths()
    except ValueError as error:
        raise UserError(f"{line.param_file}: {error}") from None
    if test_only and not tokenizer_file(hparams).is_file():
        raise UserError(
            f"{tokenizer_file(hparams)} is missing: --test_only needs the output_folder of a "
            "trained run."
        )
    if not test_only:
        hparams["checkpointer"].check_architecture()
    make_output_folder(line, hparams, test_only)
    run_on_main(prepare_manifests, args=[hparams, test_only])
    if not test_only:
        run_on_main(prepare_tokenizer, args=[hparams])
    loaders = dataio_prepare(hparams, test_only)
    hparams["tokenizer"] = loaders.tokenizer
    prepare_searches(hparams, loaders.tokenizer)
    if line.init_from is not None and not test_only:
        load_model_weights(hparams["model"], Path(line.init_from), "file")
    brain = brain_class(
        modules=hparams["modules"],
        opt_class=hparams["opt_class"],
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
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
    scores = evaluate_splits(brain, loaders.tests, command, test_only)
    if if_main_process():
        leave_bundle(hparams["output_folder"])
        print(f"\n{results_table(scores)}\n\nReports: {hparams['output_folder']}")
        logger.info("Command: %s", shlex.join(command))
    return brain
