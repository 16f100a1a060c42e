"""Whether confidences mean something: whether right words have higher ones than wrong words."""

from collections.abc import Iterable, Sequence

import numpy as np
from scipy.stats import rankdata
from speechbrain.utils.edit_distance import alignment, op_table

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
