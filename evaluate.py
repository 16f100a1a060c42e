"""Score a trained model on a corpus: error rates with intervals, hypotheses, errors, speed.

python evaluate.py results/demo results/demo/corpus --split test-clean test-other
python evaluate.py my_bundle calls.csv --data_root recordings --output_dir results/calls
python evaluate.py results/demo_streaming results/demo/corpus --chunk_ms full 640 160
"""

import argparse
import csv
import functools
import io
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UserError
from corpora.references import ReferenceSplit, read_references
from decoding.ctc_beam_search.ngram_kind import check_characters
from inference.audio import AudioError
from inference.command_line import (
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

if TYPE_CHECKING:
    from inference import Recognizer, Transcript
    from inference.scoring.reports import SplitScore


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder of a run or a bundle, or a name on the hub")
    add(
        "corpus",
        metavar="CORPUS_OR_MANIFEST",
        help="folder in LibriSpeech's layout, or a table (ID,duration,wav,spk_id,wrd)",
    )
    add(
        "--split",
        nargs="+",
        default=[],
        metavar="NAME",
        help="of a folder (default: all that are not for training)",
    )
    add("--data_root", metavar="FOLDER", help="what $data_root stands for in a manifest")
    add(
        "--output_dir",
        metavar="FOLDER",
        help="default: evaluations/<corpus> in the model's folder, where that can be written",
    )
    add("--ignore_case", action="store_true", help="score without regard to letter case")
    add(
        "--chunk_ms",
        nargs="+",
        type=_chunk_length,
        metavar="MS",
        help="no frame sees what follows its chunk (models for streaming); full: each sees all. "
        "Every length has a folder of reports",
    )
    add_model_options(parser)
    return parser


def _chunk_length(text: str) -> float:
    """Infinity for ``full``."""
    return math.inf if text == "full" else positive(float)(text)


def evaluate(arguments: argparse.Namespace, command: Sequence[str]) -> int:
    """Scores the splits and writes the reports; returns the exit status.

    Args:
        command: the command line, for ``results.json``.
    """
    if arguments.lookahead is not None and set(arguments.chunk_ms or ()) <= {math.inf}:
        raise UserError("--lookahead is of chunks: give their --chunk_ms as well.")
    check_model(arguments.model)
    search = search_options(arguments)
    splits = read_references(arguments.corpus, arguments.split, arguments.data_root)
    if "ngram" in search:
        said = (word for split in splits for ref in split.references for word in ref.words.split())
        try:
            check_characters(search["ngram"], said)
        except ValueError as error:
            raise UserError(f"--kenlm_model_path: {error}") from None
    recognizer = load_recognizer(arguments)

    from inference.chunks import chunks_of
    from inference.scoring.reports import results_table, run_record, update_results

    lengths = dict.fromkeys(arguments.chunk_ms or [math.inf])
    for chunk_ms in lengths:
        if chunk_ms < math.inf:
            chunks_of(recognizer.model, chunk_ms, lookahead=arguments.lookahead)
    folder = made_folder(Path(arguments.output_dir or default_folder(arguments, search)))

    record = run_record(
        seed=recognizer.model.config.get("training", {}).get("seed"),
        precision=arguments.precision,
        eval_precision=arguments.precision,
        device=str(recognizer.device),
        command=command,
    )
    record["evaluated"] = evaluated(arguments, search)
    scores: dict[str, SplitScore] = {}
    skipped: dict[str, str] = {}
    for chunk_ms, split in itertools.product(lengths, splits):
        label = "full" if chunk_ms == math.inf else f"{chunk_ms:g}ms"
        reports = made_folder(folder / label) if arguments.chunk_ms else folder
        started = time.perf_counter()
        transcripts, unread = recognize(recognizer, split, chunk_ms, arguments, search)
        decode_s = time.perf_counter() - started
        skipped |= split.problems | unread
        if transcripts:
            scored = score(reports, split, transcripts, decode_s, ignore_case=arguments.ignore_case)
            update_results(
                reports,
                {split.name: scored},
                describe_model(recognizer),
                record,
                test_only=True,
            )
            scores[f"{split.name} {label}" if arguments.chunk_ms else split.name] = scored
    write_skipped(folder / "skipped.csv", skipped)
    if scores:
        print(results_table(scores, intervals=True))
    print(f"\nReports: {folder}")
    return report_failures([f"{name}: {why}" for name, why in skipped.items()], "scored")


def default_folder(arguments: argparse.Namespace, search: Mapping[str, Any]) -> Path:
    """``evaluations/<corpus>`` in the model's folder, or a folder here; of each search its own.

    Where another corpus or search has taken the name, it gets a number.
    """
    corpus, model = Path(arguments.corpus).resolve(), Path(arguments.model)
    # Many corpora in LibriSpeech's layout are folders of that name.
    named = corpus.parent if corpus.name == "LibriSpeech" else corpus
    files = {"hotwords": arguments.hotwords, "ngram": arguments.kenlm_model_path}
    parts = [named.name if corpus.is_dir() else corpus.stem]
    for key, value in search.items():
        if (key, value) != ("search", "beam"):
            parts.append(f"{key}-{Path(files[key]).stem if key in files else value}")
    if arguments.lookahead is not None:
        parts.append(f"lookahead-{arguments.lookahead:g}")
    name = "_".join([*parts, *(["ignore_case"] if arguments.ignore_case else [])])
    first = Path(f"evaluation_{model.resolve().name}_{name}")
    if model.is_dir() and os.access(model, os.W_OK):
        first = model / "evaluations" / name
    numbered = (first.with_name(f"{first.name}-{number}") for number in itertools.count(2))
    folders = itertools.chain([first], numbered)
    return next(f for f in folders if _is_all(f, evaluated(arguments, search)))


def evaluated(arguments: argparse.Namespace, search: Mapping[str, Any]) -> dict[str, Any]:
    """What is scored and how, as far as it decides whether two evaluations are one."""
    files = {key: str(Path(value).resolve()) for key, value in search.items() if key == "ngram"}
    return {
        "corpus": str(Path(arguments.corpus).resolve()),
        "search": {**search, **files},
        "precision": arguments.precision,
        "ignore_case": arguments.ignore_case,
        **({} if arguments.lookahead is None else {"lookahead": arguments.lookahead}),
    }


def _is_all(folder: Path, wanted: Mapping[str, Any]) -> bool:
    """Whether a folder has no evaluation but of what is wanted, as far as they tell."""
    for path in (folder / "results.json", *folder.glob("*/results.json")):
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
            runs = [results["run"], *results.get("evaluations", {}).values()]
            if any(run.get("evaluated", wanted) != wanted for run in runs):
                return False
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return True


def recognize(
    recognizer: "Recognizer",
    split: ReferenceSplit,
    chunk_ms: float,
    arguments: argparse.Namespace,
    search: Mapping[str, Any],
) -> tuple[dict[str, "Transcript"], dict[str, str]]:
    """Transcripts by id, and by id what is wrong with recordings that have none.

    Args:
        chunk_ms: infinity shows every frame the whole recording.
    """
    transcribe_all = functools.partial(
        recognizer.transcribe_many,
        [reference.audio for reference in split.references],
        batch_seconds=arguments.batch_seconds,
        chunk_ms=None if chunk_ms == math.inf else chunk_ms,
        **search,
    )
    results = with_progress(transcribe_all, len(split.references), arguments.noprogressbar)
    transcripts, unread = {}, {}
    for reference, (_, result) in zip(split.references, results, strict=True):
        if isinstance(result, AudioError):
            unread[reference.id] = str(result)
        else:
            transcripts[reference.id] = result
    return transcripts, unread


def score(
    folder: Path,
    split: ReferenceSplit,
    transcripts: Mapping[str, "Transcript"],
    decode_s: float,
    ignore_case: bool,
) -> "SplitScore":
    """The score of a split, whose reports are written."""
    from inference.scoring.confidence import confidence_area
    from inference.scoring.error_analysis import case_hint
    from inference.scoring.reports import write_split_report

    ids = sorted(transcripts)
    words = {reference.id: reference.words for reference in split.references}
    references = [words[name] for name in ids]
    hypotheses = [transcripts[name].text for name in ids]
    if ignore_case:
        references = [text.casefold() for text in references]
        hypotheses = [text.casefold() for text in hypotheses]
    result = write_split_report(
        folder,
        split.name,
        ids,
        references,
        hypotheses,
        audio_s=sum(transcript.duration_s for transcript in transcripts.values()),
        decode_s=decode_s,
        speakers={reference.id: reference.speaker for reference in split.references},
    )
    for suffix, name in (("jsonl", "json"), ("ctm", "ctm")):
        lines = (FORMATS[name](transcripts[key], key) for key in ids)
        write_text(folder / f"hyp_{split.name}.{suffix}", "".join(lines))
    pairs = [(words[name], transcripts[name].words) for name in ids]
    area = confidence_area(pairs, ignore_case)
    if area is not None:
        print(
            f"{split.name}: a right word is more confident than a wrong one in {area:.1%} of pairs"
        )
    if hint := case_hint(list(zip(references, hypotheses, strict=True)), result.wer):
        print(f"{split.name}: {hint}: score again with --ignore_case.", file=sys.stderr)
    return result


def describe_model(recognizer: "Recognizer") -> dict[str, Any]:
    """What results.json says of the model, as of a training run."""
    config, parts = recognizer.model.config, recognizer.model.parts()
    network = config["network"]["Transformer"]
    return {
        "parameters": sum(
            parameter.numel()
            for name, part in parts.items()
            if name != "lm"
            for parameter in part.parameters()
        ),
        "encoder_module": network.get("encoder_module"),
        "decoder_module": network.get("decoder_module"),
        "token_type": config["tokens"]["type"],
        "output_neurons": config["tokens"]["outputs"],
        "digest": recognizer.model.digest()[:16],
    }


def write_skipped(path: Path, skipped: Mapping[str, str]) -> None:
    """The table of utterances that were not scored."""
    stream = io.StringIO(newline="")
    csv.writer(stream, lineterminator="\n").writerows([("id", "reason"), *skipped.items()])
    write_text(path, stream.getvalue())


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = build_parser().parse_args(argv)
    command = sys.argv if argv is None else ["evaluate.py", *argv]
    return exit_status(lambda arguments: evaluate(arguments, command), arguments)


if __name__ == "__main__":
    sys.exit(main())
