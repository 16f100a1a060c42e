"""What a long recording costs in errors: an hour joined from the utterances of a corpus.

    python -m benchmarks.bench_long_audio MODEL an4/LibriSpeech --split dev-clean --check
    python -m benchmarks.bench_long_audio MODEL an4/LibriSpeech --split dev-clean --report

The utterances follow each other in random order, again and again, behind each a pause of its own
background noise. Words of the joined recording belong to the utterance in whose time their middle
lies, so that one that is lost, doubled or misplaced counts. Beside the recordings one by one: cut
in pauses, which is the default, and encoded as a whole.
"""

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from speechbrain.utils.edit_distance import wer_details_for_batch, wer_summary

from benchmarks.report import add_options, command_line, origin, write_report
from benchmarks.targets import Target, table, verdict
from common.tables import markdown_table
from corpora.references import read_references
from inference import Recognizer, Transcript, Word

MAX_TIME_ERROR_S = 0.1
MAX_RISE = 5.0
_GRAIN_S = 0.05
_QUIET_S = 0.15


class Joined(NamedTuple):
    """A recording put together.

    Attributes:
        wav_S: its samples.
        order: index of each utterance in it.
        starts: samples at which they begin.
    """

    wav_S: np.ndarray
    order: list[int]
    starts: list[int]


