"""Compare finished runs: ``python -m training.compare RUN...``.

Prints one Markdown table of word error rates with bootstrap intervals, and what each run gains
over the first one on the same utterances. A run is an output folder with ``results.json`` and
``hyp_<split>.tsv``; its further evaluations (``--test_only``) have rows of their own.

Bootstrap over utterances, paired differences and probability of improvement: see
``inference/scoring/bootstrap.py``.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from speechbrain.utils.edit_distance import wer_details_for_batch

from common.errors import EXIT_USER_ERROR
from common.files import atomic_write
from common.tables import format_number, markdown_table
from inference.scoring.bootstrap import central_interval, resampled_rates
from inference.scoring.reports import SplitScore, read_hypotheses, read_results
from training.named_evaluation import EVAL_FOLDER
from training.reporting.plots import plot_sizes

_EXAMPLES_SHOWN = 3


@dataclass(frozen=True)
class EvaluatedSplit:
    """Word errors of one run on one split, utterance by utterance in the order of their ids."""

    score: SplitScore
    ids: tuple[str, ...]
    references: tuple[tuple[str, ...], ...]
    errors: np.ndarray
    words: np.ndarray


@dataclass(frozen=True)
class EvaluatedRun:
    """One evaluation of a run.

    Attributes:
        parameters: None where the run did not record it.
        is_named: not the run's own one: it may be of splits and utterances that no other has.
    """

    name: str
    parameters: int | None
    splits: dict[str, EvaluatedSplit]
    is_named: bool = False


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.compare",
        description="Compare word error rates of finished runs, with bootstrap intervals.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folder of a finished run")
    parser.add_argument("--markdown", metavar="FILE", help="also write the tables to this file")
    parser.add_argument(
        "--samples", type=int, default=1000, help="bootstrap samples (default 1000)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the resampling (default 0)")
    parser.add_argument("--plot", metavar="FILE.png", help="draw WER against parameters")
    options = parser.parse_args(arguments)
    try:
        report = compare(
            options.runs, samples=options.samples, seed=options.seed, plot=options.plot
        )
        if options.markdown:
            with atomic_write(options.markdown) as file:
                file.write(report)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"training.compare: {error}\n")
        sys.exit(EXIT_USER_ERROR)
    sys.stdout.write(report)


def compare(
    folders: Sequence[str | os.PathLike],
    *,
    samples: int = 1000,
    seed: int = 0,
    plot: str | os.PathLike | None = None,
) -> str:
    """The comparison of the runs in ``folders`` as Markdown.

    Args:
        folders: output folders; every run is set against the first.
        samples: number of bootstrap samples.
        seed: seed of the resampling. An interval depends on it and on the run's own errors alone,
            not on the other runs.
        plot: picture of word error rates against parameters, to be written too.

    Raises:
        FileNotFoundError: a run lacks a file.
        ValueError: a file is damaged, runs do not hold the same utterances, or two runs have no
            split in common.
    """
    if samples < 1:
        raise ValueError(f"the number of bootstrap samples must be at least 1, not {samples}")
    runs = [
        evaluated
        for folder, name in zip(folders, _run_names(folders), strict=True)
        for evaluated in read_evaluations(folder, name)
    ]
    for run in runs[1:]:
        if not run.is_named:
            _check_comparable(runs[0], run)
    rates = {
        (run.name, split): resampled_rates(evaluated.errors, evaluated.words, samples, seed)
        for run in runs
        for split, evaluated in run.splits.items()
    }
    if plot is not None:
        _plot(runs, rates, plot)
    return "\n\n".join([_table(runs, rates), *_left_out(runs)]) + "\n"


def _plot(runs: Sequence[EvaluatedRun], rates: dict, path: str | os.PathLike) -> None:
    points = []
    for run in runs:
        for split, evaluated in run.splits.items():
            wer = central_interval(evaluated.score.wer, rates[run.name, split])
            points.append((run.name, split, run.parameters, wer.value, wer.low, wer.high))
    sized = [point for point in points if point[2] is not None]
    if not sized:
        raise ValueError("no run records its number of parameters: there is nothing to plot")
    plot_sizes(sized, path)


def read_evaluations(folder: str | os.PathLike, name: str) -> list[EvaluatedRun]:
    """A run's own evaluation and its named ones, which are called ``<run>:<evaluation>``.

    Raises:
        FileNotFoundError: it is not the folder of an evaluated run.
        ValueError: a file is damaged, or a ``hyp_<split>.tsv`` is not the one that was scored.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    if not (folder / "results.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no results.json: it is not the output folder of an evaluated run"
        )
    results = read_results(folder)
    parameters = (results.get("model") or {}).get("parameters")
    own = (name, folder, results["splits"], False)
    named = (
        (f"{name}:{evaluation}", folder / EVAL_FOLDER / evaluation, entry["splits"], True)
        for evaluation, entry in results.get("evaluations", {}).items()
        # evaluate.py records there how it scored a split, and has its scores among the others; and
        # reports may have been deleted.
        if "splits" in entry and (folder / EVAL_FOLDER / evaluation).is_dir()
    )
    evaluated = [
        EvaluatedRun(
            label,
            parameters,
            {
                split: _read_split(reports, split, SplitScore.from_json(entry))
                for split, entry in splits.items()
            },
            is_named,
        )
        for label, reports, splits, is_named in (own, *named)
        if splits
    ]
    if not evaluated:
        raise ValueError(f"{folder}: no split has been evaluated yet")
    return evaluated


