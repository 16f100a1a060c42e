"""Command line of the training scripts: SpeechBrain's options, YAML overrides, one-line errors."""

import argparse
import difflib
import errno
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ruamel.yaml
import torch
from hyperpyyaml import load_hyperpyyaml
from ruamel.yaml.comments import TaggedScalar
from ruamel.yaml.scalarbool import ScalarBoolean
from speechbrain.utils.run_opts import RunOptions

from common.errors import EXIT_USER_ERROR, Interrupted, UserError
from training.launch.devices import distributed_backend_for, own_device
from training.launch.settings import DEFAULTS, SETTINGS, check_setting


@dataclass(frozen=True)
class CommandLine:
    """What was asked for.

    Attributes:
        param_file: the YAML file.
        run_options: SpeechBrain's run options (device, precision, ...) that were given.
        overrides: YAML keys to replace, already parsed as YAML values.
        resume: a checkpoint folder to go on from instead of the latest of the run.
        init_from: a file of model weights to start from.
    """

    param_file: str
    run_options: dict
    overrides: dict
    resume: str | None
    init_from: str | None


def build_parser(description: str) -> argparse.ArgumentParser:
    """SpeechBrain's parser with this repository's two additions."""
    parser = RunOptions._create_parser()
    # A YAML key that begins like an option is not that option.
    parser.allow_abbrev = False
    parser.description = description
    for action in parser._actions:
        if action.dest == "optimizer_step_limit":
            # SpeechBrain's default of None leaves it a string, which no step count exceeds.
            action.type = int
    parser.epilog = (
        "Any key of the YAML file can be overridden: --batch_size 8 "
        "--train_splits '[train-clean-100]' --mamba_config '{d_state: 8}'. "
        "Exit status: 0 done, 2 user error, 130 / 143 stopped by SIGINT / SIGTERM "
        "(a checkpoint is saved: repeat the command to go on)."
    )
    parser.add_argument(
        "--resume",
        metavar="CKPT_FOLDER",
        help="Go back to this checkpoint folder instead of on from the latest one of the run, "
        "every time it is given: leave it out to go on from there after an interruption.",
    )
    parser.add_argument(
        "--init_from",
        metavar="FILE",
        help="Start from the model weights in this file (a model.ckpt); a resumed run ignores it.",
    )
    return parser


def parse_command_line(argv: Sequence[str], description: str) -> CommandLine:
    """Split the arguments into run options, our own options and YAML overrides.

    Raises:
        UserError: an argument that is neither an option nor ``--key value``.
    """
    parser = build_parser(description)
    for action in parser._actions:
        if action.dest != "help":
            # Only what was typed may count as overridden: a run option in the YAML comes next.
            action.default = argparse.SUPPRESS
    known, rest = parser.parse_known_args(list(argv))
    given = vars(known)
    resume = given.pop("resume", None)
    init_from = given.pop("init_from", None)
    if given.get("ckpt_interval_steps", 0) > 0:
        # SpeechBrain refuses both; the interval that was typed replaces the one of the YAML file.
        given.setdefault("ckpt_interval_minutes", 0)
    return CommandLine(
        param_file=given["param_file"],
        run_options=given,
        overrides=parse_overrides(rest, [a.dest for a in parser._actions if a.nargs == 0]),
        resume=resume,
        init_from=init_from,
    )


def run_options(line: CommandLine, hparams: Mapping) -> RunOptions:
    """Run options in force: the command line's, else the YAML file's, else what suits here."""
    defaults = RunOptions().as_dict()
    options = {name: hparams[name] for name in defaults if name in hparams} | line.run_options
    options["device"] = own_device(options.get("device"))
    if options.get("grad_accumulation_factor", 1) < 1:
        raise UserError(
            f"grad_accumulation_factor is {options['grad_accumulation_factor']}; it must be at "
            "least 1."
        )
    options.setdefault("distributed_backend", distributed_backend_for(options["device"]))
    return RunOptions.from_dictionary(options)


