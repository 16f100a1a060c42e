"""Every benchmark but bench_long_audio, which wants a trained model, runs to its end."""

import os
import re
import subprocess
import sys

import pytest

from tests.ctc_runs import REPOSITORY

COMMANDS = {
    "bench_scan": ["--device", "cpu", "--rounds", "1"],
    "bench_encoder": ["--seconds", "2", "--batch_size", "1", "--repeats", "1"],
    "bench_decode": ["--only", "per_token", "batch", "--tokens", "2", "--rounds", "1"],
    "bench_ctc_search": ["--rounds", "1"],
    "bench_transcribe": ["--parts", "speed", "startup", "--rounds", "1", "--hours", "0.02"],
    "bench_streaming": ["--rounds", "2"],
    "bench_host": ["--rounds", "1", "--no_compiling"],
    "bench_prepare": ["--num_files", "1000", "--rounds", "1"],
    "bench_train": ["hparams/CTC/an4.yaml", "--utterances", "8", "--warmup", "1", "--steps", "2"],
}
# Of a table, or of a benchmark that says what it has measured line by line.
ROW = re.compile(r"^\|.+\| +\d|: \d[\d.]* (?:ms|times|seconds)\b", re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arguments"), COMMANDS.items())
def test_a_benchmark_prints_what_it_measured(name, arguments):
    ran = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr
    assert ROW.search(ran.stdout), ran.stdout
