"""Command line of the training scripts: SpeechBrain's options, YAML overrides, one-line errors.

Nothing here imports torch or SpeechBrain until objects are built: a mistake is answered at once.
"""

import argparse
import difflib
import errno
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ruamel.yaml
from hyperpyyaml import load_hyperpyyaml
from ruamel.yaml.scalarbool import ScalarBoolean

from common.errors import EXIT_USER_ERROR, WRITER_FAILED, Interrupted, UserError, in_words
from common.files import require_file
from training.launch.key_help import keys_as_text
from training.launch.lasting_output import lasting_output
from training.launch.parts import check_parts
from training.launch.run_options import IN_USE, option_actions
from training.launch.settings import (
    DEFAULTS,
    NEEDED_OBJECTS,
    SETTINGS,
    UNREAD,
    VERBATIM,
    check_inputs,
    check_places,
    check_setting,
    check_together,
)
from training.launch.suggestions import describe_unknown, misspelt
from training.launch.yaml_file import (
    RECIPE_FILE,
    is_open,
    read_yaml,
    resolved_text,
    tag_of,
    with_overrides,
)

REPOSITORY = Path(__file__).resolve().parents[2]

RECIPE_SCRIPTS = {"train_text": "train_LM.py", "seq_lin": "train_S2S.py", "ctc_lin": "train_CTC.py"}
"""Which script trains a file that has the key; the first that is there decides."""

EXAMPLE_FILES = {
    "train_CTC.py": "hparams/CTC/conmamba_small.yaml",
    "train_S2S.py": "hparams/S2S/conmamba_small.yaml",
    "train_LM.py": "hparams/LM/transformer_small.yaml",
}
"""Whose keys are listed where help is asked for without a file."""

EXAMPLE_VALUES = {
    "data_folder": "/path/to/LibriSpeech",
    "train_text": "text.txt",
    "valid_text": "dev.txt",
}
"""Of keys that a file leaves open."""


@dataclass(frozen=True)
class CommandLine:
    """What was asked for.

    Attributes:
        param_file: the YAML file.
        run_options: SpeechBrain's run options (device, precision, ...) that were given.
        overrides: YAML keys to replace, already parsed as YAML values.
        resume: a checkpoint folder to go on from instead of the latest of the run.
        init_from: a file of model weights to start from; a run or a bundle stands for its own.
        eval_name: what an evaluation is called.
    """

    param_file: str
    run_options: dict
    overrides: dict
    resume: str | None
    init_from: str | None
    eval_name: str | None = None


def build_parser(description: str) -> argparse.ArgumentParser:
    """SpeechBrain's options with this repository's three additions."""
    parser = argparse.ArgumentParser(
        # A YAML key that begins like an option is not that option.
        allow_abbrev=False,
        usage="%(prog)s YAML_FILE_OR_RUN [--KEY VALUE ...] [OPTION ...]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "param_file",
        metavar="YAML_FILE_OR_RUN",
        help="a recipe, such as those of hparams/, or the folder of a run, which goes on with its "
        "settings (with --test_only: is evaluated)",
    )
    parser.add_argument(
        "--resume",
        metavar="CHECKPOINT",
        help="Go back to this checkpoint folder instead of on from the latest one of the run, "
        "every time it is given: leave it out to go on from there after an interruption. A pattern "
        "in quotes ('save/CKPT+2024*'), a save folder or a run stand for their newest one.",
    )
    parser.add_argument(
        "--init_from",
        metavar="WEIGHTS",
        help="Start from the model weights in this file (a model.ckpt), or of this run or bundle; "
        "those of a CTC run also start the encoder of a joint model. A resumed run ignores it.",
    )
    parser.add_argument(
        "--eval_name",
        metavar="NAME",
        help="With --test_only: reports go to eval/NAME of the output folder, scores to "
        "evaluations in its results.json. By default the name says what distinguishes this "
        "evaluation: its splits, language model and beam.",
    )
    run, others = (
        parser.add_argument_group(title)
        for title in ("options of the run", "further options of SpeechBrain")
    )
    for name, action in option_actions().items():
        (run if name in IN_USE else others)._add_action(action)
    return parser


