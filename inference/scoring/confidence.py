"""Whether confidences mean something: whether right words have higher ones than wrong words.

    python -m inference.scoring.confidence results/CTC/an4/*/evaluations/an4 --split dev-clean

Pools what ``evaluate.py`` left in the folders, of several seeds for instance.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from scipy.stats import rankdata
from speechbrain.utils.edit_distance import alignment, op_table

from common.errors import EXIT_USER_ERROR, UserError, in_words
from inference.scoring.reports import read_hypotheses
from inference.transcript import Word


def right_words(reference: Sequence[str], hypothesis: Sequence[str]) -> list[bool]:
    """Of each word of the hypothesis, whether the alignment with the fewest edits has it right."""
    edits = alignment(op_table(reference, hypothesis))
    return [kind == "=" for kind, _, position in edits if position is not None]


def confidence_area(
    pairs: Iterable[tuple[str, Sequence[Word]]], ignore_case: bool = False
) -> float | None:
    """Area under the ROC curve of "this word is right": how often it outranks one that is wrong.

    Args:
        pairs: what was said, and the words that were found.
        ignore_case: a word in another letter case is right.

    Returns:
        a number in [0, 1], 0.5 by chance; None where all words are right, or all wrong.
    """
    is_right: list[bool] = []
    confidences: list[float] = []
    for said, words in pairs:
        texts = [word.text for word in words]
        if ignore_case:
            said, texts = said.casefold(), [text.casefold() for text in texts]
        is_right += right_words(said.split(), texts)
        confidences += [word.confidence for word in words]
    right = np.array(is_right, bool)
    num_right, num_wrong = int(right.sum()), int((~right).sum())
    if not num_right or not num_wrong:
        return None
    # Mann and Whitney's statistic: ties count a half.
    ranks = rankdata(confidences)
    wins = ranks[right].sum() - num_right * (num_right + 1) / 2
    return float(wins / (num_right * num_wrong))


def read_pairs(folder: str | os.PathLike, split: str) -> list[tuple[str, list[Word]]]:
    """What was said and what was found, from the files of ``evaluate.py``.

    Raises:
        UserError: a file is missing, or is not one that ``evaluate.py`` wrote.
    """
    said, found = Path(folder) / f"hyp_{split}.tsv", Path(folder) / f"hyp_{split}.jsonl"
    try:
        references = read_hypotheses(said)
        transcripts = [json.loads(line) for line in found.read_text(encoding="utf-8").splitlines()]
        return [
            (" ".join(references[row["file"]][0]), [Word(**word) for word in row["words"]])
            for row in transcripts
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}: evaluate.py left no scores of {split} here that can be read: "
            f"{in_words(error)}"
        ) from error


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m inference.scoring.confidence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="an output of evaluate.py")
    parser.add_argument("--split", required=True, metavar="NAME", help="which of its splits")
    parser.add_argument("--ignore_case", action="store_true", help="as of evaluate.py")
    arguments = parser.parse_args(argv)
    try:
        pairs = [
            pair for folder in arguments.folders for pair in read_pairs(folder, arguments.split)
        ]
    except UserError as error:
        print(f"error: {in_words(error)}", file=sys.stderr)
        return EXIT_USER_ERROR
    area = confidence_area(pairs, arguments.ignore_case)
    words = sum(len(found) for _, found in pairs)
    print(f"{arguments.split}: {words} words of {len(arguments.folders)} evaluations")
    if area is None:
        print("All words are right, or all are wrong: confidences cannot tell them apart.")
    else:
        print(f"A right word is more confident than a wrong one in {area:.1%} of pairs.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
