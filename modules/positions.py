"""Relative positions that tell before from after."""

import torch
from speechbrain.nnet.attention import RelPosEncXL
from torch import Tensor


class SignedRelPosEncXL(RelPosEncXL):
    """SpeechBrain's ``RelPosEncXL`` with the sign that it leaves out.

    There, the sines of a frame ``d`` later are those of a frame ``d`` earlier: attention cannot
    tell the two apart. Here they are negated, as in the paper. Published models do without.

    Paper: arXiv:1901.02860, section 3.3.
    """

    @torch.no_grad()
    def make_pe(self, seq_len: int) -> Tensor:
        """Encodings (1, 2 seq_len - 1, d_model), from the earliest frame to the latest."""
        pe_1TD = super().make_pe(seq_len)
        pe_1TD[:, seq_len:, 0::2].neg_()
        return pe_1TD
