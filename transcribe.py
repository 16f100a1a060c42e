"""Transcribe audio with a trained model.

python transcribe.py results/demo speech.mp3
python transcribe.py results/demo_streaming speech.mp3 --stream
python transcribe.py results/demo recordings/ 'more/*.m4a' --format txt,srt --output_dir texts
"""

import argparse
import functools
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError
from inference import Transcript
from inference.audio import AudioError
from inference.command_line import (
    UnusableName,
    add_model_options,
    check_model,
    exit_status,
    load_recognizer,
    made_folder,
    positive,
    report_failures,
    search_options,
    with_progress,
    write_text,
)
from inference.formats import FORMATS
from inference.sources import Source, find_sources

_MAX_SEGMENT_S = 30.0
_NO_FILE = "\0"
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


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
        nargs="*",
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
    add(
        "--alternatives",
        type=positive(int),
        metavar="N",
        help="so many further texts of each recording, in the JSON",
    )
    add("--channel", type=int, metavar="N", help="from 0 (default: all mixed down)")
    add(
        "--max_duration_s",
        type=positive(float),
        metavar="S",
        help="longer recordings are refused: small files may hold more than fits into memory",
    )
    add(
        "--max_segment_s",
        type=float,
        metavar="S",
        help="longer recordings are cut in their pauses into segments of so many seconds "
        f"(default: {_MAX_SEGMENT_S:g}; of --stream: 20)",
    )
    add(
        "--whole",
        action="store_true",
        help="encode a recording of any length as one instead (Mamba and ConMamba encoders)",
    )
    add(
        "--stream",
        action="store_true",
        help="recognise while the recording is played, in chunks; Ctrl-C ends it with its text",
    )
    add(
        "--speed",
        type=_speed,
        metavar="X",
        help="of --stream: how fast the recording is played (default: 1), or max",
    )
    add("--microphone", action="store_true", help="of --stream: listen to the default input")
    add(
        "--chunk_ms",
        type=positive(float),
        metavar="MS",
        help="no frame sees what follows its chunk (models for streaming); the longest wait",
    )
    add_model_options(parser)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, of which recordings may stand behind options, and behind -- nothing else."""
    parser, end = build_parser(), argv.index("--") if "--" in argv else len(argv)
    before, behind = argv[:end], argv[end + 1 :]
    # Intermixed, argparse does not know --; in order it does.
    if parser.parse_known_args([*before, "--", _NO_FILE])[0].model == _NO_FILE:
        arguments = parser.parse_args([*before, "--", *behind[:1]])
        behind = behind[1:]
    else:
        arguments = parser.parse_intermixed_args(before)
    arguments.audio += behind
    return arguments


def _speed(text: str) -> float:
    return math.inf if text == "max" else positive(float)(text)


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
    if arguments.microphone and (arguments.audio or not arguments.stream):
        raise UserError("--microphone goes with --stream and without recordings.")
    if arguments.stream and arguments.whole:
        raise UserError("--whole and --stream exclude each other: a stream is encoded in chunks.")
    if arguments.speed is not None and not arguments.stream:
        raise UserError("--speed is of --stream: without it nothing is played.")
    if arguments.lookahead is not None and not (arguments.stream or arguments.chunk_ms):
        raise UserError("--lookahead is of chunks: give --chunk_ms or --stream as well.")
    if not arguments.microphone and not arguments.audio:
        raise UserError("There is nothing to transcribe: name recordings, or use --microphone.")
    if arguments.alternatives is not None and "json" not in arguments.format:
        raise UserError("--alternatives are in the JSON: give --format json as well.")
    if sys.stdout is None and arguments.output_dir is None:
        raise UserError("Standard output is closed: give --output_dir.")
    check_model(arguments.model)
    search = search_options(arguments)
    if arguments.alternatives is not None:
        search["alternatives"] = arguments.alternatives
    folder = None if arguments.output_dir is None else made_folder(Path(arguments.output_dir))
    sources, failures = find_sources(arguments.audio)
    results: Iterable[tuple[Source, Transcript | AudioError]] = []
    if arguments.stream and (sources or arguments.microphone):
        results = _streamed(sources, arguments, search)
    elif sources:
        results = _transcribed(sources, arguments, search)
    for source, result in results:
        if isinstance(result, AudioError):
            failures.append(str(result))
            continue
        for name in arguments.format:
            text = FORMATS[name](result, source.name if name == "json" else source.title)
            if folder is not None:
                path = folder / f"{source.stem}.{name}"
                try:
                    made_folder(path.parent)
                    write_text(path, text)
                except UnusableName as error:
                    failures.append(str(error))
                    break
            elif name == "txt" and len(sources) > 1:
                _print(f"{_in_one_field(source.name)}\t{text}")
            else:
                _print(text)
    return report_failures(failures, "transcribed")


def _transcribed(
    sources: Sequence[Source], arguments: argparse.Namespace, search: Mapping[str, Any]
) -> Iterator[tuple[Source, Transcript | AudioError]]:
    from inference.streaming_text import Endpoints

    recognizer = load_recognizer(arguments)
    longest_s = arguments.max_segment_s
    if arguments.chunk_ms and longest_s is not None:
        # As in streams, whose text it is.
        recognizer.endpoints, longest_s = Endpoints(max_segment_s=longest_s), None
    transcribe_all = functools.partial(
        recognizer.transcribe_many,
        [source.audio for source in sources],
        batch_seconds=arguments.batch_seconds,
        channel=arguments.channel,
        max_duration_s=arguments.max_duration_s,
        max_segment_s=_MAX_SEGMENT_S if longest_s is None else longest_s,
        whole=arguments.whole,
        chunk_ms=arguments.chunk_ms,
        **search,
    )
    results = with_progress(transcribe_all, len(sources), arguments.noprogressbar)
    for source, (_, result) in zip(sources, results, strict=True):
        yield source, result


def _streamed(
    sources: Sequence[Source], arguments: argparse.Namespace, search: Mapping[str, Any]
) -> Iterator[tuple[Source, Transcript | AudioError]]:
    """Each recording as it is played, or the microphone; Ctrl-C ends all."""
    from inference.audio import load_audio
    from inference.live import listen, microphone, played
    from inference.streaming import StreamingRecognizer
    from inference.streaming_text import Endpoints

    endpoints = Endpoints()
    if arguments.max_segment_s is not None:
        endpoints = Endpoints(max_segment_s=arguments.max_segment_s)
    recognizer = StreamingRecognizer.from_pretrained(
        arguments.model,
        chunk_ms=arguments.chunk_ms or 640.0,
        endpoints=endpoints,
        search=dict(search),
        device=arguments.device,
        precision=arguments.precision,
        threads=arguments.threads,
        lookahead=arguments.lookahead,
    )
    shows_partial = sys.stderr.isatty() and not arguments.noprogressbar
    if arguments.microphone:
        heard = microphone(recognizer.sample_rate)
        transcript, _ = listen(recognizer, heard, recognizer.sample_rate, shows_partial)
        yield Source("microphone", "microphone", "microphone"), transcript
        return
    for source in sources:
        try:
            wav_S = load_audio(
                source.audio,
                recognizer.sample_rate,
                arguments.channel,
                max_duration_s=arguments.max_duration_s,
            )
        except AudioError as error:
            yield source, error
            continue
        pieces = played(wav_S, recognizer.sample_rate, arguments.speed or 1.0)
        transcript, interrupted = listen(recognizer, pieces, recognizer.sample_rate, shows_partial)
        yield source, transcript
        if interrupted:
            return


def _in_one_field(name: str) -> str:
    """A file's name, which may have tabs and line ends in it, as a field of a table's line."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), name)


def _print(text: str) -> None:
    """To standard output at once, above a progress bar if there is one."""
    from tqdm import tqdm

    tqdm.write(text, end="")
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return exit_status(transcribe, parse(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
