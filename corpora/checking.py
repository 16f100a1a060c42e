"""Recordings of a corpus, opened one by one: rows of a manifest, and what cannot be used."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from pathlib import Path

from tqdm import tqdm

from corpora.audio import AudioFileError, check_audio
from corpora.librispeech import Problem, Utterance
from corpora.manifest import DATA_ROOT, ManifestRow

_NUM_PROBLEMS_SHOWN = 20
_CHUNK_FILES = 256


class PreparationError(ValueError):
    """Utterances that cannot be used.

    Attributes:
        problems: all of them; the message shows the first 20.
    """

    def __init__(self, place: str | Path, problems: Sequence[Problem]):
        self.problems = list(problems)
        count = len(problems)
        lines = [
            f"{count} utterance{'s' if count > 1 else ''} in {place} cannot be used;"
            " no manifest was written:",
            *lines_of(problems),
            "Repair them, or leave them out with --skip_bad (in training: --skip_bad True).",
        ]
        super().__init__("\n".join(lines))


def lines_of(problems: Sequence[Problem]) -> list[str]:
    """The first problems, a line each, and how many there are beside."""
    lines = [
        f"  {problem.path} ({problem.utterance_id or '-'}): {problem.reason}"
        for problem in problems[:_NUM_PROBLEMS_SHOWN]
    ]
    if len(problems) > _NUM_PROBLEMS_SHOWN:
        lines.append(f"  and {len(problems) - _NUM_PROBLEMS_SHOWN} more")
    return lines


def check_rate(sample_rate: int) -> None:
    """Raises a ValueError where no recording can have such a rate."""
    if sample_rate < 1:
        raise ValueError(f"sample_rate is {sample_rate}; it is a number of samples per second")


def kinds_of_check(verify: bool) -> list[bool | str]:
    """What a record may say of how the recordings of a current manifest were checked.

    The first is what is recorded now. Who asks for less than was done before need not have it done
    again; what was recorded as True was decoded, but not searched for samples that are not finite.
    """
    return ["finite"] if verify else [False, True, "finite"]


def default_num_workers() -> int:
    """Threads that read audio: network disks gain from more than there are cores."""
    return min(16, 4 * (os.cpu_count() or 1))


def check_utterances(
    utterances: list[Utterance],
    data_root: Path,
    name: str,
    pool: Executor,
    *,
    sample_rate: int,
    resample: bool = False,
    verify: bool = False,
    noprogressbar: bool = False,
) -> tuple[list[ManifestRow], list[Problem]]:
    """Rows of those whose recording can be used, and what is wrong with the others.

    Args:
        utterances: their paths are relative to ``data_root``, or absolute.
        name: of the split, for the progress bar.
        sample_rate, resample, verify: see `check_audio`.
    """

    def check(chunk: list[Utterance]) -> tuple[list[ManifestRow], list[Problem]]:
        rows, problems = [], []
        for utterance in chunk:
            path = os.path.join(data_root, utterance.path)
            try:
                num_samples = check_audio(
                    path, utterance.size_bytes, sample_rate, verify, resample=resample
                )
            except AudioFileError as error:
                problems.append(Problem(utterance.path, utterance.id, str(error)))
                continue
            wav = path if os.path.isabs(utterance.path) else f"{DATA_ROOT}/{utterance.path}"
            seconds = num_samples / sample_rate
            rows.append(ManifestRow(utterance.id, seconds, wav, utterance.speaker, utterance.words))
        return rows, problems

    rows: list[ManifestRow] = []
    problems: list[Problem] = []
    with tqdm(
        desc=f"{'decoding' if verify else 'reading'} {name}",
        total=len(utterances),
        unit=" files",
        disable=noprogressbar,
    ) as bar:
        for good, bad in pool.map(check, _chunks(utterances, 8 if verify else _CHUNK_FILES)):
            rows += good
            problems += bad
            bar.update(len(good) + len(bad))
    return rows, problems


def _chunks(items: list[Utterance], size: int) -> Iterator[list[Utterance]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
