"""Fixtures of several test modules."""

import glob
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.generated_corpus import make_corpus

REPOSITORY = Path(__file__).resolve().parents[1]

# Two threads, as on the smallest machine that CI has: results of reductions depend on the number.
torch.set_num_threads(2)

# How long an example takes says what else the machine is doing.
settings.register_profile("any_machine", deadline=None)
settings.load_profile("any_machine")

# A shell's background job inherits an ignored Ctrl-C, and so would every run that is tested here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tone_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated corpus with the four splits of the recipes; read only."""
    return make_corpus(tmp_path_factory.mktemp("tones") / "LibriSpeech")


# Around every test it would meet much that others write to the checkout for a moment.
@pytest.fixture(scope="module", autouse=True)
def _leaves_the_checkout_as_it_is() -> Iterator[None]:
    """The tests of a module write to their own folders alone."""
    before = set(in_checkout())
    yield
    left = sorted(set(in_checkout()) - before)
    assert not left, f"left in the checkout: {', '.join(left)}"


def in_checkout() -> Iterator[str]:
    """What lies at the top of the checkout and where runs and reports go by default."""
    for pattern in ("*", "results/*", "results/*/*", "results/*/*/*", "benchmarks/reports/*"):
        for path in glob.iglob(pattern, root_dir=REPOSITORY):
            if not path.startswith(("build", "__pycache__")) and not path.endswith(".egg-info"):
                yield path


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For networks so small that a second thread is only waited for."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def tiny_run(tone_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished CTC run that has learnt nothing yet and so is not silent; read only."""
    from tests.ctc_runs import command_line, train

    folder = tmp_path_factory.mktemp("tiny") / "run"
    assert train(command_line(tone_corpus, folder, number_of_epochs=1, lr_adam=1e-6)) == 0
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundle of ``tiny_run``; read only."""
    from inference.bundle import write_bundle

    return write_bundle(tiny_run, tmp_path_factory.mktemp("tiny_bundle") / "bundle")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked ``gpu`` where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is slow on a GPU alone, and protect Hypothesis from SpeechBrain's lazy modules.

    Tests of all backends compile a Triton kernel for almost every call; ``tests/gpu`` does not.

    Hypothesis asks every module for its ``__file__``. Lazy modules would import themselves to
    answer, and fail where an optional package (k2) is missing.
    """
    for item in items:
        if hasattr(item, "callspec") and item.callspec.params.get("backend") == "triton":
            item.add_marker(pytest.mark.slow)
    for module in list(sys.modules.values()):
        if any(base.__name__ == "LazyModule" for base in type(module).__mro__):
            module.__file__ = None
