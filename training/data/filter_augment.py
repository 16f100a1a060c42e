"""FilterAugment: a random equaliser for every utterance (Nam, Kim, Park, ICASSP 2022)."""

import torch


class FilterAugment(torch.nn.Module):
    """Adds a piecewise linear curve over the frequency axis, the same one for all frames.

    On log energies this is another room, microphone, distance or voice.

    Args:
        max_gain: the curve's points are drawn from [-max_gain, max_gain], in the features' unit
            (standard deviations when they are normalised).
        bands_low: fewest pieces of the curve.
        bands_high: most pieces.
    """

    def __init__(self, max_gain: float, bands_low: int = 3, bands_high: int = 6):
        super().__init__()
        self.max_gain = max_gain
        self.bands_low = bands_low
        self.bands_high = bands_high

    def curve(self, num_bins: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """A curve (``num_bins``,); without a generator drawn from torch's own."""
        num_bands = int(torch.randint(self.bands_low, self.bands_high + 1, (), generator=generator))
        last = num_bins - 1
        inner_K = torch.rand(num_bands - 1, generator=generator).sort().values
        edges_K = torch.cat([torch.zeros(1), inner_K, torch.ones(1)]) * last
        gains_K = (2 * torch.rand(num_bands + 1, generator=generator) - 1) * self.max_gain
        bins_M = torch.arange(num_bins, dtype=torch.float32)
        upper_M = torch.searchsorted(edges_K, bins_M).clamp(1, num_bands)
        left_M, right_M = edges_K[upper_M - 1], edges_K[upper_M]
        share_M = (bins_M - left_M) / (right_M - left_M).clamp_min(1e-6)
        return torch.lerp(gains_K[upper_M - 1], gains_K[upper_M], share_M)

    def forward(self, feats_1TM: torch.Tensor) -> torch.Tensor:
        """Features (1, T, M) to their filtered copy."""
        return feats_1TM + self.curve(feats_1TM.shape[-1]).to(feats_1TM)
