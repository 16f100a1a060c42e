"""Small networks and the comparisons that several tests make."""

import torch
from torch import Tensor, nn

from modules.TransformerASR import TransformerASR

INPUT_SIZE = 12
VOCABULARY = 11

ENCODER_OPTIONS = {
    "transformer": {"encoder_module": "transformer", "attention_type": "regularMHA"},
    "transformer-relpos": {"encoder_module": "transformer"},
    "transformer-hypermixing": {"encoder_module": "transformer", "attention_type": "hypermixing"},
    "conformer": {"encoder_module": "conformer", "kernel_size": 7},
    "conformer-rope": {
        "encoder_module": "conformer",
        "kernel_size": 7,
        "attention_type": "RoPEMHA",
    },
    "branchformer": {
        "encoder_module": "branchformer",
        "kernel_size": 7,
        "csgu_linear_units": 12,
        "use_linear_after_conv": True,
    },
    "conformer-causal-convolution": {
        "encoder_module": "conformer",
        "kernel_size": 7,
        "causal_convolution": True,
    },
    "conmamba": {"encoder_module": "conmamba", "kernel_size": 7},
    "conmamba-causal-convolution": {
        "encoder_module": "conmamba",
        "kernel_size": 7,
        "causal_convolution": True,
    },
    "conmamba-sine": {
        "encoder_module": "conmamba",
        "kernel_size": 7,
        "attention_type": "regularMHA",
    },
    "mamba": {"encoder_module": "mamba"},
}
"""One entry per way of encoding; every one must be independent of padding."""

CAUSAL_ENCODERS = [
    name for name in ENCODER_OPTIONS if name not in ("transformer-hypermixing", "branchformer")
]


def small_network(encoder: str = "conmamba", **options) -> TransformerASR:
    """A network of two encoder layers without dropout, seeded."""
    torch.manual_seed(7)
    defaults = {
        "tgt_vocab": VOCABULARY,
        "input_size": INPUT_SIZE,
        "d_model": 16,
        "nhead": 2,
        "num_encoder_layers": 2,
        "num_decoder_layers": 0,
        "d_ffn": 24,
        "dropout": 0.0,
        "activation": nn.GELU,
        "normalize_before": True,
        "attention_type": "RelPosMHAXL",
        "mamba_config": {"d_state": 4},
    }
    return TransformerASR(**{**defaults, **ENCODER_OPTIONS[encoder], **options}).eval()


def padded_batch(lengths: list[int], width: int = INPUT_SIZE) -> tuple[Tensor, Tensor]:
    """Frames (batch, time, width) whose padding is large noise, and their lengths."""
    lengths_B = torch.tensor(lengths)
    x_BTD = torch.randn(len(lengths), max(lengths), width)
    for row, length in zip(x_BTD, lengths, strict=True):
        row[length:] = 100 * torch.randn_like(row[length:])
    return x_BTD, lengths_B


def gradients(network: nn.Module) -> dict[str, Tensor]:
    """Gradients by parameter name; they are taken from the network."""
    found = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad(set_to_none=True)
    return found


def assert_same_gradients(actual: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Every gradient differs by at most 1e-4 of its norm (of 1 if that is smaller)."""
    assert actual.keys() == wanted.keys()
    for name, gradient in wanted.items():
        error = (actual[name] - gradient).norm() / max(gradient.norm(), 1.0)
        assert error < 1e-4, f"{name}: {error:.2e}"