def _probability_below_zero(differences: np.ndarray) -> float:
    """Share of samples below zero; a tie counts half, so equal runs get 50 %."""
    return float((differences < 0).mean() + 0.5 * (differences == 0).mean())


def _read_split(folder: Path, split: str, score: SplitScore) -> EvaluatedSplit:
    path = folder / f"hyp_{split}.tsv"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: results.json has {split}, but {path.name} is missing: evaluate it again"
        )
    utterances = dict(sorted(read_hypotheses(path).items()))
    ids = list(utterances)
    references, hypotheses = zip(*utterances.values(), strict=True) if ids else ((), ())
    details = wer_details_for_batch(ids, references, hypotheses)
    errors = np.array([detail["num_edits"] for detail in details], dtype=np.int64)
    words = np.array([detail["num_ref_tokens"] for detail in details], dtype=np.int64)
    found = (len(ids), int(errors.sum()), int(words.sum()))
    recorded = (score.utterances, score.ins + score.del_ + score.sub, score.words)
    if found != recorded:
        raise ValueError(
            f"{path} has {found[0]} utterances with {found[1]} errors in {found[2]} words, "
            f"results.json has {recorded[0]} with {recorded[1]} in {recorded[2]}: they are not "
            "from one evaluation, evaluate again"
        )
    return EvaluatedSplit(score, tuple(ids), tuple(map(tuple, references)), errors, words)


def _run_names(folders: Sequence[str | os.PathLike]) -> list[str]:
    """Short names: the folders below their common parent."""
    paths = [Path(folder).resolve() for folder in folders]
    repeated = sorted({str(path) for path in paths if paths.count(path) > 1})
    if repeated:
        raise ValueError(f"a run cannot be compared with itself: {', '.join(repeated)}")
    parent = os.path.commonpath([path.parent for path in paths])
    return [path.relative_to(parent).as_posix() for path in paths]


def _check_comparable(first: EvaluatedRun, other: EvaluatedRun) -> None:
    common = [split for split in first.splits if split in other.splits]
    if not common:
        raise ValueError(
            f"{first.name} and {other.name} have no split in common: the first has "
            f"{', '.join(first.splits)}, the second {', '.join(other.splits)}"
        )
    for split in common:
        ours, theirs = first.splits[split], other.splits[split]
        only_first, only_other = set(ours.ids) - set(theirs.ids), set(theirs.ids) - set(ours.ids)
        if only_first or only_other:
            raise ValueError(
                f"{split}: {first.name} and {other.name} were not scored on the same utterances: "
                f"only in {first.name} {_examples(only_first)}; "
                f"only in {other.name} {_examples(only_other)}"
            )
        changed = [
            name
            for name, a, b in zip(ours.ids, ours.references, theirs.references, strict=True)
            if a != b
        ]
        if changed:
            raise ValueError(
                f"{split}: {first.name} and {other.name} have different references for "
                f"{_examples(changed)}"
            )


def _examples(ids) -> str:
    if not ids:
        return "none"
    shown = ", ".join(sorted(ids)[:_EXAMPLES_SHOWN])
    return f"{len(ids)} ({shown}{', ...' if len(ids) > _EXAMPLES_SHOWN else ''})"


def _table(runs: Sequence[EvaluatedRun], rates: dict) -> str:
    """A row for each run and split; with several runs each beside the first one."""
    first = runs[0]
    header = ["run", "split", "utterances", "WER %", "95 % interval", "CER %", "parameters", "RTF"]
    if len(runs) > 1:
        header += [f"against {first.name}", "its 95 % interval", "probability of being better"]
    rows = []
    for run in runs:
        for split, evaluated in run.splits.items():
            score = evaluated.score
            wer = central_interval(score.wer, rates[run.name, split])
            row = [
                run.name,
                split,
                str(score.utterances),
                f"{wer.value:.2f}",
                f"{wer.low:.2f} to {wer.high:.2f}",
                f"{score.cer:.2f}",
                "-" if run.parameters is None else f"{run.parameters:,}",
                format_number(score.real_time_factor, 3),
            ]
            if len(runs) > 1:
                row += _difference(first, run, split, rates)
            rows.append(row)
    return markdown_table(header, rows, text_columns=2)


def _difference(first: EvaluatedRun, run: EvaluatedRun, split: str, rates: dict) -> list[str]:
    """How a run's WER differs from the first one's on the same utterances."""
    if run is first or split not in first.splits:
        return ["-", "-", "-"]
    ours, theirs = first.splits[split], run.splits[split]
    if (ours.ids, ours.references) != (theirs.ids, theirs.references):
        return ["-", "-", "-"]
    differences = rates[run.name, split] - rates[first.name, split]
    gain = central_interval(
        run.splits[split].score.wer - first.splits[split].score.wer, differences
    )
    return [
        f"{gain.value:+.2f}",
        f"{gain.low:+.2f} to {gain.high:+.2f}",
        f"{100 * _probability_below_zero(differences):.1f} %",
    ]


def _left_out(runs: Sequence[EvaluatedRun]) -> list[str]:
    first, *others = runs
    lines = []
    for run in (run for run in others if not run.is_named):
        unmatched = sorted(set(first.splits) ^ set(run.splits))
        if unmatched:
            lines.append(f"Not in both {first.name} and {run.name}: {', '.join(unmatched)}.")
    return lines


if __name__ == "__main__":
    main()
