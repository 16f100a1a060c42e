"""Feature normalisation for corpora whose speakers and microphones differ."""

from speechbrain.processing.features import InputNormalization
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


def remove_utterance_mean(x_BTM: Tensor, lengths: Tensor | None) -> Tensor:
    """Each item minus the mean over its own frames; padding becomes zero."""
    if lengths is None:
        return x_BTM - x_BTM.mean(1, keepdim=True)
    num_frames_B = absolute_lengths(lengths, x_BTM.shape[1])
    padding_BT1 = padding_mask(num_frames_B, x_BTM.shape[1]).unsqueeze(-1)
    sums_B1M = x_BTM.masked_fill(padding_BT1, 0.0).sum(1, keepdim=True)
    mean_B1M = sums_B1M / num_frames_B.clamp(min=1)[:, None, None]
    return (x_BTM - mean_B1M).masked_fill(padding_BT1, 0.0)
