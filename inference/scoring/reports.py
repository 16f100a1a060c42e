"""Scores of an evaluation, and the files that hold them."""

import collections
import json
import logging
import math
import os
import platform
import shlex
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from speechbrain.dataio.wer import print_alignments, print_wer_summary
from speechbrain.utils.metric_stats import ErrorRateStats

from common.files import alone_with, atomic_write
from common.provenance import git_commit, package_version
from common.tables import format_duration, format_number, text_table
from inference.scoring.bootstrap import Interval, central_interval, resampled_rates
from inference.scoring.error_analysis import analyse_errors

logger = logging.getLogger(__name__)

HYPOTHESES_HEADER = ("id", "reference", "hypothesis")
_PACKAGES = {"torch": "torch", "speechbrain": "speechbrain", "mamba_asr": "mamba-asr"}


@dataclass(frozen=True)
class SplitScore:
    """How well and how fast one split was recognised.

    Attributes:
        wer: word errors in percent of the reference words (0 where there are none, as SpeechBrain
            has it).
        cer: character errors in percent, the boundary between two words counting as a character.
        ins, del_, sub: word errors by kind.
        words: reference words.
        utterances: number of utterances.
        audio_s: duration of the audio in seconds.
        decode_s: seconds that recognising it took, features included.
        wer_interval, cer_interval: 95 % bootstrap intervals; None of a score that was read back.
    """

    wer: float
    cer: float
    ins: int
    del_: int
    sub: int
    words: int
    utterances: int
    audio_s: float
    decode_s: float
    wer_interval: Interval | None = field(default=None, compare=False)
    cer_interval: Interval | None = field(default=None, compare=False)

    @property
    def has_rate(self) -> bool:
        """Whether the error rates say anything: of no words, words that come are no percentage."""
        return _has_rate(self.words, self.ins)

    @property
    def real_time_factor(self) -> float:
        """Seconds of computation per second of audio; NaN without audio."""
        return self.decode_s / self.audio_s if self.audio_s > 0 else math.nan

    def as_json(self) -> dict:
        """The entry of this split in ``results.json``."""
        return {
            "wer": self.wer,
            "cer": self.cer,
            "ins": self.ins,
            "del": self.del_,
            "sub": self.sub,
            "words": self.words,
            "utterances": self.utterances,
            "audio_s": self.audio_s,
            "decode_s": self.decode_s,
        }

    @classmethod
    def from_json(cls, entry: Mapping) -> "SplitScore":
        """The inverse of :meth:`as_json`.

        Raises:
            ValueError: a key is missing or unknown, or a value is no number.
        """
        if not isinstance(entry, Mapping):
            raise ValueError(f"not the scores of a split: {entry!r}")
        fields = {"del_" if key == "del" else key: value for key, value in entry.items()}
        try:
            score = cls(**fields)
        except TypeError as error:
            raise ValueError(f"not the scores of a split: {dict(entry)} ({error})") from None
        wrong = [key for key, value in entry.items() if not _is_number(value)]
        if wrong:
            raise ValueError(f"not the scores of a split: {wrong[0]} is {entry[wrong[0]]!r}")
        return score


def rates(entry: Mapping) -> tuple[float | None, float | None]:
    """WER and CER of a split in ``results.json``; None where they say nothing, or are missing."""
    if not _has_rate(entry.get("words"), entry.get("ins", 0)):
        return None, None
    return entry.get("wer"), entry.get("cer")


