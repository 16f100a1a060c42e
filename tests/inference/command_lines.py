"""Running the scripts for what they answer at once."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

_CODE = """
import contextlib, importlib, io, json, sys
script = importlib.import_module(sys.argv[1])
for arguments in json.loads(sys.argv[2]):
    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = script.main(arguments)
        except SystemExit as ended:
            status = ended.code
    print(json.dumps([status, error.getvalue(), "torch" in sys.modules]))
"""


def answer_of(
    main: Callable[[list[str]], int], arguments: Iterable[object], capsys: pytest.CaptureFixture
) -> tuple[int, str, str]:
    """What a command line gives on the CPU: status, standard output and error."""
    capsys.readouterr()
    try:
        status = main(["--device", "cpu", "--noprogressbar", *map(str, arguments)])
    except SystemExit as ended:
        status = ended.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def assert_answers_without_torch(
    script: str, cases: Iterable[tuple[Sequence[object], int, str]]
) -> None:
    """Each command line ends with its status and message before torch is imported.

    Args:
        script: module with a ``main``.
        cases: arguments, exit status, and what standard error says.
    """
    cases = list(cases)
    command_lines = [[str(argument) for argument in arguments] for arguments, _, _ in cases]
    done = subprocess.run(
        [sys.executable, "-c", _CODE, script, json.dumps(command_lines)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    for (arguments, status, message), answer in zip(cases, answers, strict=True):
        assert (answer[0], answer[2]) == (status, False), arguments
        assert message in answer[1].replace("\n", " "), arguments
        assert "Traceback" not in answer[1]
