"""Small networks with random weights, made so that their hypotheses are varied and do end."""

import torch
from speechbrain.nnet.linear import Linear

from modules.TransformerASR import TransformerASR

VOCABULARY, D_MODEL = 40, 32
BLANK, BOS, EOS = 0, 1, 2


def recogniser(decoder_module, seed=0, **overrides):
    """A TransformerASR in eval mode; its encoder is not used here."""
    torch.manual_seed(seed)
    options = {
        "tgt_vocab": VOCABULARY,
        "input_size": 16,
        "d_model": D_MODEL,
        "nhead": 4,
        "num_encoder_layers": 1,
        "num_decoder_layers": 2,
        "d_ffn": 64,
        "normalize_before": True,
        "decoder_module": decoder_module,
        "mamba_config": {"d_state": 8, "expand": 2, "d_conv": 4, "backend": "torch"},
    }
    return TransformerASR(**(options | overrides)).eval()


def output_layer(seed=1, scale=4.0, eos_bias=0.0):
    """A linear layer to the tokens, scaled up so that its distributions are far from flat."""
    torch.manual_seed(seed)
    layer = Linear(input_size=D_MODEL, n_neurons=VOCABULARY)
    with torch.no_grad():
        layer.w.weight.mul_(scale)
        layer.w.bias[EOS] += eos_bias
    return layer


def memory(lengths, seed=2, padding=float("nan")):
    """Encoder output (batch, time, width) of the given lengths; ``padding`` fills it up."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(len(lengths), max(lengths), D_MODEL, generator=generator)
    for row, length in enumerate(lengths):
        states[row, length:] = padding
    return states
