"""Transcribe audio with a trained model.

python transcribe.py results/demo speech.mp3
python transcribe.py results/demo recordings/ 'more/*.m4a' --format txt,srt --output_dir texts
"""

import argparse
import io
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError
from common.files import atomic_write
from common.tables import format_duration
from inference.command_line import (
    add_model_options,
    check_model,
    exit_status,
    load_recognizer,
    search_options,
)
from inference.formats import FORMATS
from inference.sources import Source, find_sources

EXIT_BAD_AUDIO = 1


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="transcribe.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder of a run or a bundle, or a name on the hub")
    add(
        "audio",
        nargs="+",
        metavar="AUDIO",
        help="files, folders (searched for audio), globs; - is standard input",
    )
    add(
        "--format",
        type=_formats,
        default=["txt"],
        metavar="NAMES",
        help=f"one or several of {','.join(FORMATS)} (default: txt)",
    )
    add("--output_dir", metavar="FOLDER", help="a file for each input and format goes there")
    add("--channel", type=int, metavar="N", help="from 0 (default: all mixed down)")
    add_model_options(parser)
    return parser


def _formats(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in FORMATS:
            known = ", ".join(FORMATS)
            raise argparse.ArgumentTypeError(f"{name!r} is none of the formats {known}")
    return list(dict.fromkeys(names))


def transcribe(arguments: argparse.Namespace) -> int:
    """Transcribes all that can be; returns the exit status."""
    if arguments.channel is not None and arguments.channel < 0:
        raise UserError(f"--channel is {arguments.channel}; channels are counted from 0.")
    check_model(arguments.model)
    search = search_options(arguments)
    output_dir = None if arguments.output_dir is None else _made(Path(arguments.output_dir))
    sources, failures = find_sources(arguments.audio)
    if sources:
        recognizer = load_recognizer(arguments)
        failures += _transcribe_all(recognizer, sources, output_dir, arguments, search)
    if failures:
        print(f"\n{len(failures)} could not be transcribed:", file=sys.stderr)
        for failure in failures:
            print(f"  {failure}", file=sys.stderr)
    return EXIT_BAD_AUDIO if failures else 0


def _transcribe_all(
    recognizer, sources: Sequence[Source], output_dir: Path | None, arguments, search: dict
) -> list[str]:
    """Writes each transcript as it comes; returns what is wrong with bad recordings."""
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    from inference import AudioError

    failures, audio_s = [], 0.0
    started = time.perf_counter()
    # Where standard error is no terminal a bar would only fill it.
    disable = True if arguments.noprogressbar else None
    with tqdm(total=len(sources), unit="file", disable=disable) as bar, logging_redirect_tqdm():
        results = recognizer.transcribe_many(
            [source.audio for source in sources],
            batch_seconds=arguments.batch_seconds,
            channel=arguments.channel,
            **search,
        )
        for source, (_, result) in zip(sources, results, strict=True):
            if isinstance(result, AudioError):
                failures.append(str(result))
            else:
                audio_s += result.duration_s
                for name in arguments.format:
                    text = FORMATS[name](result, source.name if name == "json" else source.title)
                    if output_dir is not None:
                        _write(output_dir / f"{source.stem}.{name}", text)
                    else:
                        mark = f"{source.name}\t" if name == "txt" and len(sources) > 1 else ""
                        tqdm.write(mark + text, end="")
                        sys.stdout.flush()
            rate = audio_s / (time.perf_counter() - started)
            bar.set_postfix_str(f"{rate:.1f} audio seconds per second", refresh=False)
            bar.update()
    if not arguments.noprogressbar:
        elapsed_s = time.perf_counter() - started
        print(
            f"{format_duration(audio_s)} of audio in {format_duration(elapsed_s)}: "
            f"{audio_s / elapsed_s:.1f} audio seconds per second",
            file=sys.stderr,
        )
    return failures


def _write(path: Path, text: str) -> None:
    _made(path.parent)
    try:
        with atomic_write(path) as stream:
            stream.write(text)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from None


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror}.") from None
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = build_parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    return exit_status(transcribe, arguments)


if __name__ == "__main__":
    sys.exit(main())