def help_text(argv: Sequence[str], description: str) -> str:
    """All options, and the keys of the YAML file that is named, else of the script's example."""
    parser = build_parser(description)
    words = [os.path.join(word, RECIPE_FILE) if Path(word).is_dir() else word for word in argv]
    files = [word for word in words if word.endswith((".yaml", ".yml")) and Path(word).is_file()]
    example = EXAMPLE_FILES.get(parser.prog, EXAMPLE_FILES["train_CTC.py"])
    file = files[0] if files else os.path.relpath(REPOSITORY / example)
    parser.epilog = (
        f"keys of {file}:\n"
        "  Each can be replaced on the command line, with values in the syntax of YAML:\n"
        "  --batch_size 8 --train_splits '[train-clean-100]' --mamba_config '{d_state: 8}'\n\n"
        f"{keys_as_text(file)}\n"
        "exit status: 0 done, 2 user error, 130 / 143 stopped by SIGINT / SIGTERM\n"
        "(a checkpoint is saved: repeat the command to go on)"
    )
    return parser.format_help()


def parse_command_line(argv: Sequence[str], description: str) -> CommandLine:
    """Split the arguments into run options, our own options and YAML overrides.

    Raises:
        UserError: an argument that is neither an option nor ``--key value``, or an option whose
            value cannot be.
    """
    parser = build_parser(description)
    for action in parser._actions:
        if action.dest != "help":
            # Only what was typed may count as overridden: a run option in the YAML comes next.
            action.default = argparse.SUPPRESS
    known, rest = parser.parse_known_args(list(argv))
    given = vars(known)
    for key, value in given.items():
        check_setting(key, value, "--")
    resume = given.pop("resume", None)
    init_from = given.pop("init_from", None)
    eval_name = given.pop("eval_name", None)
    if eval_name is not None and not given.get("test_only"):
        raise UserError(
            "--eval_name names an evaluation of a trained run: give --test_only with it."
        )
    if given.get("test_only") and (resume is not None or init_from is not None):
        option = "--init_from" if resume is None else "--resume"
        raise UserError(
            f"{option} is for training; --test_only evaluates the mean of the run's best "
            "checkpoints. Leave one of the two out."
        )
    intervals = ("ckpt_interval_steps", "ckpt_interval_minutes")
    typed = [name for name in intervals if given.get(name, 0) > 0]
    if len(typed) == 2:
        raise UserError(f"--{typed[0]} and --{typed[1]} exclude each other: give one.")
    for name in typed:
        # The interval that was typed replaces the other one of the YAML file.
        given.setdefault(intervals[1 - intervals.index(name)], 0)
    overrides = parse_overrides(rest, [a.dest for a in parser._actions if a.nargs == 0])
    if Path(given["param_file"]).is_dir():
        run = given["param_file"]
        given["param_file"] = _recipe_of(run)
        # The run may have been moved since.
        overrides.setdefault("output_folder", run)
    return CommandLine(
        param_file=given["param_file"],
        run_options=given,
        overrides=overrides,
        resume=resume,
        init_from=init_from and _weights_of(init_from),
        eval_name=eval_name,
    )


def _recipe_of(run: str) -> str:
    """The file that a run was begun with."""
    path = os.path.join(run, RECIPE_FILE)
    if not Path(path).is_file():
        raise UserError(
            f"{run} has no {RECIPE_FILE}, so it is not the folder of a run, or one of an older "
            f"version: name a YAML file instead, and --output_folder {run}."
        )
    return path


def _weights_of(path: str) -> str:
    """The file of weights that a path names, or that the run, checkpoint or bundle there has."""
    names = ("save/averaged/model.ckpt", "lm/lm.ckpt", "model.ckpt", "model.safetensors")
    return next((file for name in names if Path(file := os.path.join(path, name)).is_file()), path)


def check_arguments(description: str) -> None:
    """Answers ``--help`` and mistakes of the command line; called before torch is imported.

    Ends the process with status 0 or 2, or returns where nothing was found wrong.
    """
    argv = sys.argv[1:]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end_before_training)
    if "-h" in argv or "--help" in argv:
        with lasting_output():
            print(help_text(argv, description), end="")
        sys.exit(0)

    def check(argv: Sequence[str]) -> None:
        line = parse_command_line(argv, description)
        plain = check_keys(line.param_file, line.overrides, Path(sys.argv[0]).name)
        # Of several processes one asks, as the recipes do later.
        if os.environ.get("RANK", "0") == "0":
            test_only = line.run_options.get("test_only", False)
            check_inputs(plain, test_only)
            if not test_only:
                check_places(plain)
            check_init_from(line)

    run_script(check, argv)


