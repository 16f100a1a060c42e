"""Feature normalisation for corpora whose speakers and microphones differ."""

from typing import Any

import torch
from speechbrain.processing.features import (
    InputNormalization,
    combine_gaussian_statistics,
)
from torch import Tensor

from modules.lengths import absolute_lengths, padding_mask


class UtteranceMeanNormalization(InputNormalization):
    """SpeechBrain's normalisation behind the removal of each utterance's own mean.

    The mean of a log spectrum is the channel: microphone, room, distance, and much of the voice. It
    needs the whole utterance, so a model trained with it does not stream.

    Args:
        remove_mean: False leaves SpeechBrain's normalisation as it is.
        **options: of SpeechBrain's ``InputNormalization``; its global statistics are those of what
            is left.
    """

    def __init__(self, remove_mean: bool = True, **options):
        super().__init__(**options)
        self.remove_mean = remove_mean

    def forward(self, x: Tensor, lengths: Tensor | None = None, epoch: int | None = None) -> Tensor:
        """Normalises features (batch, time, bins).

        Args:
            lengths: valid frames as a fraction of ``time``; padding has no part in the mean.
            epoch: for the global statistics, see SpeechBrain's class.
        """
        if self.remove_mean:
            x = remove_utterance_mean(x, lengths)
        return super().forward(x, lengths, epoch)


def normalize_in_pieces(
    normalize: InputNormalization, feats_BTM: Tensor, piece_frames: int
) -> None:
    """``normalize(feats_BTM)`` in its place, in evaluation, if it can be in memory for a piece.

    Args:
        normalize: SpeechBrain's normalisation or a subclass.
        feats_BTM: features, all of them valid.
        piece_frames: frames of a piece.
    """
    if normalize.norm_type != "global":
        # Of its own statistics: those of all frames.
        feats_BTM.copy_(normalize(feats_BTM))
        return
    if getattr(normalize, "remove_mean", False):
        feats_BTM -= feats_BTM.mean(1, keepdim=True)
    for piece_BTM in feats_BTM.split(piece_frames, dim=1):
        piece_BTM.copy_(InputNormalization.forward(normalize, piece_BTM))


class FiniteStatistics:
    """Keeps a normaliser as it was where a batch would make its statistics infinite or NaN.

    One such sample would stay in them for good.

    Args:
        normalize: SpeechBrain's normalisation or a subclass.
    """

    def __init__(self, normalize: InputNormalization):
        self.normalize = normalize
        self._learn = normalize._update_global_stats
        normalize._update_global_stats = self._update

    def _update(self, x_BTM: Tensor, mask_BT1: Tensor) -> None:
        before = _known_statistics(self.normalize, x_BTM)
        self._learn(x_BTM, mask_BT1)
        known = self.normalize
        if not (known.glob_mean.isfinite() & known.glob_std.isfinite()).all():
            known.count, known.glob_mean, known.glob_std = before


class CountedStatistics:
    """Lets a normaliser learn from batches whose frames the host has counted.

    SpeechBrain's asks the device how many there are, and waits for all that it has to do before.
    This takes the place of its update, in a run of one process. Set ``num_frames``, of the batch
    without its padding, before the normaliser is called. A batch whose sums are not finite changes
    nothing, which the device alone knows: there the count is, too, until it is saved.

    Args:
        normalize: SpeechBrain's normalisation or a subclass.
    """

    def __init__(self, normalize: InputNormalization):
        self.normalize = normalize
        self.num_frames = 0
        normalize._update_global_stats = self._update
        self._statistics = normalize._statistics_dict
        normalize._statistics_dict = self._statistics_dict

    def _statistics_dict(self) -> dict[str, Any]:
        return {**self._statistics(), "count": int(self.normalize.count)}

    def _update(self, x_BTM: Tensor, mask_BT1: Tensor) -> None:
        mean_M = (x_BTM * mask_BT1).sum((0, 1)) / self.num_frames
        variance_M = ((x_BTM - mean_M).square() * mask_BT1).sum((0, 1)) / self.num_frames
        count, *before = _known_statistics(self.normalize, x_BTM)
        if not isinstance(count, Tensor):
            count = mean_M.new_full((), count, dtype=torch.float64)
        learnt = combine_gaussian_statistics(
            (count, before[0], before[1].square()), (self.num_frames, mean_M, variance_M)
        )
        learnt = learnt[0], learnt[1], learnt[2].sqrt()
        finite = (learnt[1].isfinite() & learnt[2].isfinite()).all()
        known = self.normalize
        known.count, known.glob_mean, known.glob_std = (
            torch.where(finite, *pair) for pair in zip(learnt, (count, *before), strict=True)
        )


def _known_statistics(
    normalize: InputNormalization, x_BTM: Tensor
) -> tuple[int | Tensor, Tensor, Tensor]:
    """Count, mean and deviation so far; those of nothing leave features as they are."""
    mean_M, std_M = normalize.glob_mean, normalize.glob_std
    if not mean_M.numel():
        mean_M, std_M = torch.zeros_like(x_BTM[0, 0]), torch.ones_like(x_BTM[0, 0])
    # Of a type of their own: that of a batch may be too coarse to add up in.
    return normalize.count, mean_M.to(x_BTM.device), std_M.to(x_BTM.device)


def remove_utterance_mean(x_BTM: Tensor, lengths: Tensor | None) -> Tensor:
    """Each item minus the mean over its own frames; padding becomes zero."""
    if lengths is None:
        return x_BTM - x_BTM.mean(1, keepdim=True)
    num_frames_B = absolute_lengths(lengths, x_BTM.shape[1])
    padding_BT1 = padding_mask(num_frames_B, x_BTM.shape[1]).unsqueeze(-1)
    sums_B1M = x_BTM.masked_fill(padding_BT1, 0.0).sum(1, keepdim=True)
    mean_B1M = sums_B1M / num_frames_B.clamp(min=1)[:, None, None]
    return (x_BTM - mean_B1M).masked_fill(padding_BT1, 0.0)
