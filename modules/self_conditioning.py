"""Self-conditioned CTC: what a layer takes for said is told to the layers above it."""

from torch import Tensor, nn


class SelfConditioning(nn.Module):
    """Output probabilities of an inner layer, as a vector to be added to each of its frames.

    It works on single frames, so that batches, pieces and streams need nothing further. The vectors
    begin at zero: the encoder begins as it would without.

    Args:
        d_model: width of the encoder.
        num_tokens: outputs, blank included.

    Paper: arXiv:2104.02724. There, the output layer is that of the whole network; here the inner
    layers share one of their own, which is a part of the encoder as it is streamed and exported.
    """

    def __init__(self, d_model: int, num_tokens: int):
        super().__init__()
        self.ctc_lin = nn.Linear(d_model, num_tokens)
        self.feedback = nn.Linear(num_tokens, d_model)
        self.reset_feedback()

    def reset_feedback(self) -> None:
        """Back to vectors of zero."""
        nn.init.zeros_(self.feedback.weight)
        nn.init.zeros_(self.feedback.bias)

    def forward(self, normed_BTD: Tensor) -> Tensor:
        """The vectors (B, T, D) of normalised frames."""
        # Probabilities in float32: of a thousand tokens most are below what bfloat16 adds up.
        probs_BTV = self.ctc_lin(normed_BTD).float().softmax(-1)
        return self.feedback(probs_BTV.to(normed_BTD.dtype))