def _has_rate(words: object, insertions: object) -> bool:
    return words != 0 or insertions == 0


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def write_split_report(
    output_folder: str | os.PathLike,
    split: str,
    ids: Sequence[str],
    references: Sequence[str],
    hypotheses: Sequence[str],
    *,
    audio_s: float,
    decode_s: float,
    speakers: Mapping[str, str] | None = None,
) -> SplitScore:
    """Score one split and write ``wer_``, ``cer_``, ``hyp_`` and ``errors_<split>``.

    Args:
        output_folder: the run's folder.
        split: name of the split, such as ``test-clean``.
        ids: one id per utterance.
        references: what was said, words separated by white space; empty is legal.
        hypotheses: what was recognised, in the order of ``references``; empty is legal.
        audio_s: duration of the split in seconds.
        decode_s: seconds that recognising it took.
        speakers: of the utterances that have one, by id: errors are counted by speaker, too.

    Returns:
        The scores that belong into ``results.json``.

    Raises:
        ValueError: no utterance, lists of different lengths, or ids that are repeated or hold a
            tab or a line break.
    """
    ids, references, hypotheses = list(ids), list(references), list(hypotheses)
    _check_utterances(split, ids, references, hypotheses)
    # A model has learnt the accents as its transcripts had them, others may write them otherwise.
    reference_words = [unicodedata.normalize("NFC", text).split() for text in references]
    hypothesis_words = [unicodedata.normalize("NFC", text).split() for text in hypotheses]
    words, characters = ErrorRateStats(), ErrorRateStats(split_tokens=True)
    for stats in (words, characters):
        stats.append(ids, hypothesis_words, reference_words)

    if not any(reference_words) and any(hypothesis_words):
        logger.warning(
            "%s has no words in its references, so it has no error rate, though %d words were "
            "recognised. Are its transcripts empty?",
            split,
            sum(map(len, hypothesis_words)),
        )
    folder = Path(output_folder)
    folder.mkdir(parents=True, exist_ok=True)
    summary, cer = words.summarize(), characters.summarize("WER")
    # Scripts look for the last line.
    with atomic_write(folder / f"wer_{split}.txt") as file:
        words.write_stats(file)
        file.write(f"WER: {summary['WER']:.2f}%  CER: {cer:.2f}%\n")
    _write_characters(folder / f"cer_{split}.txt", characters)
    rows = [HYPOTHESES_HEADER]
    rows += zip(ids, map(" ".join, reference_words), map(" ".join, hypothesis_words), strict=True)
    _write_text(folder / f"hyp_{split}.tsv", "".join("\t".join(row) + "\n" for row in rows))
    _write_text(
        folder / f"errors_{split}.txt",
        analyse_errors(words.scores, characters.scores, speakers),
    )

    return SplitScore(
        wer=summary["WER"],
        cer=cer,
        ins=summary["insertions"],
        del_=summary["deletions"],
        sub=summary["substitutions"],
        words=summary["num_scored_tokens"],
        utterances=summary["num_scored_sents"],
        audio_s=float(audio_s),
        decode_s=float(decode_s),
        wer_interval=_interval(summary["WER"], words),
        cer_interval=_interval(cer, characters),
    )


def read_hypotheses(path: str | os.PathLike) -> dict[str, tuple[list[str], list[str]]]:
    """Read a ``hyp_<split>.tsv``: id -> (reference words, hypothesis words).

    Raises:
        ValueError: the file is not one that :func:`write_split_report` wrote.
    """
    try:
        with open(path, encoding="utf-8", newline="") as lines:
            rows = [line.rstrip("\r\n").split("\t") for line in lines]
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8; it is not the file that was written.") from None
    if not rows or tuple(rows[0]) != HYPOTHESES_HEADER:
        header = " <tab> ".join(HYPOTHESES_HEADER)
        raise ValueError(f"{path}: the first line must be: {header}")
    utterances = {}
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(HYPOTHESES_HEADER):
            raise ValueError(f"{path}, line {number}: {len(row)} columns, wanted 3")
        utterance_id, reference, hypothesis = row
        if utterance_id in utterances:
            raise ValueError(f"{path}, line {number}: {utterance_id} is there twice")
        utterances[utterance_id] = (reference.split(), hypothesis.split())
    return utterances


