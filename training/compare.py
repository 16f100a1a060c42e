"""Compare finished runs: ``python -m training.compare RUN...``.

Prints one Markdown table of word error rates with bootstrap intervals, and what each run gains
over the first one on the same utterances. A run is an output folder with ``results.json`` and
``hyp_<split>.tsv``; its further evaluations (``--test_only``, and those of ``evaluate.py`` in its
folder ``evaluations``) have rows of their own. A folder of runs, such as ``results/CTC/an4`` with
one for each seed, is a recipe: its error rates are means over the seeds, with their standard
deviation.

Bootstrap over utterances, paired differences and probability of improvement: see
``inference/scoring/bootstrap.py``. Of a recipe, seeds are drawn with replacement, too.
"""

import argparse
import math
import os
import re
import statistics
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from speechbrain.utils.edit_distance import wer_details_for_batch

from common.errors import EXIT_USER_ERROR, in_words
from common.files import atomic_write
from common.tables import format_number, markdown_table
from inference.scoring.bootstrap import central_interval, resampled_rates
from inference.scoring.reports import SplitScore, read_hypotheses, read_results
from training.launch.yaml_file import RECIPE_FILE
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
        seed: None where the run did not record it.
        is_named: not the run's own one: it may be of splits and utterances that no other has.
        without_rate: splits that it was scored on as well, without a word in their references.
    """

    name: str
    parameters: int | None
    seed: int | None
    splits: dict[str, EvaluatedSplit]
    is_named: bool = False
    without_rate: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """Runs that differ in their seed alone; a run by itself is a recipe of one.

    Attributes:
        without: sentences about what its folder holds and this does not count.
    """

    name: str
    runs: tuple[EvaluatedRun, ...]
    without: tuple[str, ...] = ()

    @property
    def splits(self) -> list[str]:
        """Those that all runs have been scored on."""
        first, *others = self.runs
        return [split for split in first.splits if all(split in run.splits for run in others)]

    @property
    def is_named(self) -> bool:
        """Not the runs' own evaluations."""
        return self.runs[0].is_named

    def mean(self, split: str, rate: str) -> float:
        """Mean of an error rate, ``wer`` or ``cer``."""
        return statistics.mean(self.rates(split, rate))

    def rates(self, split: str, rate: str) -> list[float]:
        """The error rate of each run."""
        return [getattr(run.splits[split].score, rate) for run in self.runs]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.compare",
        description="Compare word error rates of finished runs, with bootstrap intervals.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="output folder of a finished run, or a folder of such runs, one for each seed",
    )
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
        sys.stderr.write(f"training.compare: {in_words(error)}\n")
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
    recipes = [
        recipe
        for folder, name in zip(folders, _run_names(folders), strict=True)
        for recipe in read_recipes(folder, name)
    ]
    for recipe in recipes[1:]:
        if not recipe.is_named:
            _check_comparable(recipes[0].runs[0], recipe.runs[0])
    rates = {
        (recipe.name, split): _resampled(recipe, split, samples, seed)
        for recipe in recipes
        for split in recipe.splits
    }
    if plot is not None:
        _plot(recipes, rates, plot)
    return "\n\n".join([_table(recipes, rates), *_left_out(recipes)]) + "\n"


