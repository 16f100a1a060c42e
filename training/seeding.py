"""Random numbers that depend on what is computed, not on what was computed before.

SpeechBrain keeps no random states in checkpoints, workers draw from their own, and the creation of
a loader iterator draws from the main one. Instead of saving all of these, every draw is seeded
from its place in the run: augmentation from (seed, epoch, utterance), everything inside a step
from (seed, epoch, step, rank). A resumed run is then the uninterrupted one by construction.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(*key: object) -> int:
    """A 63-bit seed from any key; the same in every process and on every platform."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_everything(*key: object) -> None:
    """Seed Python, NumPy and all torch devices from a key."""
    seed = derive_seed(*key)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 SpeechBrain's augmenters may use the global state
    torch.manual_seed(seed)


@contextmanager
def seeded(*key: object) -> Iterator[None]:
    """Inside, Python's and torch's CPU generators are seeded from ``key``; restored after."""
    python_state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        seed = derive_seed(*key)
        random.seed(seed)
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