def parse_overrides(arguments: Sequence[str], switches: Sequence[str] = ()) -> dict:
    """``["--a", "1", "--b=[x, y]"]`` becomes ``{"a": 1, "b": ["x", "y"]}``.

    Args:
        switches: options without a value, to suggest where one seems misspelt.

    Raises:
        UserError: a value without a key, a key without a value, or a value that is not YAML.
    """
    overrides: dict = {}
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        if not argument.startswith("--"):
            raise UserError(
                f"Argument {argument!r} belongs to no option. Lists need quotes: "
                "--train_splits '[train-clean-100, train-clean-360]'."
            )
        key, equals, text = argument[2:].partition("=")
        if not equals:
            if not queue or queue[0].startswith("--"):
                close = difflib.get_close_matches(key.replace("-", "_"), switches, n=1)
                hint = f" Did you mean --{close[0]}?" if close else ""
                raise UserError(
                    f"--{key} has no value. Keys of the YAML file are written --{key} VALUE.{hint}"
                )
            text = queue.pop(0)
        try:
            # YAML 1.2, as the file is read: 1e-3 is a number.
            overrides[key] = ruamel.yaml.YAML(typ="safe", pure=True).load(text)
        except ruamel.yaml.YAMLError as error:
            raise UserError(
                f"The value of --{key} is not valid YAML: {text!r} ({error})."
            ) from None
    return overrides


def load_hparams(param_file: str, overrides: dict) -> dict:
    """Read a HyperPyYAML file with overrides and build its objects.

    Raises:
        UserError: no such file, not HyperPyYAML, an unknown key among the overrides, a required key
            left open, or an object that refuses its arguments.
    """
    if not Path(param_file).is_file():
        raise UserError(
            f"No such hyperparameter file: {param_file}. See hparams/ for the ones at hand."
        )
    try:
        written = ruamel.yaml.YAML().load(Path(param_file).read_text(encoding="utf-8"))
        keys = written.keys()
    except (ruamel.yaml.YAMLError, AttributeError, UnicodeDecodeError) as error:
        raise UserError(f"{param_file} is not a YAML file of keys and values: {error}") from None
    for key in overrides:
        if key not in keys and key not in DEFAULTS:
            close = difflib.get_close_matches(key, [*keys, *DEFAULTS], n=3)
            hint = (
                f" Did you mean {' or '.join(close)}?" if close else f" It has: {', '.join(keys)}."
            )
            raise UserError(f"{param_file} has no key {key!r}.{hint}")
        check_setting(key, overrides[key], "--")
        if key not in SETTINGS:
            _check_kind(key, written[key], overrides[key])
    for key in keys - overrides.keys():
        if not isinstance(written[key], TaggedScalar):
            check_setting(key, written[key], f"{param_file}: ")
    try:
        with open(param_file, encoding="utf-8") as stream:
            hparams = load_hyperpyyaml(stream, overrides, overrides_must_match=False)
    except ImportError as error:
        raise UserError(f"{param_file}: {error}") from error
    except ValueError as error:
        if "PLACEHOLDER" in str(error):
            raise UserError(
                f"{param_file}: {error} Give it on the command line, for instance "
                "--data_folder /path/to/LibriSpeech."
            ) from None
        raise UserError(f"{param_file}: {error}") from error
    return DEFAULTS | hparams


def _check_kind(key: str, written: object, given: object) -> None:
    """Refuses a word for a number and a number for a switch; what is null or computed takes all."""
    if given is None or not isinstance(written, (bool, int, float)):
        return
    if isinstance(written, (bool, ScalarBoolean)):
        fits, wanted = isinstance(given, bool), "True or False"
    else:
        fits, wanted = isinstance(given, (int, float)) and not isinstance(given, bool), "a number"
    if not fits:
        raise UserError(f"--{key} is {given!r}; it must be {wanted}, as in the file: {written}.")


def _leave_process_group() -> None:
    """All processes of a run end together: one that ends alone can tear down what others use."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def run_script(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> None:
    """Run a script's main function; end the process with the documented status.

    A UserError, and a disk that is full, is printed as one message. Anything else is a fault of
    the code and keeps its traceback.
    """
    try:
        main(sys.argv[1:] if argv is None else argv)
        _leave_process_group()
    except UserError as error:
        # From a loader's worker it arrives below that process's traceback.
        print(f"error: {str(error).split('UserError: ')[-1].strip()}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(
            f"error: {error}. Checkpoints are whole: make room and repeat the command to go on.",
            file=sys.stderr,
        )
        sys.exit(EXIT_USER_ERROR)
    except Interrupted as interrupted:
        sys.exit(interrupted.exit_status)
    except KeyboardInterrupt:
        print("interrupted before training began; nothing to go on from", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