def read_recipes(folder: str | os.PathLike, name: str) -> list[Recipe]:
    """The evaluations of a run, or of all runs in a folder that is none, together.

    Raises:
        FileNotFoundError: neither.
        ValueError: the runs are not seeds of one recipe; or as in ``read_evaluations``.
    """
    folder = Path(folder)
    inner = []
    if folder.is_dir() and not (folder / "results.json").is_file():
        inner = sorted(path.parent for path in folder.glob("*/results.json"))
    if not inner:
        return [Recipe(found.name, (found,)) for found in read_evaluations(folder, name)]
    runs = [read_evaluations(path, f"{name}/{path.name}") for path in inner]
    seeds = [run[0].seed for run in runs if run[0].seed is not None]
    if twice := {seed for seed in seeds if seeds.count(seed) > 1}:
        raise ValueError(
            f"{folder} holds several runs with seed {twice.pop()}: they are not seeds of one "
            "recipe. Name the runs one by one."
        )
    # By what was evaluated; what not every seed was evaluated on is no recipe's.
    by_label = [{found.name.removeprefix(run[0].name): found for found in run} for run in runs]
    labels = list(dict.fromkeys(label for of_run in by_label for label in of_run))
    common = [label for label in labels if all(label in of_run for of_run in by_label)]
    if not common:
        raise ValueError(f"{folder}: its runs have no evaluation in common")
    recipes = []
    for label in common:
        found = tuple(of_run[label] for of_run in by_label)
        for other in found[1:]:
            _check_seeds(folder, found[0], other)
        recipes.append(Recipe(name + label, found))
    begun = sorted({path.parent for path in folder.glob(f"*/{RECIPE_FILE}")} - set(inner))
    without = [f"Not evaluated yet and so left out: {name}/{path.name}." for path in begun]
    without += [
        f"Not an evaluation of every run of {name}: {label.removeprefix(':')}."
        for label in labels
        if label not in common
    ]
    recipes[0] = replace(recipes[0], without=tuple(without))
    return recipes


def _check_seeds(folder: Path, first: EvaluatedRun, other: EvaluatedRun) -> None:
    if first.parameters != other.parameters:
        raise ValueError(
            f"{folder} holds runs of different models: {first.name} has {first.parameters} "
            f"parameters, {other.name} {other.parameters}. Name the runs one by one."
        )
    if first.splits and other.splits:
        _check_comparable(first, other)


def _resampled(recipe: Recipe, split: str, samples: int, seed: int) -> np.ndarray:
    """Mean WER of every bootstrap sample: of utterances, and of seeds where there are several."""
    rates_RN = np.stack(
        [
            resampled_rates(run.splits[split].errors, run.splits[split].words, samples, seed)
            for run in recipe.runs
        ]
    )
    # Utterances are those of the other recipes, seeds are not: their draws follow from the errors.
    generator = np.random.default_rng([seed, zlib.crc32(rates_RN.tobytes())])
    num_seeds = len(rates_RN)
    drawn_RN = generator.integers(num_seeds, size=rates_RN.shape)
    mean_N, drawn_N = rates_RN.mean(axis=0), np.take_along_axis(rates_RN, drawn_RN, 0).mean(axis=0)
    # Drawn again from R seeds, they vary by (R - 1) / R of what seeds vary by.
    return mean_N + math.sqrt(num_seeds / max(num_seeds - 1, 1)) * (drawn_N - mean_N)


def _plot(recipes: Sequence[Recipe], rates: dict, path: str | os.PathLike) -> None:
    points = []
    for recipe in recipes:
        parameters = recipe.runs[0].parameters
        for split in recipe.splits:
            wer = central_interval(recipe.mean(split, "wer"), rates[recipe.name, split])
            points.append((recipe.name, split, parameters, wer.value, max(wer.low, 0), wer.high))
    sized = [point for point in points if point[2] is not None]
    if not sized:
        raise ValueError("no run records its number of parameters: there is nothing to plot")
    plot_sizes(sized, path)


