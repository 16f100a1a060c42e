"""Random numbers that depend on their place in the run alone."""

import random

import numpy as np
import torch

from training.seeding import derive_seed, seed_everything, seeded


def draw():
    return random.random(), float(np.random.rand()), torch.rand(2).tolist()  # noqa: NPY002


def test_one_key_gives_one_sequence():
    seed_everything(1, "epoch", 3)
    first = draw()
    draw()
    seed_everything(1, "epoch", 3)
    assert draw() == first


def test_keys_that_differ_give_other_sequences():
    keys = [(1, 2, "a"), (1, 2, "b"), (2, 1, "a"), (12, "a"), (1, "2a"), ("1", 2, "a")]
    assert len({derive_seed(*key) for key in keys}) == len(keys)
    drawn = []
    for key in keys:
        seed_everything(*key)
        drawn.append(repr(draw()))
    assert len(set(drawn)) == len(keys)


def test_a_seed_is_the_same_in_every_process():
    # Python's own hash() of a string is not.
    assert derive_seed(1, "a-b", 2) == 1875057666306885468


def test_a_seed_fits_every_generator():
    for key in range(100):
        assert 0 <= derive_seed(key) < 2**63


def test_a_seeded_block_leaves_the_generators_as_they_were():
    seed_everything(5)
    expected = random.random(), torch.rand(1).item()
    seed_everything(5)
    with seeded(1, "utterance"):
        inside = random.random(), torch.rand(3).tolist()
    assert (random.random(), torch.rand(1).item()) == expected
    with seeded(1, "utterance"):
        assert (random.random(), torch.rand(3).tolist()) == inside


def test_a_seeded_block_that_fails_leaves_the_generators_as_they_were():
    seed_everything(5)
    expected = random.random(), torch.rand(1).item()
    seed_everything(5)
    try:
        with seeded(1):
            torch.rand(1)
            raise ValueError
    except ValueError:
        pass
    assert (random.random(), torch.rand(1).item()) == expected
