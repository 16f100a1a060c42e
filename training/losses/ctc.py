"""CTC losses that say which utterances could not be aligned."""

import torch
import torch.nn.functional as F

from decoding.ctc_alignment import min_ctc_frames


def ctc_loss(
    log_probs_BTV: torch.Tensor,
    tokens_BU: torch.Tensor,
    num_frames_B: torch.Tensor,
    num_tokens_B: torch.Tensor,
    blank: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log likelihood of each utterance.

    Args:
        log_probs_BTV: float32 log probabilities.
        tokens_BU: targets without blanks, padded.
        num_frames_B, num_tokens_B: integer lengths.

    Returns:
        (loss_B, feasible_B): an utterance with fewer frames than its tokens need has loss 0, no
        gradient, and False in ``feasible_B``; one without tokens likewise.
    """
    feasible_B = (num_frames_B >= min_ctc_frames(tokens_BU, num_tokens_B)) & (num_tokens_B > 0)
    # MPS has no CTC loss.
    device = torch.device("cpu") if log_probs_BTV.device.type == "mps" else log_probs_BTV.device
    loss_B = F.ctc_loss(
        log_probs_BTV.transpose(0, 1).to(device),
        tokens_BU.to(device),
        num_frames_B.to(device),
        num_tokens_B.to(device),
        blank=blank,
        reduction="none",
        zero_infinity=True,
    ).to(log_probs_BTV.device)
    return torch.where(feasible_B, loss_B, torch.zeros_like(loss_B)), feasible_B


def flat_start_loss(
    log_probs_BTV: torch.Tensor,
    tokens_BU: torch.Tensor,
    num_frames_B: torch.Tensor,
    num_tokens_B: torch.Tensor,
    blank: int = 0,
    prior_scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy with soft CTC alignments in which no token is likelier than another a priori.

    CTC begins with a plateau: blank is the best single guess for every frame, alignments then
    consist of blanks, and nothing is learnt of speech. Here alignments are computed from the
    posteriors divided by their mean over the batch, as likelihoods of a hybrid recogniser are, so
    that the first ones spread the tokens evenly over time: the flat start of Gaussian mixtures.
    Label priors after arXiv:2406.02560, without a state: those of this batch.

    Args:
        prior_scale: exponent of the mean that is divided by; with 0 the gradient is that of CTC.
        Others, and what is returned, as in ``ctc_loss``. The loss is no likelihood.
    """
    frames_T = torch.arange(log_probs_BTV.shape[1], device=log_probs_BTV.device)
    valid_BT1 = (frames_T < num_frames_B[:, None]).unsqueeze(-1)
    given_BTV = log_probs_BTV.detach()
    probs_BTV = given_BTV.exp().masked_fill(~valid_BT1, 0.0)
    prior_V = probs_BTV.sum((0, 1)) / valid_BT1.sum().clamp(min=1)
    with torch.enable_grad():
        log_prior_V = prior_scale * prior_V.clamp_min(1e-8).log()
        scaled_BTV = (given_BTV - log_prior_V).log_softmax(-1).requires_grad_()
        loss_B, feasible_B = ctc_loss(scaled_BTV, tokens_BU, num_frames_B, num_tokens_B, blank)
        (grad_BTV,) = torch.autograd.grad(loss_B.sum(), scaled_BTV)
    # torch gives the gradient as it is behind a softmax: probabilities less occupancies.
    occupancy_BTV = scaled_BTV.detach().exp() - grad_BTV
    occupancy_BTV = occupancy_BTV.masked_fill(~(valid_BT1 & feasible_B[:, None, None]), 0.0)
    log_probs_BTV = log_probs_BTV.masked_fill(~valid_BT1, 0.0)
    return -(occupancy_BTV * log_probs_BTV).sum((1, 2)), feasible_B


def mean_over_feasible(loss_B: torch.Tensor, feasible_B: torch.Tensor) -> torch.Tensor:
    """Mean of the losses that count; 0 (with a graph) when none does."""
    return (loss_B * feasible_B).sum() / feasible_B.sum().clamp(min=1)


def consistency_loss(
    log_probs_BTV: torch.Tensor, num_frames_B: torch.Tensor, feasible_B: torch.Tensor
) -> torch.Tensor:
    """Symmetric divergence between the CTC outputs of two augmented copies of each utterance.

    The batch holds the first copies, then the second ones in the same order; each copy learns from
    the other's distribution, which gets no gradient. Summed over frames, mean over utterances.
    CR-CTC, arXiv:2410.05101, equation 6.

    Args:
        log_probs_BTV: (2 * utterances, T, V) float32 log probabilities.
        num_frames_B: (2 * utterances,) integers, both halves alike.
    """
    first_BTV, second_BTV = log_probs_BTV.chunk(2)
    frames_B, counts_B = num_frames_B.chunk(2)[0], feasible_B.chunk(2)[0]
    valid_BT = torch.arange(log_probs_BTV.shape[1], device=frames_B.device) < frames_B[:, None]
    valid_BT = valid_BT & counts_B[:, None]

    def divergence(student_BTV, teacher_BTV):
        kl_BT = F.kl_div(student_BTV, teacher_BTV.detach(), reduction="none", log_target=True).sum(
            -1
        )
        return torch.where(valid_BT, kl_BT, torch.zeros_like(kl_BT)).sum()

    total = divergence(first_BTV, second_BTV) + divergence(second_BTV, first_BTV)
    return 0.5 * total / counts_B.sum().clamp(min=1)