def check_init_from(line: CommandLine) -> None:
    """Checks the file of first weights.

    Raises:
        UserError: it cannot be read.
    """
    if line.init_from is not None:
        advice = "Give a finished run, or a file of weights such as its save/averaged/model.ckpt."
        require_file("--init_from", line.init_from, advice)


def check_keys(param_file: str, overrides: dict, script: str | None = None) -> dict:
    """Checks the keys of a file and what replaces them, before anything is built.

    Args:
        script: name of the script that is to train the file.

    Returns:
        the values that hold, as far as they refer to no others.

    Raises:
        UserError: no such file, not HyperPyYAML, the file of another script, an unknown key, a
            value that cannot be, or a required key left open.
    """
    written = read_yaml(param_file)
    wanted = next((name for key, name in RECIPE_SCRIPTS.items() if key in written), script)
    if script in RECIPE_SCRIPTS.values() and wanted != script:
        raise UserError(f"{param_file} is trained by {wanted}, not by {script}.")
    if unread := sorted((written.keys() | overrides.keys()) & UNREAD.get(wanted or "", set())):
        raise UserError(f"{param_file}: {wanted} does nothing with {', '.join(unread)}.")
    for key, value in overrides.items():
        if key not in written and key not in DEFAULTS:
            raise UserError(f"{param_file} has no key {key!r}.{describe_unknown(key, written)}")
        check_setting(key, value, "--")
        if key not in SETTINGS:
            _check_kind(key, written[key], value)
    if still_open := [k for k in written if is_open(written[k]) and k not in overrides]:
        example = " ".join(f"--{key} {EXAMPLE_VALUES.get(key, 'VALUE')}" for key in still_open)
        raise UserError(f"{param_file} leaves open what only you can know. Give it: {example}.")
    for key in written.keys() - overrides.keys():
        if ours := misspelt(key, written):
            raise UserError(f"{param_file}: {key} is read by nothing. Did you mean {ours}?")
        if not tag_of(written[key]):
            check_setting(key, written[key], f"{param_file}: ")
    plain = {key: value for key, value in written.items() if not tag_of(value)}
    check_together(plain | overrides, f"{param_file}: ")
    return plain | overrides


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
        if re.match("-[a-zA-Z]", argument):
            raise UserError(f"{argument} begins with one dash; options have two: -{argument}.")
        if not argument.startswith("--"):
            raise UserError(
                f"Argument {argument!r} belongs to no option. Lists and patterns need quotes: "
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
            if key in VERBATIM and overrides[key] is not None:
                # A folder may be called 2024-06-01, 007 or 1e3.
                overrides[key] = ruamel.yaml.YAML(typ="base", pure=True).load(text)
        except ruamel.yaml.YAMLError as error:
            quotes = f" Quote lists and mappings: --{key} '[...]'."
            raise UserError(
                f"The value of --{key} is not valid YAML: {text!r} "
                f"({getattr(error, 'problem', None) or error})."
                f"{quotes if text.startswith(('[', '{')) else ''}"
            ) from None
    return overrides


def load_hparams(param_file: str, overrides: dict) -> dict:
    """Read a HyperPyYAML file with overrides and build its objects.

    Raises:
        UserError: see ``check_keys``; or an object that refuses its arguments.
    """
    check_keys(param_file, overrides)
    check_parts(with_overrides(param_file, overrides), param_file)
    try:
        hparams = load_hyperpyyaml(resolved_text(param_file, overrides))
    except (ImportError, ValueError) as error:
        raise UserError(f"{param_file}: {error}") from error
    except Exception as error:
        if (part := _part_that_failed(error)) is None:
            raise
        raise UserError(
            f"{param_file}: {part} cannot be made with these values: {_first_words(error)}"
        ) from error
    for name, part in (hparams.get("modules") or {}).items():
        if not hasattr(part, "state_dict"):
            raise UserError(f"{param_file}: modules.{name} is {part!r}; it must be a network.")
    schedule = hparams.get("noam_scheduler")
    if type(schedule).__name__ == "NoamScheduler" and schedule.n_warmup_steps < 1:
        raise UserError(
            f"{param_file}: n_warmup_steps is {schedule.n_warmup_steps}; the NoamScheduler of this "
            "file needs at least 1."
        )
    speeds = getattr(hparams.get("speed_perturb"), "speeds", [100])
    if not speeds or min(speeds) <= 0:
        raise UserError(
            f"{param_file}: speed_perturb has the speeds {speeds}; it needs percentages above 0, "
            "such as [90, 100, 110]. To train at the recorded speed, give --speed_perturb null."
        )
    return DEFAULTS | hparams


def _part_that_failed(error: Exception) -> str | None:
    """The class or function that HyperPyYAML called when an exception came."""
    trace, part = error.__traceback__, None
    while trace is not None:
        part = trace.tb_frame.f_locals.get("callable_string", part)
        trace = trace.tb_next
    return part


def _first_words(error: Exception) -> str:
    """What a constructor said; HyperPyYAML puts a line of its own before it."""
    words = str(error.args[-1]) if error.args else ""
    return f"{words} ({type(error).__name__})"


def _check_kind(key: str, written: object, given: object) -> None:
    """Refuses a word for a number and a number for a switch or an object.

    What is null or computed takes all, and null takes the place of all.
    """
    if given is None:
        if key in NEEDED_OBJECTS:
            raise UserError(f"--{key} is null; a run needs it.")
        return
    if isinstance(written, list) and any(tag_of(item) for item in written):
        fits, wanted = given == [], "[], or what the file has: its parts are objects of the file"
    elif isinstance(written, Mapping):
        fits, wanted = isinstance(given, Mapping), "parts of it, such as '{name: value}'"
    elif isinstance(written, list):
        fits, wanted = isinstance(given, list), "a list, such as '[a, b]'"
    elif isinstance(written, (bool, ScalarBoolean)):
        fits, wanted = isinstance(given, bool), "True or False"
    elif isinstance(written, (int, float)):
        fits, wanted = isinstance(given, (int, float)) and not isinstance(given, bool), "a number"
    else:
        return
    if not fits:
        shown = "" if isinstance(written, (Mapping, list)) else f", as in the file: {written}"
        raise UserError(f"--{key} is {given!r}; it must be {wanted}{shown}.")


def _leave_process_group() -> None:
    """All processes of a run end together: one that ends alone can tear down what others use."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def _end_before_training(number: int, frame: object) -> None:
    """Ctrl-C while modules are imported, where an exception would end anywhere."""
    del frame
    os.write(2, b"interrupted before training began; nothing to go on from\n")
    os._exit(128 + number)


def run_script(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> None:
    """Run a script's main function; end the process with the documented status.

    A UserError, and a machine that is out of disk space, files or workers, is printed as one
    message. Anything else is a fault of the code and keeps its traceback.
    """
    if signal.getsignal(signal.SIGINT) is _end_before_training and argv is None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with lasting_output():
        status = _status_of(main, sys.argv[1:] if argv is None else argv)
    if status:
        sys.exit(status)


def _status_of(main: Callable[[Sequence[str]], None], argv: Sequence[str]) -> int:
    try:
        main(argv)
        _leave_process_group()
    except UserError as error:
        # From a loader's worker it arrives below that process's traceback.
        return _refused(str(error).split("UserError: ")[-1].strip())
    except (OSError, RuntimeError) as error:
        message = _out_of_resources(error)
        if message is None:
            raise
        return _refused(message)
    except Interrupted as interrupted:
        if os.environ.get("RANK", "0") == "0":
            print(f"{interrupted.what_is_left}; repeat the command to go on")
        return interrupted.exit_status
    except KeyboardInterrupt:
        print(
            "interrupted; repeat the command to go on from the last checkpoint, if there is one",
            file=sys.stderr,
        )
        return 128 + signal.SIGINT
    return 0


def _refused(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return EXIT_USER_ERROR


def _out_of_resources(error: OSError | RuntimeError) -> str | None:
    """What to say where the machine, not the code, has failed; None for a fault of the code."""
    text, number = str(error).strip(), getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT) or any(sign in text for sign in WRITER_FAILED):
        reason = in_words(error).splitlines()[0]
        return f"{reason}. Checkpoints are whole: make room and repeat the command to go on."
    in_the_way = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR)
    if number in in_the_way and getattr(error, "filename", None) is not None:
        return f"{in_words(error)}. Put right what lies there, or give another folder."
    files = "raise the limit (ulimit -n 65536), or use fewer --num_workers"
    if number in (errno.EMFILE, errno.ENFILE) or "Too many open files" in text:
        return f"Too many open files: {files}, and repeat the command to go on."
    if "DataLoader worker" in text:
        return (
            f"A loader worker has died: {text.splitlines()[0]} What it said is above; where that "
            f"is of open files, {files}; where it is nothing, memory may have run out. Repeat the "
            "command to go on."
        )
    return None
