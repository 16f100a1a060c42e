"""The first steps of every run: command line, YAML file, device, processes, output folder."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import speechbrain as sb
from hyperpyyaml import resolve_references
from speechbrain.utils.distributed import ddp_init_group, if_main_process
from speechbrain.utils.run_opts import RunOptions

from common.files import atomic_write
from training.launch.allocator import keep_freed_memory
from training.launch.command_line import CommandLine, load_hparams, parse_command_line, run_options
from training.launch.devices import check_device, check_precision


def start_run(argv: Sequence[str], description: str) -> tuple[CommandLine, dict, RunOptions]:
    """Reads what was asked for and joins the other processes of the run.

    Args:
        argv: arguments of the command line, the YAML file first.
        description: of the script, for ``--help``.

    Returns:
        the command line, the hyperparameters with their objects, and the run options in force.

    Raises:
        UserError: see ``parse_command_line`` and ``load_hparams``; or a device or a precision that
            is not to be had here.
    """
    line = parse_command_line(argv, description)
    hparams = load_hparams(line.param_file, line.overrides)
    options = run_options(line, hparams)
    check_device(options.device)
    check_precision(options.device, options.precision)
    check_precision(options.device, options.eval_precision)
    if options.device == "cpu":
        keep_freed_memory()
    ddp_init_group(options)
    return line, hparams, options


def make_output_folder(line: CommandLine, hparams: dict, test_only: bool) -> None:
    """Makes the output folder with its log and, of a training run, its hyperparameters.

    The record of how a model was trained outlives an evaluation with other settings.
    """
    sb.create_experiment_directory(
        experiment_directory=hparams["output_folder"], save_env_desc=not test_only
    )
    if not test_only and if_main_process():
        with open(line.param_file, encoding="utf-8") as stream:
            resolved = resolve_references(stream, line.overrides, overrides_must_match=False)
        # SpeechBrain empties the file of an earlier run before it writes.
        with atomic_write(Path(hparams["output_folder"]) / "hyperparams.yaml") as stream:
            stream.write(f"# From {Path(line.param_file).absolute()}\n# yamllint disable\n")
            shutil.copyfileobj(resolved, stream)
