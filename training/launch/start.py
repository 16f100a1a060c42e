"""The first steps of every run: command line, YAML file, device, processes, output folder."""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import speechbrain as sb
from speechbrain.utils.distributed import ddp_init_group, if_main_process
from speechbrain.utils.run_opts import RunOptions

from common.files import atomic_write
from training.launch.allocator import keep_freed_memory
from training.launch.command_line import (
    CommandLine,
    check_init_from,
    load_hparams,
    parse_command_line,
)
from training.launch.devices import (
    check_device,
    check_forced_backend,
    check_precision,
    distributed_backend_for,
    own_device,
)
from training.launch.processes import on_main
from training.launch.run_options import OF_ONE_START
from training.launch.settings import PATHS, check_inputs, check_places
from training.launch.yaml_file import RECIPE_FILE, as_text, resolved_text, with_overrides

UNCAUSED_WARNINGS = (
    r"This DataLoader will create \d+ worker processes",
    r"Support for mismatched key_padding_mask",
)
"""Of torch, about what recipes and SpeechBrain's layers do on purpose."""


def start_run(
    argv: Sequence[str],
    description: str,
    complete: Callable[[CommandLine], CommandLine] = lambda line: line,
) -> tuple[CommandLine, dict, RunOptions]:
    """Reads what was asked for and joins the other processes of the run.

    Args:
        argv: arguments of the command line, the YAML file first.
        description: of the script, for ``--help``.
        complete: adds to the command line what follows from it.

    Returns:
        the command line, the hyperparameters with their objects, and the run options in force.

    Raises:
        UserError: see ``parse_command_line`` and ``load_hparams``; or a device or a precision that
            is not to be had here.
    """
    for message in UNCAUSED_WARNINGS:
        warnings.filterwarnings("ignore", message)
    line = complete(parse_command_line(argv, description))
    hparams = load_hparams(line.param_file, line.overrides)
    options = run_options(line, hparams)
    hparams["noprogressbar"] = options.noprogressbar
    check_device(options.device)
    check_forced_backend(hparams.get("mamba_config"))
    check_precision(options.device, options.precision)
    check_precision(options.device, options.eval_precision)
    if options.device == "cpu":
        keep_freed_memory()
    ddp_init_group(options)
    on_main(_check_paths, line, hparams, options.test_only)
    return line, hparams, options


def _check_paths(line: CommandLine, hparams: Mapping, test_only: bool) -> None:
    check_inputs(hparams, test_only)
    check_init_from(line)
    if not test_only:
        check_places(hparams)
        # The other folders are made with what lies in them.
        Path(hparams["train_log"]).parent.mkdir(parents=True, exist_ok=True)


def run_options(line: CommandLine, hparams: Mapping) -> RunOptions:
    """Run options in force: the command line's, else the YAML file's, else what suits here."""
    defaults = RunOptions().as_dict()
    options = {name: hparams[name] for name in defaults if name in hparams} | line.run_options
    options["device"] = own_device(options.get("device"))
    options.setdefault("distributed_backend", distributed_backend_for(options["device"]))
    return RunOptions.from_dictionary(options)


def make_output_folder(folder: str | Path, test_only: bool) -> None:
    """Makes the output folder with its log."""
    sb.create_experiment_directory(experiment_directory=str(folder), save_env_desc=not test_only)
    if if_main_process():
        # SpeechBrain leaves a copy of the file that calls it, for it takes that for the recipe.
        (Path(folder) / Path(__file__).name).unlink(missing_ok=True)


def place_for_reports(run: str | Path) -> Path:
    """The folder of a run, or where it may only be read, one here that is named after it."""
    if os.access(run, os.W_OK):
        return Path(run)
    return Path(f"evaluation_of_{Path(run).resolve().name}")


def write_hyperparams(line: CommandLine, folder: str | Path) -> None:
    """Leaves the record of how a model is trained, which outlives evaluations.

    ``hyperparams.yaml`` has every value in its place; ``recipe.yaml`` is the file that was given
    with what was given beside it, from which the run can go on with other values.
    """
    settings = {k: v for k, v in line.run_options.items() if k not in OF_ONE_START}
    recipe = with_overrides(line.param_file, line.overrides | settings)
    for key in PATHS & recipe.keys():
        recipe[key] = from_anywhere(recipe[key])
    with atomic_write(Path(folder) / RECIPE_FILE) as stream:
        stream.write(as_text(recipe))
    with atomic_write(Path(folder) / "hyperparams.yaml") as stream:
        stream.write(f"# From {Path(line.param_file).absolute()}\n# yamllint disable\n")
        overrides = {k: from_anywhere(v) if k in PATHS else v for k, v in line.overrides.items()}
        stream.write(resolved_text(line.param_file, overrides))


def from_anywhere(path: Any) -> Any:
    """A path, or a list of them, that means the same in every working directory."""
    if isinstance(path, list):
        return [from_anywhere(part) for part in path]
    # What does not exist here may be a name on the hub.
    return str(Path(path).absolute()) if isinstance(path, str) and Path(path).exists() else path