def read_evaluations(folder: str | os.PathLike, name: str) -> list[EvaluatedRun]:
    """A run's own evaluation and its further ones, which are called ``<run>:<evaluation>``.

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
    seed = (results.get("run") or {}).get("seed")
    own = (name, folder, results["splits"], False)
    named = (
        (f"{name}:{evaluation}", folder / EVAL_FOLDER / evaluation, entry["splits"], True)
        for evaluation, entry in results.get("evaluations", {}).items()
        # evaluate.py records there how it scored a split, and has its scores among the others; and
        # reports may have been deleted.
        if "splits" in entry and (folder / EVAL_FOLDER / evaluation).is_dir()
    )
    # Those of evaluate.py, in the order of the numbers in their names.
    outside = (
        (
            f"{name}:{path.parent.relative_to(folder).as_posix()}",
            path.parent,
            read_results(path.parent)["splits"],
            True,
        )
        for path in sorted(
            (folder / "evaluations").rglob("results.json"),
            key=lambda path: re.sub(r"\d+", lambda number: number[0].zfill(9), str(path)),
        )
    )
    evaluated = []
    for label, reports, splits, is_named in (own, *named, *outside):
        scores = {split: SplitScore.from_json(entry) for split, entry in splits.items()}
        read = {
            split: _read_split(reports, split, score)
            for split, score in scores.items()
            if score.has_rate
        }
        if scores:
            without_rate = tuple(scores.keys() - read.keys())
            evaluated.append(EvaluatedRun(label, parameters, seed, read, is_named, without_rate))
    if not evaluated:
        raise ValueError(f"{folder}: no split has been evaluated yet")
    if not any(run.splits for run in evaluated):
        raise ValueError(f"{folder}: no split that has been evaluated has a word to recognise")
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


def _table(recipes: Sequence[Recipe], rates: dict) -> str:
    """A row for each recipe and split; with several recipes each beside the first one."""
    first = recipes[0]
    header = ["run", "split", "utterances", "WER %", "95 % interval", "CER %", "parameters", "RTF"]
    if len(recipes) > 1:
        header += [f"against {first.name}", "its 95 % interval", "probability of being better"]
    rows = []
    for recipe in recipes:
        run, seeds = recipe.runs[0], len(recipe.runs)
        for split in recipe.splits:
            wer = central_interval(recipe.mean(split, "wer"), rates[recipe.name, split])
            deviation = ""
            if seeds > 1:
                deviation = f" ± {statistics.stdev(recipe.rates(split, 'wer')):.2f}"
            row = [
                recipe.name if seeds == 1 else f"{recipe.name}, {seeds} seeds",
                split,
                str(run.splits[split].score.utterances),
                f"{wer.value:.2f}{deviation}",
                f"{max(wer.low, 0):.2f} to {wer.high:.2f}",
                f"{recipe.mean(split, 'cer'):.2f}",
                "-" if run.parameters is None else f"{run.parameters:,}",
                format_number(_real_time_factor(recipe, split), 3),
            ]
            if len(recipes) > 1:
                row += _difference(first, recipe, split, rates)
            rows.append(row)
    return markdown_table(header, rows, text_columns=2)


def _real_time_factor(recipe: Recipe, split: str) -> float:
    return statistics.mean(run.splits[split].score.real_time_factor for run in recipe.runs)


def _difference(first: Recipe, recipe: Recipe, split: str, rates: dict) -> list[str]:
    """How a recipe's WER differs from the first one's on the same utterances."""
    if recipe is first or split not in first.splits:
        return ["-", "-", "-"]
    ours, theirs = first.runs[0].splits[split], recipe.runs[0].splits[split]
    if (ours.ids, ours.references) != (theirs.ids, theirs.references):
        return ["-", "-", "-"]
    differences = rates[recipe.name, split] - rates[first.name, split]
    gain = central_interval(recipe.mean(split, "wer") - first.mean(split, "wer"), differences)
    return [
        f"{gain.value:+.2f}",
        f"{gain.low:+.2f} to {gain.high:+.2f}",
        f"{100 * _probability_below_zero(differences):.1f} %",
    ]


def _left_out(recipes: Sequence[Recipe]) -> list[str]:
    first, *others = recipes
    lines = []
    for recipe in recipes:
        lines.extend(recipe.without)
        wordless = {split for run in recipe.runs for split in run.without_rate}
        if wordless:
            lines.append(
                f"Without a word in the references and so left out: {recipe.name} on "
                f"{', '.join(sorted(wordless))}."
            )
        scored = {split for run in recipe.runs for split in run.splits}
        if unmatched := sorted(scored - wordless - set(recipe.splits)):
            lines.append(f"Not in every run of {recipe.name}: {', '.join(unmatched)}.")
    for recipe in (recipe for recipe in others if not recipe.is_named):
        unmatched = sorted(set(first.splits) ^ set(recipe.splits))
        if unmatched:
            lines.append(f"Not in both {first.name} and {recipe.name}: {', '.join(unmatched)}.")
    return lines


if __name__ == "__main__":
    main()
