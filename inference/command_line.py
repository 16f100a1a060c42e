"""What the command lines of transcribe.py and evaluate.py have in common; without torch."""

import argparse
import errno
import io
import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from common.errors import EXIT_SIGINT, EXIT_USER_ERROR, UserError, in_words
from common.files import atomic_write, require_file, why_unreadable
from common.tables import format_duration

EXIT_BAD_AUDIO = 1
"""What could be done was done."""

DEFAULT_BOOST = 10.0
"""Nats of a hotword whose line has none."""

HOW_TO_GET_A_MODEL = (
    "Train one (make demo, or python train_CTC.py hparams/CTC/an4.yaml ...) and give its "
    "output_folder, or give a bundle's folder, or the name of a bundle on the Hugging Face hub."
)
# In the words of CUDA, MPS and the CPU's allocator.
_FULL_MEMORY = re.compile(r"out of memory|not enough memory|allocate memory")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Options of the recogniser and its search, under the names that the recipes have for them."""
    add = parser.add_argument
    add("--search", choices=("beam", "greedy"), default="beam", help="default: %(default)s")
    add("--beam_size", type=positive(int), metavar="N", help="default: as the model's recipe")
    add(
        "--hotwords",
        metavar="FILE",
        help="phrases to prefer: one a line, if wanted with a tab and a boost in nats "
        f"(default: {DEFAULT_BOOST:g})",
    )
    add("--kenlm_model_path", metavar="FILE", help="word n-gram, ARPA, plain or .gz (CTC models)")
    add("--alpha", type=float, help="weight of the n-gram")
    add("--beta", type=float, help="nats for each word, where there is an n-gram")
    add(
        "--lookahead",
        type=float,
        metavar="SHARE",
        help="of a chunk, that the next one begins with; fewer errors for more computation "
        "(default: as the model's recipe)",
    )
    add("--device", help="cuda, cuda:1, mps or cpu (default: the first of these that is there)")
    add("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="default: fp32")
    add("--threads", type=positive(int), metavar="N", help="of the CPU (default: as torch has it)")
    add(
        "--batch_seconds",
        type=positive(float),
        metavar="S",
        default=120.0,
        help="audio that is encoded at once, padding included (default: %(default)g)",
    )
    add("--noprogressbar", action="store_true", help="nothing on standard error but errors")


def positive(kind: type) -> Callable[[str], Any]:
    """For argparse: a number above zero."""

    def parse(text: str) -> Any:
        number = kind(text)
        if not (number > 0 and math.isfinite(number)):
            raise argparse.ArgumentTypeError(f"{text} is not above zero")
        return number

    parse.__name__ = kind.__name__
    return parse


def check_model(model: str) -> None:
    """Finds what can be wrong with the name of a model, before anything slow is imported.

    Raises:
        UserError: it is no folder of a model, and no name of one on the hub.
    """
    folder = Path(model)
    if folder.is_dir():
        if not any((folder / name).exists() for name in ("config.json", "hyperparams.yaml")):
            raise UserError(
                f"{model} holds no model: a bundle has a config.json, a training run a "
                f"hyperparams.yaml. {HOW_TO_GET_A_MODEL}"
            )
    elif folder.exists():
        raise UserError(f"{model} is a file; a model is a folder. {HOW_TO_GET_A_MODEL}")
    elif not _HUB_NAME.fullmatch(model):
        raise UserError(f"No model: there is no folder {model}. {HOW_TO_GET_A_MODEL}")


def search_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of ``inference.recognizer.SearchOptions`` that were given.

    Raises:
        UserError: a file cannot be used, or an option belongs to another search.
    """
    if arguments.search == "greedy":
        for name in ("beam_size", "hotwords", "kenlm_model_path", "alpha", "beta"):
            if getattr(arguments, name) is not None:
                raise UserError(f"--{name} belongs to --search beam.")
    ngram = arguments.kenlm_model_path
    if ngram is not None:
        require_file("--kenlm_model_path", ngram, "Give an n-gram of words as an ARPA file.")
    options = {
        "search": arguments.search,
        "beam_size": arguments.beam_size,
        "hotwords": None if arguments.hotwords is None else read_hotwords(arguments.hotwords),
        "ngram": ngram,
        "alpha": arguments.alpha,
        "beta": arguments.beta,
    }
    return {name: value for name, value in options.items() if value is not None}


