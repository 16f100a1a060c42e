"""Augmentation of a whole batch on its device, drawn as the modules for single utterances draw.

On a GPU an utterance by itself costs a copy each way and a few dozen launches. Here the draws of
all utterances cross to the device as one table, and an augmentation is a handful of launches.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from speechbrain.augment.freq_domain import SpectrogramDrop, Warping
from torch import Tensor

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
        """First and last position of every drop, as columns of the table."""
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

    def apply(self, feats_BTM: Tensor, valid_BT1: Tensor, table_BC: Tensor) -> Tensor:
        """Features of which stretches are dropped."""
        starts_BK1, stops_BK1 = table_BC.unsqueeze(-1).chunk(2, dim=1)
        dim = self.module.dim
        places_D = torch.arange(feats_BTM.shape[dim], device=feats_BTM.device)
        dropped_BD = ((starts_BK1 <= places_D) & (places_D < stops_BK1)).any(1)
        dropped = dropped_BD.unsqueeze(3 - dim)
        if self.module.replace == "zeros":
            return feats_BTM.masked_fill(dropped, 0.0)
        frames_B11 = valid_BT1.sum(1, keepdim=True)
        total_B11 = torch.where(valid_BT1, feats_BTM, 0.0).sum((1, 2), keepdim=True)
        mean_B11 = total_B11 / (frames_B11 * feats_BTM.shape[2]).clamp(min=1)
        return torch.where(dropped, mean_B11, feats_BTM)


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

    def apply(self, feats_BTM: Tensor, valid_BT1: Tensor, table_BC: Tensor) -> Tensor:
        """Warped features."""
        del valid_BT1
        dim = self.module.dim
        centre_B1, target_B1, length_B1 = table_BC.long().split(1, dim=1)
        places_L = torch.arange(feats_BTM.shape[dim], device=feats_BTM.device)
        left_BL = places_L < target_B1
        first_BL = torch.where(left_BL, 0, centre_B1)
        last_BL = torch.where(left_BL, centre_B1, length_B1) - 1
        steps_BL = torch.where(left_BL, target_B1, length_B1 - target_B1) - 1
        scale_BL = (last_BL - first_BL) / steps_BL.clamp(min=1)
        offset_BL = (places_L - torch.where(left_BL, 0, target_B1)) * scale_BL
        offset_BL = torch.where(steps_BL > 0, offset_BL, 0.0)
        below_BL = offset_BL.floor()
        share_BL = offset_BL - below_BL
        # Beyond an item, and where nothing was drawn, everything stays.
        warped_BL = (places_L < length_B1) & (centre_B1 > 0)
        out_BTM = torch.zeros_like(feats_BTM)
        for tap, weight_BL in enumerate(self._weights(share_BL)):
            source_BL = first_BL + below_BL.long() + (tap - 1)
            source_BL = torch.minimum(torch.maximum(source_BL, first_BL), last_BL).clamp(min=0)
            index = source_BL.unsqueeze(3 - dim).expand_as(feats_BTM)
            out_BTM.addcmul_(feats_BTM.gather(dim, index), weight_BL.unsqueeze(3 - dim))
        return torch.where(warped_BL.unsqueeze(3 - dim), out_BTM, feats_BTM)

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

    def apply(self, feats_BTM: Tensor, valid_BT1: Tensor, table_BC: Tensor) -> Tensor:
        """Filtered features."""
        del valid_BT1
        return feats_BTM + table_BC.to(feats_BTM).unsqueeze(1)


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
    bins = feats_BTM.shape[2]
    rows = []
    for frames, seed in zip(lengths, seeds, strict=True):
        generator = torch.Generator().manual_seed(seed)
        draws = [form.draw(frames, bins, generator) for form in forms]
        rows.append([frames, *itertools.chain(*draws)])
    pinned = feats_BTM.device.type == "cuda"
    table_BC = torch.tensor(rows, dtype=torch.float32, pin_memory=pinned)
    table_BC = table_BC.to(feats_BTM.device, non_blocking=True)
    frames_B1, *tables = table_BC.split([1, *map(len, draws)], dim=1)
    valid_BT = torch.arange(feats_BTM.shape[1], device=feats_BTM.device) < frames_B1
    valid_BT1 = valid_BT.unsqueeze(-1)
    out_BTM = feats_BTM
    for form, table in zip(forms, tables, strict=True):
        out_BTM = form.apply(out_BTM, valid_BT1, table)
    return torch.where(valid_BT1, out_BTM, feats_BTM)
