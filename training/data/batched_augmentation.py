"""Augmentation of a whole batch on its device, drawn as the modules for single utterances draw.

On a GPU an utterance by itself costs a copy each way and a few dozen launches. Here what was drawn
becomes tables on the host, and an augmentation with them is a handful of launches for all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from speechbrain.augment.freq_domain import SpectrogramDrop, Warping
from torch import Tensor

from training.data.copied_ahead import to_device
from training.data.filter_augment import FilterAugment


class BatchedDrops:
    """SpeechBrain's ``SpectrogramDrop`` that fills in zeros or an utterance's own mean."""

    def __init__(self, module: SpectrogramDrop):
        self.module = module

    @staticmethod
    def takes(module: torch.nn.Module) -> bool:
        """Whether this class does the same as ``module``."""
        return type(module) is SpectrogramDrop and module.replace in ("zeros", "mean")

    def draw(self, frames: int, bins: int, generator: torch.Generator) -> list[float]:
        """Starts and ends of the drops, empty ones to make up the number."""
        module = self.module

        def integers(low: int, high: int, count: int) -> list[int]:
            return torch.randint(low, high, (1, count), generator=generator)[0].tolist()

        (count,) = integers(module.drop_count_low, module.drop_count_high + 1, 1)
        starts, stops = [], []
        if count:
            lengths = integers(module.drop_length_low, module.drop_length_high, count)
            starts = integers(0, max(1, frames if module.dim == 1 else bins), count)
            stops = [start + length for start, length in zip(starts, lengths, strict=True)]
        nothing = [0] * (module.drop_count_high - count)
        return [*starts, *nothing, *stops, *nothing]

    def tables(self, draws: Tensor, lengths: Tensor, frames: int, bins: int) -> list[Tensor]:
        """What is dropped, by frames or bins, and one by the number of an item's features."""
        starts_BK1, stops_BK1 = draws.unsqueeze(-1).chunk(2, dim=1)
        places_D = torch.arange(frames if self.module.dim == 1 else bins)
        dropped_BD = ((starts_BK1 <= places_D) & (places_D < stops_BK1)).any(1)
        share_B11 = 1 / (lengths * bins).clamp(min=1)[:, None, None]
        return [dropped_BD.unsqueeze(3 - self.module.dim), share_B11]

    def apply(
        self, feats_BTM: Tensor, valid_BT1: Tensor, dropped: Tensor, share_B11: Tensor
    ) -> Tensor:
        """Features of which stretches are dropped."""
        if self.module.replace == "zeros":
            return feats_BTM.masked_fill(dropped, 0.0)
        total_B11 = torch.where(valid_BT1, feats_BTM, 0.0).sum((1, 2), keepdim=True)
        return torch.where(dropped, total_B11 * share_B11, feats_BTM)


