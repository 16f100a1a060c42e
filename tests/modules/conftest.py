"""Fixtures of the network tests."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _small_and_seeded(one_thread):
    """Shapes here are small, and weights are the same whichever tests run."""
    torch.manual_seed(0)
