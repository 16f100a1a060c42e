"""Every command answers --help, and every flag has a text."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


def sources() -> list[Path]:
    """Files of the repository that make a parser of arguments."""
    found = [*REPOSITORY.glob("*.py"), *REPOSITORY.glob("*/**/*.py")]
    places = (path.relative_to(REPOSITORY) for path in found)
    return [
        place
        for place in sorted(places)
        if place.parts[0] != "tests"
        and not place.parts[0].startswith(".")
        and "ArgumentParser" in (REPOSITORY / place).read_text(encoding="utf-8")
    ]


def options_of(tree: ast.Module) -> list[ast.Call]:
    """Calls of add_argument, under that name or as ``add``."""
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and getattr(node.func, "attr", getattr(node.func, "id", "")) in ("add_argument", "add")
        and node.args
        and isinstance(node.args[0], ast.Constant | ast.JoinedStr)
        and isinstance(getattr(node.args[0], "value", "--"), str)
        and (node.keywords or str(getattr(node.args[0], "value", "--")).startswith("--"))
    ]


@pytest.mark.parametrize("source", sources(), ids=str)
def test_every_option_has_a_text(source):
    options = options_of(ast.parse((REPOSITORY / source).read_text(encoding="utf-8")))
    silent = [
        ast.unparse(option)
        for option in options
        if not any(keyword.arg == "help" for keyword in option.keywords)
    ]
    assert not silent


def test_the_options_of_the_commands_are_found():
    trees = [ast.parse((REPOSITORY / source).read_text(encoding="utf-8")) for source in sources()]
    assert sum(len(options_of(tree)) for tree in trees) > 100


def test_every_command_makes_a_parser():
    """What can be run as a module or a script reads its arguments by argparse."""
    commands = [
        path.relative_to(REPOSITORY)
        for path in [*REPOSITORY.glob("*.py"), *REPOSITORY.glob("[!.t]*/**/*.py")]
        if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")
    ]
    trainers = {Path(f"train_{name}.py") for name in ("CTC", "S2S", "LM", "RNNT")}
    assert {Path("evaluate.py"), Path("ops/doctor.py")} < set(commands)
    # A process that the demo corpus starts for itself is no command.
    others = set(commands) - {Path("corpora/synthetic/speaker_process.py")}
    assert not others - trainers - set(sources())


@pytest.mark.parametrize(
    "command", [["-m", "ops.doctor"], ["transcribe.py"], ["-m", "benchmarks.bench_prepare"]]
)
def test_help_is_printed_and_nothing_is_run(command):
    done = subprocess.run(
        [sys.executable, *command, "--help"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
    assert "torch 2" not in done.stdout


def test_make_says_what_each_target_does():
    done = subprocess.run(["make", "help"], cwd=REPOSITORY, capture_output=True, text=True)
    targets = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("make ")}
    phony = next(
        line
        for line in (REPOSITORY / "Makefile").read_text(encoding="utf-8").splitlines()
        if line.startswith(".PHONY:")
    )
    named = set(phony.split()[1:]) - {"help", "test-all", "format", "clean"}
    assert named <= targets
    assert all(name in done.stdout for name in ("test-all", "format"))


def test_make_bench_says_beforehand_how_long_it_takes_and_then_how_far_it_is(tmp_path):
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text('#!/bin/sh\necho "run $*"\n', encoding="utf-8")
    python.chmod(0o755)
    (tmp_path / ".installed").touch()
    # A make within `make test` names its folders first.
    quiet = ["--no-print-directory", "--old-file", f"{tmp_path}/.installed"]
    done = subprocess.run(
        ["make", "bench", f"VENV={tmp_path}", *quiet],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    first, *lines = done.stdout.splitlines()
    found = re.fullmatch(r"make bench takes about (\d+) minutes on two idle cores: (.*)", first)
    parts = [part.split() for part in found[2].split(", ")]
    assert [name for name, _ in parts] == [
        *("scan", "encoder", "decode", "ctc_search", "streaming", "prepare")
    ]
    left = sum(int(minutes) for _, minutes in parts)
    assert left == int(found[1])
    help_ = subprocess.run(["make", "help"], cwd=REPOSITORY, capture_output=True, text=True).stdout
    assert f"about {left} minutes" in help_
    for number, (name, minutes) in enumerate(parts, start=1):
        begun, run, ended = lines[3 * number - 3 : 3 * number]
        assert begun.startswith(f"== {number} of 6: {name}, about {minutes} min (python -m bench")
        assert run.startswith(f"run -m benchmarks.bench_{name}")
        left -= int(minutes)
        assert re.fullmatch(rf"== {name} took \d s; about {left} min are left", ended)
    assert "run -m benchmarks.bench_scan --report" in lines


@pytest.mark.parametrize("name", ["scan", "decode", "encoder"])
def test_a_benchmark_of_a_gpu_that_is_not_there_is_one_message(name):
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.bench_{name}", "--device", "cuda"],
        cwd=REPOSITORY,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "--device cuda: there is no GPU here" in done.stderr
    assert "Traceback" not in done.stderr