class BatchedWarping:
    """SpeechBrain's bicubic ``Warping``: the two sides of a point are stretched and squeezed."""

    # Of the interpolation, as torch has it.
    BICUBIC_A = -0.75

    def __init__(self, module: Warping):
        self.module = module

    @staticmethod
    def takes(module: torch.nn.Module) -> bool:
        """Whether this class does the same as ``module``."""
        return type(module) is Warping and module.warp_mode == "bicubic" and module.dim in (1, 2)

    def draw(self, frames: int, bins: int, generator: torch.Generator) -> list[float]:
        """The point, where it comes to lie, and the length of what is warped."""
        length, window = (frames if self.module.dim == 1 else bins), self.module.warp_window
        if length - window <= window:
            return [0, 0, length]
        centre = int(torch.randint(window, length - window, (1,), generator=generator))
        target = torch.randint(centre - window, centre + window, (1,), generator=generator)
        return [centre, int(target) + 1, length]

    def tables(self, draws: Tensor, lengths: Tensor, frames: int, bins: int) -> list[Tensor]:
        """Sources and weights of few frequencies; of many frames the device makes them itself."""
        del lengths, frames
        return [draws] if self.module.dim == 1 else list(self._taps(draws, bins))

    def apply(self, feats_BTM: Tensor, valid_BT1: Tensor, *tables: Tensor) -> Tensor:
        """Warped features."""
        del valid_BT1
        dim = self.module.dim
        if dim == 1:
            tables = self._taps(*tables, feats_BTM.shape[1])
        out_BTM = torch.zeros_like(feats_BTM)
        for source_BL, weight_BL in zip(*(table.unbind(-1) for table in tables), strict=True):
            index = source_BL.unsqueeze(3 - dim).expand_as(feats_BTM)
            out_BTM.addcmul_(feats_BTM.gather(dim, index), weight_BL.unsqueeze(3 - dim))
        return out_BTM

    def _taps(self, draws: Tensor, places: int) -> tuple[Tensor, Tensor]:
        """Four sources and their weights (B, places, 4) of every place."""
        centre_B1, target_B1, length_B1 = draws.long().split(1, dim=1)
        places_L = torch.arange(places, device=draws.device)
        left_BL = places_L < target_B1
        first_BL = torch.where(left_BL, 0, centre_B1)
        last_BL = torch.where(left_BL, centre_B1, length_B1) - 1
        steps_BL = torch.where(left_BL, target_B1, length_B1 - target_B1) - 1
        scale_BL = (last_BL - first_BL) / steps_BL.clamp(min=1)
        offset_BL = (places_L - torch.where(left_BL, 0, target_B1)) * scale_BL
        # Beyond an item, and where nothing was drawn, everything stays.
        warped_BL = (places_L < length_B1) & (centre_B1 > 0)
        offset_BL = torch.where(warped_BL & (steps_BL > 0), offset_BL, 0.0)
        below_BL = offset_BL.floor()
        taps_4 = torch.arange(-1, 3, device=draws.device)
        source_BL4 = (first_BL + below_BL.long()).unsqueeze(-1) + taps_4
        source_BL4 = torch.minimum(
            torch.maximum(source_BL4, first_BL.unsqueeze(-1)), last_BL.unsqueeze(-1)
        )
        source_BL4 = torch.where(warped_BL.unsqueeze(-1), source_BL4, places_L.unsqueeze(-1))
        return source_BL4, torch.stack(self._weights(offset_BL - below_BL), dim=-1)

    def _weights(self, share_BL: Tensor) -> list[Tensor]:
        a = self.BICUBIC_A

        def near(x: Tensor) -> Tensor:
            return ((a + 2) * x - (a + 3)) * x * x + 1

        def far(x: Tensor) -> Tensor:
            return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

        return [far(share_BL + 1), near(share_BL), near(1 - share_BL), far(2 - share_BL)]


class BatchedFilter:
    """``FilterAugment``: each utterance has its own curve over frequency."""

    def __init__(self, module: FilterAugment):
        self.module = module

    @staticmethod
    def takes(module: torch.nn.Module) -> bool:
        """Whether this class does the same as ``module``."""
        return type(module) is FilterAugment

    def draw(self, frames: int, bins: int, generator: torch.Generator) -> list[float]:
        """The curve."""
        del frames
        return self.module.curve(bins, generator).tolist()

    def tables(self, draws: Tensor, lengths: Tensor, frames: int, bins: int) -> list[Tensor]:
        """The curves (B, 1, M)."""
        del lengths, frames, bins
        return [draws.unsqueeze(1)]

    def apply(self, feats_BTM: Tensor, valid_BT1: Tensor, curve_B1M: Tensor) -> Tensor:
        """Filtered features."""
        del valid_BT1
        return feats_BTM + curve_B1M


Batched = BatchedDrops | BatchedWarping | BatchedFilter


def batched_forms(modules: Sequence[torch.nn.Module]) -> list[Batched] | None:
    """What does the same to a whole batch; None where a module has no such form."""
    forms: list[Batched] = []
    for module in modules:
        kinds = [
            kind for kind in (BatchedDrops, BatchedWarping, BatchedFilter) if kind.takes(module)
        ]
        if not kinds:
            return None
        forms.append(kinds[0](module))
    return forms


def augment_batch(
    forms: Sequence[Batched], feats_BTM: Tensor, lengths: Sequence[int], seeds: Sequence[int]
) -> Tensor:
    """Features augmented by each form in turn; frames at and after an item's length stay.

    Args:
        lengths: valid frames of each item.
        seeds: of each item, as SpeechBrain's modules would be seeded for it.
    """
    frames, bins = feats_BTM.shape[1:]
    draws = []
    for length, seed in zip(lengths, seeds, strict=True):
        generator = torch.Generator().manual_seed(seed)
        draws.append([form.draw(length, bins, generator) for form in forms])
    lengths_B = torch.tensor(lengths)
    valid_BT1 = (torch.arange(frames) < lengths_B[:, None]).unsqueeze(-1)
    device = feats_BTM.device
    valid_BT1, out_BTM = to_device(valid_BT1, device), feats_BTM
    for form, drawn in zip(forms, zip(*draws, strict=True), strict=True):
        tables = form.tables(torch.tensor(drawn, dtype=torch.float32), lengths_B, frames, bins)
        out_BTM = form.apply(out_BTM, valid_BT1, *(to_device(table, device) for table in tables))
    return torch.where(valid_BT1, out_BTM, feats_BTM)
