"""Augmentation whose outcome depends on (seed, epoch, utterance) alone.

The augmenters are SpeechBrain's; each utterance is augmented by itself, over its own frames, so
that neither the batch it landed in nor its padding nor an interruption changes what is trained on.
"""

import functools
from collections.abc import Sequence

import torch
from speechbrain.augment.freq_domain import SpectrogramDrop, Warping

from common.errors import UserError
from training.data.batched_augmentation import augment_batch, batched_forms
from training.seeding import derive_seed, seeded

_UNFIT = {
    "cutcat": "takes from other utterances, and each one is augmented by itself",
    # SpeechBrain writes its draw over the setting.
    "random_selection": "chooses once and then never again",
}


class SpeedPerturbation:
    """Speed perturbation of single waveforms, run in the loader's workers.

    Args:
        perturb: SpeechBrain's ``SpeedPerturb`` or anything that maps (1, S) to (1, S').
        seed: of the run.
        from_epoch: audio of earlier epochs is returned as it came.

    Set ``epoch`` before the loader's iterator is made: the workers get a copy then.
    """

    def __init__(self, perturb: torch.nn.Module, seed: int, from_epoch: int = 0):
        self.perturb = perturb
        self.seed = seed
        self.from_epoch = from_epoch
        self.epoch = 0

    def __call__(self, wav_S: torch.Tensor, utterance_id: str) -> torch.Tensor:
        if self.epoch < self.from_epoch:
            return wav_S
        with seeded(self.seed, self.epoch, utterance_id, "speed"), torch.no_grad():
            return self.perturb(wav_S[None])[0]


class SpectrogramAugmentation:
    """SpecAugment-style drops and warps, by utterance; on a GPU the same for all at once.

    Args:
        augmentations: modules that map (1, T, M) to (1, T, M), applied in turn.
        seed: of the run.

    Raises:
        UserError: a drop that does not work on utterances by themselves.
    """

    def __init__(self, augmentations: Sequence[torch.nn.Module], seed: int):
        self.augmentations = list(augmentations)
        for module in self.augmentations:
            if isinstance(module, SpectrogramDrop) and module.replace in _UNFIT:
                raise UserError(
                    f"spectrogram_augmentations: SpectrogramDrop with replace: {module.replace} "
                    f"{_UNFIT[module.replace]}. Set replace to zeros, mean, rand or swap."
                )
        self.seed = seed
        self.batched = batched_forms(self.augmentations)

    @torch.no_grad()
    def __call__(
        self,
        feats_BTM: torch.Tensor,
        lengths: Sequence[int],
        ids: Sequence[str],
        epoch: int,
        view: int = 0,
    ) -> torch.Tensor:
        """Augmented copy; frames at and after an item's length are returned as they came.

        Args:
            lengths: valid feature frames of each item.
            view: number of the copy when an utterance is augmented more than once.
        """
        keys = [(self.seed, epoch, utterance_id, view, "spectrogram") for utterance_id in ids]
        if feats_BTM.device.type == "cuda" and self.batched:
            seeds = [derive_seed(*key) for key in keys]
            return augment_batch(self.batched, feats_BTM, lengths, seeds)
        out_BTM = feats_BTM.clone()
        for row, (key, frames) in enumerate(zip(keys, lengths, strict=True)):
            with seeded(*key):
                # Drawn on the CPU, whatever the device: the same masks everywhere.
                item_1TM = out_BTM[row : row + 1, :frames].cpu()
                for augment in self.augmentations:
                    item_1TM = augment(item_1TM)
                out_BTM[row, :frames] = item_1TM[0].to(out_BTM)
        return out_BTM

    def copies(
        self,
        feats_BTM: torch.Tensor,
        lengths: Sequence[int],
        ids: Sequence[str],
        epoch: int,
        count: int,
    ) -> torch.Tensor:
        """So many copies below one another, (count B, T, M), each augmented anew.

        Time is warped in all of them alike, first: CR-CTC compares them frame by frame
        (arXiv:2410.05101).
        """
        warps, others = self._parts if count > 1 else (None, self)
        if warps is not None and warps.augmentations:
            feats_BTM = warps(feats_BTM, lengths, ids, epoch)
        return torch.cat([others(feats_BTM, lengths, ids, epoch, view) for view in range(count)])

    @functools.cached_property
    def _parts(self) -> tuple["SpectrogramAugmentation", "SpectrogramAugmentation"]:
        """What warps time, and the rest."""
        warps = [a for a in self.augmentations if isinstance(a, Warping) and a.dim == 1]
        others = [a for a in self.augmentations if a not in warps]
        return SpectrogramAugmentation(warps, self.seed), SpectrogramAugmentation(others, self.seed)
