"""Fixtures of several test modules."""

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.generated_corpus import make_corpus

# Two threads, as on the smallest machine that CI has: results of reductions depend on the number.
torch.set_num_threads(2)

# A shell's background job inherits an ignored Ctrl-C, and so would every run that is tested here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tone_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated corpus with the four splits of the recipes; read only."""
    return make_corpus(tmp_path_factory.mktemp("tones") / "LibriSpeech")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For networks so small that a second thread is only waited for."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems() -> None:
    """Give SpeechBrain's lazy modules the ``__file__`` that Hypothesis asks every module for.

    They would import themselves to answer, and fail where an optional package (k2) is missing.
    """
    for module in list(sys.modules.values()):
        if any(base.__name__ == "LazyModule" for base in type(module).__mro__):
            module.__file__ = None
