"""When the words of a transcript were said, after a CTC model's best path."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchaudio.functional import forced_align, merge_tokens

from training.losses import min_ctc_frames


def align_words(
    log_probs_TV: Tensor, tokens: Sequence[int], starts_word: Sequence[bool], blank: int = 0
) -> list[tuple[int, int]] | None:
    """First frame and one past the last frame of each word's tokens on the likeliest path.

    CTC marks a token with a few frames somewhere inside it: a word is longer than that.

    Args:
        log_probs_TV: float32 log probabilities of one utterance, without padding.
        tokens: its targets, without blanks.
        starts_word: whether each of them begins a word.

    Returns:
        None where the frames do not suffice for the tokens, or where there are none.
    """
    if not tokens:
        return None
    targets_1U = torch.tensor([list(tokens)])
    if len(log_probs_TV) < int(min_ctc_frames(targets_1U, torch.tensor([len(tokens)]))):
        return None
    path_1T, scores_1T = forced_align(
        log_probs_TV[None].float().cpu().contiguous(), targets_1U.int(), blank=blank
    )
    words: list[tuple[int, int]] = []
    for span, starts in zip(
        merge_tokens(path_1T[0], scores_1T[0], blank), starts_word, strict=True
    ):
        if starts or not words:
            words.append((span.start, span.end))
        else:
            words[-1] = (words[-1][0], span.end)
    return words