def read_hotwords(path: str | os.PathLike) -> dict[str, float]:
    """Phrases and their boosts, a line each.

    Raises:
        UserError: the file cannot be read, has no phrase, or a boost that is no number.
    """
    if reason := why_unreadable(path, regular=False):
        raise UserError(f"hotwords {path}: {reason}. Give a file with a phrase in each line.")
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"hotwords {path}: it is not UTF-8. Convert it first.") from None
    boosts = {}
    for number, line in enumerate(lines, start=1):
        phrase, _, boost = line.partition("\t")
        if not line.strip():
            continue
        try:
            boosts[phrase.strip()] = float(boost) if boost.strip() else DEFAULT_BOOST
        except ValueError:
            raise UserError(
                f"hotwords {path}, line {number}: {boost.strip()!r} is no boost in nats, such as 8."
            ) from None
    if not boosts:
        raise UserError(f"hotwords {path}: there is no phrase in it.")
    return boosts


def load_recognizer(arguments: argparse.Namespace) -> Any:
    """The recogniser that was asked for; imports torch.

    Raises:
        UserError: there is none, or not on such a device.
    """
    import torch

    from inference import Recognizer

    if arguments.threads is not None:
        # Here, because reading a model computes.
        torch.set_num_threads(arguments.threads)
    return Recognizer.from_pretrained(
        arguments.model,
        device=arguments.device,
        precision=arguments.precision,
        lookahead=arguments.lookahead,
    )


def with_progress(
    transcribe: Callable[..., Iterable[tuple[Any, Any]]], total: int, noprogressbar: bool
) -> Iterator[tuple[Any, Any]]:
    """Passes on what ``Recognizer.transcribe_many`` yields, with a bar on standard error.

    The speed stays there at the end, also where standard error is no terminal, and there is no bar.

    Args:
        transcribe: is called with ``progress``, as ``transcribe_many`` has it.
        total: recordings.
        noprogressbar: nothing on standard error.
    """
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    files, audio_s, started = 0, 0.0, time.perf_counter()
    hidden = True if noprogressbar else None
    layout = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"

    def progress(recordings: float, newly_s: float) -> None:
        nonlocal audio_s
        audio_s += newly_s
        rate = audio_s / (time.perf_counter() - started)
        told = f"{files} of {total} files, {rate:.1f} audio seconds per second"
        bar.set_postfix_str(told, refresh=False)
        bar.update(recordings)

    with tqdm(total=total, bar_format=layout, disable=hidden) as bar, logging_redirect_tqdm():
        for source, result in transcribe(progress=progress):
            files += 1
            yield source, result
    if audio_s and not noprogressbar:
        elapsed_s = time.perf_counter() - started
        print(
            f"{format_duration(audio_s)} of audio in {format_duration(elapsed_s)}: "
            f"{audio_s / elapsed_s:.1f} audio seconds per second",
            file=sys.stderr,
        )


def report_failures(failures: Sequence[str], what: str) -> int:
    """Lists what went wrong with recordings; returns the exit status."""
    if failures:
        print(f"\n{len(failures)} could not be {what}:", file=sys.stderr)
    for failure in failures:
        print(f"  {failure}", file=sys.stderr)
    return EXIT_BAD_AUDIO if failures else 0


class UnusableName(UserError):
    """A file or folder cannot have this name; others can be written."""


_OF_THE_NAME = (errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOTDIR)


def made_folder(folder: Path) -> Path:
    """A folder that is made if it is not there.

    Raises:
        UserError: it cannot be, or nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(error, f"{folder} cannot be made") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{folder} cannot be written to: {os.strerror(errno.EACCES)}.")
    return folder


def write_text(path: Path, text: str) -> None:
    """Writes a file, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    try:
        with atomic_write(path) as stream:
            stream.write(text)
    except OSError as error:
        raise _unusable(error, f"{path} cannot be written") from None


def _unusable(error: OSError, what: str) -> UserError:
    kind = UnusableName if error.errno in _OF_THE_NAME else UserError
    return kind(f"{what}: {error.strerror}.")


def exit_status(run: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """Runs a script's work; what the user can mend becomes one message."""
    if sys.stderr is None:
        # It was closed (2>&-): print would take standard output instead. This one stays open.
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        return run(arguments)
    except UserError as error:
        return _failed(str(error))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not _FULL_MEMORY.search(str(error)):
            raise
        return _failed(
            f"There is not enough memory ({str(error).splitlines()[0] if str(error) else 'RAM'}). "
            f"Give less than --batch_seconds {arguments.batch_seconds:g}, or cut the longest file."
        )
    except BrokenPipeError:
        # Whoever read our output has seen enough; what is left in the buffer would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _failed(in_words(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_SIGINT


def _failed(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return EXIT_USER_ERROR
