"""Fixtures of the network tests."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    """Shapes here are so small that a second thread is only waited for."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(num_threads)
