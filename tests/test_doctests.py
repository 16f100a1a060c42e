"""The examples in docstrings give what they say."""

import doctest
import importlib

import pytest

from tests.test_imports import OPTIONAL_IN_OPS, REPOSITORY, UNITS, UPPERMOST


def is_example(line: str) -> bool:
    """Whether a line is executed; what needs a trained model says that it is not."""
    return line.lstrip().startswith(">>> ") and "+SKIP" not in line


EXAMPLES = [
    ".".join(source.relative_to(REPOSITORY).with_suffix("").parts)
    for unit, sources in UNITS.items()
    if unit not in UPPERMOST - {"tools"}
    for source in sources
    if any(map(is_example, source.read_text(encoding="utf-8").splitlines()))
]


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(name):
    try:
        module = importlib.import_module(name.removesuffix(".__init__"))
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL_IN_OPS:
            raise
        pytest.skip(f"{error.name} is not installed")
    results = doctest.testmod(module, verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert results.attempted > 0
    assert results.failed == 0
