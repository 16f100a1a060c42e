"""Wrong histories for a decoder that would otherwise learn the transcripts by heart."""

import torch
from torch import Tensor


def replace_tokens(
    tokens_BU: Tensor, share: float, pad_index: int, num_special: int, vocabulary: int
) -> Tensor:
    """Copy of a decoder's input in which random tokens stand in the place of some.

    With few transcripts a decoder knows each by its first tokens and never learns to listen. A
    history that cannot be trusted leaves the audio as the only way to the next token. The first
    column (beginning of sentence) and padding stay.

    Args:
        share: of the tokens that are replaced.
        num_special: tokens below it (blank, bos, eos) are never put in.
    """
    replaced_BU = torch.rand(tokens_BU.shape, device=tokens_BU.device) < share
    replaced_BU[:, 0] = False
    replaced_BU &= tokens_BU != pad_index
    return torch.where(
        replaced_BU, torch.randint_like(tokens_BU, num_special, vocabulary), tokens_BU
    )
