"""The voices of the synthetic corpus: who speaks in which split."""

from typing import NamedTuple


class Voice(NamedTuple):
    """A speaker: an espeak-ng accent and variant, and how they use it.

    Attributes:
        pitch: espeak-ng's, 0 to 99.
        words_per_minute: espeak-ng's speed.
        played_at_hz: the rate at which the samples are played back. Faster than they were made
            gives the higher pitch and formants of a smaller head, slower those of a larger one.
    """

    speaker: str
    sex: str
    accent: str
    variant: str
    pitch: int
    words_per_minute: int
    played_at_hz: int

    @property
    def name(self) -> str:
        """The name that espeak-ng knows the voice by."""
        return f"{self.accent}+{self.variant}"


# Men and women of each split. Chosen by their average spectra: every held-out voice has relatives
# in training, of which many are needed, since a recogniser that hears 24 of these voices only
# learns them by heart. A variant named twice is two speakers of different size. Left out are
# robots, the Klatt synthesiser, and all variants with "breath" (f2, f3, f5, whisper, ...): their
# noise is another one each time.
_VARIANTS = {
    "train-clean-100": (
        "max antonio m7 ed m1 robert Denis Nguyen Mike quincy pablo michel Alex m4 Gene2 gustave"
        " john Hugo Diogo Jacky iven3 m6 m8 marcelo pedro norbert",
        "aunty belinda Andrea anika shelby grandma steph"
        " belinda Andrea anika shelby grandma steph aunty",
    ),
    "dev-clean": ("m5 Gene Michael", "Annie"),
    "test-clean": ("m3 rob", "f1 f4"),
    "test-other": ("Mario paul m2", "linda"),
}
_FIRST_SPEAKER = {"train-clean-100": 101, "dev-clean": 201, "test-clean": 301, "test-other": 401}
# Multiples of 500 Hz, which resample cheaply to 16 kHz; espeak-ng speaks at 22,050 Hz.
_TRAIN_PLAYED_AT_HZ = (20500, 23000, 21500, 24000, 21000, 22500, 23500)

SPLITS = tuple(_VARIANTS)


def voices_of(split: str) -> list[Voice]:
    """The voices of a split, always the same and in the same order; none is in two splits."""
    men, women = (variants.split() for variants in _VARIANTS[split])
    # By relative place in either list, so that the first few voices are a mixture as well.
    order = sorted(
        [((place + 0.5) / len(men), "M", variant) for place, variant in enumerate(men)]
        + [((place + 0.5) / len(women), "F", variant) for place, variant in enumerate(women)]
    )
    return [
        Voice(
            speaker=str(_FIRST_SPEAKER[split] + number),
            sex=sex,
            accent="en" if number % 4 == 3 else "en-us",
            variant=variant,
            pitch=(42, 50, 58)[number % 3],
            words_per_minute=(150, 158, 146, 154)[number % 4],
            played_at_hz=_TRAIN_PLAYED_AT_HZ[number % 7] if split == "train-clean-100" else 22000,
        )
        for number, (_, sex, variant) in enumerate(order)
    ]