def update_results(
    output_folder: str | os.PathLike,
    splits: Mapping[str, SplitScore],
    model: Mapping,
    run: Mapping | None,
    test_only: bool = False,
) -> Path:
    """Merge an evaluation into the run's ``results.json``.

    Args:
        output_folder: the run's folder.
        splits: scores of the splits evaluated now; those evaluated earlier stay, unless they are of
            other ``weights``.
        model: facts about the model (``parameters``, ``weights``, ...); replaces the earlier ones.
        run: see :func:`run_record`; replaces the earlier one. None keeps it.
        test_only: keep the earlier ``run``, of the training; ``run`` goes to ``evaluations``, split
            by split. An evaluation of the run that is called like a split keeps its place there.

    Returns:
        The path of ``results.json``, which has the scores' intervals, low and high, under
        ``intervals``. One that was there but cannot be read is kept as
        ``results.json.unreadable``: the scores of a long evaluation are not lost to it.
    """
    path = Path(output_folder) / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with alone_with(path):
        earlier = kept_results(path, read_results)
        if _are_others(earlier.get("model"), model):
            earlier = {k: v for k, v in earlier.items() if k != "intervals"} | {"splits": {}}
        results = dict(earlier)
        results["splits"] = earlier["splits"] | {n: score.as_json() for n, score in splits.items()}
        results["model"] = dict(model)
        results["run"] = dict(earlier.get("run") or {}) if run is None else dict(run)
        intervals = {k: v for k, v in earlier.get("intervals", {}).items() if k not in splits}
        intervals |= _intervals_of(splits)
        # Splits that evaluate.py scored; an evaluation of a run has its scores with it.
        evaluations = {
            name: entry
            for name, entry in earlier.get("evaluations", {}).items()
            if name not in splits or "splits" in entry
        }
        if test_only and run is not None and earlier.get("run"):
            results["run"] = earlier["run"]
            evaluations |= {name: dict(run) for name in splits if name not in evaluations}
        for name, value in (("intervals", intervals), ("evaluations", evaluations)):
            results.pop(name, None)
            if value:
                results[name] = value
        store_results(path, results)
    return path


def record_evaluation(
    output_folder: str | os.PathLike,
    name: str,
    splits: Mapping[str, SplitScore],
    settings: Mapping,
    run: Mapping,
) -> Path:
    """Merge scores into ``evaluations[name]`` of a run's ``results.json``.

    Args:
        output_folder: the run's folder.
        name: of an evaluation beside the run's own one.
        splits: scores of the splits evaluated now; those of the same settings and weights stay.
        settings: what the scores depend on.
        run: see :func:`run_record`.
    """
    path = Path(output_folder) / "results.json"
    with alone_with(path):
        results = kept_results(path, read_results)
        evaluations = results.setdefault("evaluations", {})
        earlier = evaluations.get(name) or {}
        same = earlier.get("settings") == dict(settings)
        same = same and not _are_others(earlier.get("run"), run)
        entry = {
            "splits": dict(earlier["splits"]) if same else {},
            "intervals": dict(earlier.get("intervals", {})) if same else {},
            "settings": dict(settings),
            "run": dict(run),
        }
        entry["splits"] |= {split: score.as_json() for split, score in splits.items()}
        entry["intervals"] |= _intervals_of(splits)
        evaluations[name] = entry
        store_results(path, results)
    return path


def _are_others(earlier: object, now: Mapping) -> bool:
    """Whether these are records of other weights, as far as both tell theirs.

    A training tells the digest of its weights, ``evaluate.py`` that of the whole recogniser.
    """
    told = ("weights", "digest")
    return isinstance(earlier, Mapping) and any(
        key in earlier and key in now and earlier[key] != now[key] for key in told
    )


def kept_results(path: Path, read: Callable[[Path], dict]) -> dict:
    """What is to be kept of a ``results.json``; one that cannot be read is set aside.

    Args:
        read: reads that of a folder, or raises a ValueError.
    """
    if path.exists():
        try:
            return read(path.parent)
        except ValueError as error:
            aside = path.with_name("results.json.unreadable")
            os.replace(path, aside)
            logger.warning("%s It is kept as %s.", error, aside)
    return {"splits": {}}


def _intervals_of(splits: Mapping[str, SplitScore]) -> dict[str, dict[str, list[float]]]:
    return {
        name: {
            "wer": [score.wer_interval.low, score.wer_interval.high],
            "cer": [score.cer_interval.low, score.cer_interval.high],
        }
        for name, score in splits.items()
        if score.wer_interval and score.cer_interval
    }


