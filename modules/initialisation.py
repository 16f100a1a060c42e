"""Ways to draw the first weights of a network, by name; the mixers' dynamics have their own."""

from collections.abc import Callable, Mapping

import torch
from speechbrain.lobes.models.transformer.TransformerASR import (
    TransformerASR as SpeechBrainTransformerASR,
)
from speechbrain.nnet.attention import RelPosMHAXL, RoPEMHA
from torch import nn

from modules.mamba import Mamba
from modules.self_conditioning import SelfConditioning

ATTENTION = (nn.MultiheadAttention, RelPosMHAXL, RoPEMHA)
ATTENTION_SCALE = 0.1
"""Brings the output of attention down to that of a Mamba mixer, a thirtieth of its input's norm."""


@torch.no_grad()
def near_identity(network: nn.Module) -> None:
    """Layers that change little at first, and what they change from frame to frame.

    Attention has no preferences yet: it adds the mean over all frames to each of them, as biases
    add a constant. With Xavier's weights and random biases, 1 % of a Conformer's output varies
    over time behind eight layers; CTC then learns the constant, which is blanks, and stays there.
    Here linear layers and convolutions keep torch's smaller weights, their biases are zero, and
    attention in the encoder starts small; about half of the output varies.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv1d) and module.bias is not None:
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.xavier_normal_(module.weight)
    # The decoder's attention to speech is all that it has to go by, and stays as it is.
    for module in getattr(network, "encoder", nn.Identity()).modules():
        if isinstance(module, ATTENTION):
            module.out_proj.weight.mul_(ATTENTION_SCALE)


INITS: Mapping[str, Callable[[nn.Module], None]] = {
    "near_identity": near_identity,
    "xavier": SpeechBrainTransformerASR._init_params,
}
"""Xavier's is SpeechBrain's way: normal numbers in every matrix, torch's random biases."""


def initialise(network: nn.Module, name: str) -> None:
    """Draws the weights of a network that was just built, with or without ``encoder`` in it.

    Raises:
        ValueError: ``name`` is not in ``INITS``.
    """
    if name not in INITS:
        raise ValueError(f"init is {name!r}; known are {', '.join(INITS)}.")
    INITS[name](network)
    for module in network.modules():
        if isinstance(module, Mamba):
            module.reset_dynamics()
        elif isinstance(module, SelfConditioning):
            module.reset_feedback()