def background(wav_S: np.ndarray, num_samples: int, rate: int, rng: np.random.Generator):
    """Noise (S,) of the quietest moment of a recording, from random grains that overlap."""
    quiet, grain = round(_QUIET_S * rate), 2 * (round(_GRAIN_S * rate) // 2)
    energy_S = np.concatenate([[0.0], np.cumsum(np.square(wav_S, dtype=np.float64))])
    if len(wav_S) <= quiet:
        return np.zeros(num_samples, np.float32)
    start = int((energy_S[quiet:] - energy_S[:-quiet]).argmin())
    window = np.sqrt(np.hanning(grain + 1)[:grain])
    noise_S = np.zeros(num_samples + 2 * grain)
    for at in range(0, num_samples + grain, grain // 2):
        begin = start + rng.integers(0, quiet - grain + 1)
        noise_S[at : at + grain] += window * wav_S[begin : begin + grain]
    return noise_S[grain // 2 :][:num_samples].astype(np.float32)


def join(waveforms: Sequence[np.ndarray], rate: int, duration_s: float, seed: int = 0) -> Joined:
    """Utterances in random order until so many seconds are full, pauses of 0.3 to 1.5 s between."""
    rng = np.random.default_rng(seed)
    parts: list[np.ndarray] = []
    order: list[int] = []
    starts: list[int] = []
    length = 0
    while length < duration_s * rate:
        for index in rng.permutation(len(waveforms)):
            pause = round(rng.uniform(0.3, 1.5) * rate)
            order.append(int(index))
            starts.append(length)
            parts += [waveforms[index], background(waveforms[index], pause, rate, rng)]
            length += len(parts[-2]) + len(parts[-1])
    return Joined(np.concatenate(parts), order, starts)


def by_utterance(transcript: Transcript, joined: Joined, rate: int) -> list[list[Word]]:
    """The words in the time of each utterance and of the pause behind it."""
    found: list[list[Word]] = [[] for _ in joined.order]
    for word in transcript.words:
        middle = (word.start_s + word.end_s) / 2 * rate
        found[max(0, int(np.searchsorted(joined.starts, middle, side="right")) - 1)].append(word)
    return found


def word_error_rate(references: Sequence[str], hypotheses: Sequence[Sequence[str]]) -> float:
    """In percent."""
    words = [reference.split() for reference in references]
    return wer_summary(wer_details_for_batch(range(len(words)), words, hypotheses))["WER"]


def time_errors_s(
    single: Sequence[Transcript], found: Sequence[Sequence[Word]], joined: Joined, rate: int
) -> np.ndarray:
    """How far the words on both sides of each join are from where they are in the single file.

    A word counts that both have beside the same neighbour, with the worse of its two times.
    """
    errors = []
    for index, start, words in zip(joined.order, joined.starts, found, strict=True):
        alone, offset_s = single[index].words, start / rate
        for place in (0, -1):
            beside = slice(2) if place == 0 else slice(-2, None)
            pairs = [[word.text for word in side[beside]] for side in (words, alone)]
            if words and pairs[0] == pairs[1]:
                late = abs(words[place].start_s - offset_s - alone[place].start_s)
                longer = abs(words[place].end_s - offset_s - alone[place].end_s)
                errors.append(round(max(late, longer), 3))
    return np.array(errors)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder of a bundle or of a run")
    add("corpus", metavar="CORPUS", help="folder in LibriSpeech's layout")
    add("--split", default="dev-clean", help="whose utterances are joined")
    add("--minutes", type=float, default=60.0, help="length of what is joined")
    add("--seed", type=int, default=0, help="of the order and the pauses")
    add("--search", choices=("beam", "greedy"), default="beam", help="how words are found")
    add(
        "--max_segment_s",
        type=float,
        nargs="+",
        default=[30.0],
        help="longest segments, in seconds",
    )
    add("--threads", type=int, default=1, help="of the recogniser")
    add_options(parser)
    arguments = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    torch.set_num_threads(arguments.threads)

    asr = Recognizer.from_pretrained(arguments.model)
    rate, search = asr.sample_rate, {"search": arguments.search}
    (split,) = read_references(arguments.corpus, [arguments.split])
    waveforms = [asr.load(reference.audio) for reference in split.references]
    paths = [reference.audio for reference in split.references]
    single = [result for _, result in asr.transcribe_many(paths, **search)]
    joined = join(waveforms, rate, 60 * arguments.minutes, arguments.seed)
    references = [split.references[index].words for index in joined.order]
    alone = word_error_rate(references, [single[index].text.split() for index in joined.order])

    ways: dict[str, Mapping[str, Any]] = {
        f"cut in pauses, at most {longest_s:g} s": {"max_segment_s": longest_s}
        for longest_s in arguments.max_segment_s
    }
    ways["as a whole (`--whole`)"] = {"whole": True}
    rows: list[list[str]] = [["one by one", f"{alone:.2f}", "", "", ""]]
    targets = []
    for name, options in ways.items():
        transcript = asr.transcribe(joined.wav_S, **options, **search)
        found = by_utterance(transcript, joined, rate)
        wer = word_error_rate(references, [[word.text for word in words] for words in found])
        errors_s = time_errors_s(single, found, joined, rate)
        rise = 100 * (wer / alone - 1)
        late = 100 * float((errors_s > MAX_TIME_ERROR_S).mean())
        rows.append(
            [name, f"{wer:.2f}", f"{rise:+.1f}", f"{late:.1f}", str(len(transcript.segments))]
        )
        print(", ".join(rows[-1]), file=sys.stderr, flush=True)
        if "whole" not in options:
            targets.append(Target(f"{name}: more errors", rise, MAX_RISE, False, " %"))
            targets.append(Target(f"{name}: times beyond 0.1 s", late, 0.0, False, " %"))
    header = ["", "WER %", "more errors, %", "words at a join beyond 0.1 s, %", "segments"]
    text = f"{markdown_table(header, rows)}\n\n{table(targets)}"
    if arguments.report:
        minutes = len(joined.wav_S) / rate / 60
        described = f"{len(joined.order)} utterances in {minutes:.0f} minutes"
        source = origin(command_line("bench_long_audio", argv), ["torch", "numpy"])
        lines = ["# Long recordings", source, described, text]
        write_report("long_audio", "\n\n".join(lines))
    else:
        print(text)
    return verdict(targets, arguments.check)


if __name__ == "__main__":
    sys.exit(main())
