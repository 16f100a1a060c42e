"""When the words of a transcript were said, after a CTC model's best path."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchaudio.functional import forced_align, merge_tokens

from decoding.ctc_beam_search.hypothesis import CTCToken


def min_ctc_frames(tokens_BU: Tensor, num_tokens_B: Tensor) -> Tensor:
    """Fewest frames that a CTC path needs: one per token and one per adjacent repetition."""
    positions_U = torch.arange(tokens_BU.shape[1], device=tokens_BU.device)
    repeat_BU = torch.zeros_like(tokens_BU, dtype=torch.bool)
    repeat_BU[:, 1:] = tokens_BU[:, 1:] == tokens_BU[:, :-1]
    repeat_BU &= positions_U < num_tokens_B[:, None]
    return num_tokens_B + repeat_BU.sum(1)


@dataclass(frozen=True)
class Alignment:
    """Where the words of an utterance are.

    Attributes:
        spans: for each word the first frame of its tokens and one past the last. CTC marks a token
            with a few frames somewhere inside it: a word is longer than that.
        log_prob_per_token: of the whole path; near 0 where the model is sure.
    """

    spans: list[tuple[int, int]]
    log_prob_per_token: float


def align_tokens(
    log_probs_TV: Tensor, tokens: Sequence[int], blank: int = 0
) -> tuple[list[CTCToken], float] | None:
    """The likeliest path through a sequence of tokens.

    Args:
        log_probs_TV: float32 log probabilities of one utterance, without padding.
        tokens: without blanks.

    Returns:
        each token with its frames, and the log probability of the path; None where the frames do
        not suffice for the tokens, there are none, or log probabilities are not finite.
    """
    targets_1U = torch.tensor([list(tokens)], dtype=torch.int32)
    enough = int(min_ctc_frames(targets_1U, torch.tensor([len(tokens)])))
    if not len(tokens) or len(log_probs_TV) < enough or not log_probs_TV.isfinite().all():
        return None
    path_1T, scores_1T = forced_align(
        log_probs_TV[None].float().cpu().contiguous(), targets_1U, blank=blank
    )
    scores_T = scores_1T[0]
    placed = [
        CTCToken(
            int(span.token), span.start, span.end, float(scores_T[span.start : span.end].max())
        )
        for span in merge_tokens(path_1T[0], scores_T, blank)
    ]
    return placed, float(scores_T.sum())


def align_words(
    log_probs_TV: Tensor, tokens: Sequence[int], pieces: Sequence[str], blank: int = 0
) -> Alignment | None:
    """The likeliest path through a transcript.

    Args:
        log_probs_TV: float32 log probabilities of one utterance, without padding.
        tokens: its targets, without blanks.
        pieces: their text; a word begins with "▁", as in sentencepiece. A piece that is nothing
            else belongs to the pause before the word.

    Returns:
        None where the frames do not suffice for the tokens, a word has none, or log probabilities
        are not finite.
    """
    aligned = align_tokens(log_probs_TV, tokens, blank)
    if aligned is None:
        return None
    found, log_prob = aligned
    words: list[tuple[int, int] | None] = []
    for token, piece in zip(found, pieces, strict=True):
        if piece.startswith("▁") or not words:
            words.append(None)
        if piece != "▁":
            last = words[-1]
            words[-1] = (token.start_frame if last is None else last[0], token.end_frame)
    placed = [word for word in words if word is not None]
    return Alignment(placed, log_prob / len(tokens)) if len(placed) == len(words) else None