def store_results(path: Path, results: Mapping) -> None:
    """Write a ``results.json``.

    Raises:
        ValueError: a number that JSON does not have.
    """
    _write_text(path, json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_results(output_folder: str | os.PathLike) -> dict:
    """Read a run's ``results.json``.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not one of ours.
    """
    results = read_any_results(output_folder)
    for split, entry in results["splits"].items():
        try:
            SplitScore.from_json(entry)
        except ValueError as error:
            path = Path(output_folder) / "results.json"
            raise ValueError(f"{path}, split {split}: {error}. Evaluate again.") from None
    return results


def read_any_results(output_folder: str | os.PathLike) -> dict:
    """Read the ``results.json`` of a recogniser or a language model, whatever its scores are.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not one of ours.
    """
    path = Path(output_folder) / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): evaluate again.") from None
    if not isinstance(results, dict) or not isinstance(results.get("splits"), dict):
        raise ValueError(f"{path} holds no scores of splits: evaluate again.")
    for key in ("model", "run", "intervals", "evaluations"):
        if not isinstance(results.get(key, {}), dict):
            raise ValueError(f"{path}: {key} is {results[key]!r}, no mapping: evaluate again.")
    for name, entry in results.get("evaluations", {}).items():
        if not isinstance(entry, dict):
            raise ValueError(f"{path}: evaluation {name} is {entry!r}: evaluate again.")
    return results


def run_record(
    *,
    seed: int | None,
    precision: str,
    device: str,
    command: str | Sequence[str],
    eval_precision: str | None = None,
) -> dict[str, object]:
    """What it takes to repeat a run: the ``run`` entry of ``results.json``.

    Args:
        seed: seed of the run; None if that is not known.
        precision: fp32, fp16 or bf16.
        device: device it ran on.
        command: the command line, or its arguments (as in ``sys.argv``), which are then quoted.
        eval_precision: of the evaluation, where it may differ from the training's.
    """
    record: dict[str, object] = {
        "seed": seed,
        "commit": git_commit(),
        "versions": {"python": platform.python_version()}
        | {name: package_version(package) for name, package in _PACKAGES.items()},
        "precision": precision,
        "device": str(device),
        "command": command if isinstance(command, str) else shlex.join(map(str, command)),
    }
    if eval_precision is not None:
        record["eval_precision"] = eval_precision
    return record


def results_table(splits: Mapping[str, SplitScore], *, intervals: bool = False) -> str:
    """A table of scores, aligned for a terminal; the last line has no line break.

    Args:
        splits: scores by split.
        intervals: a column with its 95 % interval beside each error rate.
    """
    header = ["split", "WER %", "CER %", "audio", "real-time factor"]
    rows = [
        [
            name,
            *(f"{rate:.2f}" if score.has_rate else "-" for rate in (score.wer, score.cer)),
            format_duration(score.audio_s),
            format_number(score.real_time_factor, 3),
        ]
        for name, score in splits.items()
    ]
    if intervals:
        header[2:2], header[4:4] = ["95 % interval"], ["95 % interval"]
        for row, score in zip(rows, splits.values(), strict=True):
            row[2:2], row[4:4] = [_shown(score.wer_interval)], [_shown(score.cer_interval)]
    return text_table(header, rows)


def _shown(interval: Interval | None) -> str:
    return "-" if interval is None else f"{interval.low:.2f} to {interval.high:.2f}"


def _check_utterances(
    split: str, ids: list[str], references: list[str], hypotheses: list[str]
) -> None:
    if not ids:
        raise ValueError(f"{split}: there is no utterance to score")
    if not len(ids) == len(references) == len(hypotheses):
        raise ValueError(
            f"{split}: {len(ids)} ids, {len(references)} references and {len(hypotheses)} "
            "hypotheses; wanted one of each per utterance"
        )
    repeated = [name for name, count in collections.Counter(ids).items() if count > 1]
    if repeated:
        raise ValueError(f"{split}: ids are there more than once: {', '.join(repeated[:20])}")
    for name in ids:
        if len(name.splitlines()) != 1 or "\t" in name:
            raise ValueError(f"{split}: an id must be one line without tabs, not {name!r}")


def _interval(value: float, stats: ErrorRateStats) -> Interval:
    """The interval that ``training.compare`` gives, whatever the order of the utterances."""
    scores = sorted(stats.scores, key=lambda score: score["key"])
    errors = np.array([score["num_edits"] for score in scores])
    tokens = np.array([score["num_ref_tokens"] for score in scores])
    return central_interval(value, resampled_rates(errors, tokens))


def _write_characters(path: Path, stats: ErrorRateStats) -> None:
    """As SpeechBrain writes alignments, a character a column: what is missing is one wide, too."""
    with atomic_write(path) as file:
        print_wer_summary(stats.summarize(), file)
        print_alignments(stats.scores, file, empty_symbol="*", separator=" ")


def _write_text(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text)
