"""The Triton kernels, which a machine without a GPU interprets and compiles but cannot run.

The interpreter takes the place of Triton's compiler from the moment that Triton is imported, which
torch may do at any time. So what needs it, `interpreted_triton`, runs in a process of its own.
"""

import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from ops.causal_conv1d import causal_conv1d_fn
from ops.causal_conv1d import triton as triton_conv
from ops.selective_scan import Way, selective_scan_fn, triton
from ops.selective_scan.arguments import ScanArguments
from tests.ops.scans import random_inputs

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def run_in_process(arguments, **environment):
    run = subprocess.run(
        [sys.executable, *arguments],
        cwd=HERE.parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-3000:]
    return run.stdout


@needs_triton
@pytest.mark.parametrize(
    "chosen",
    [
        "pieces and (True-7 or False-None or gate)",
        "convolution and options",
        pytest.param("scan", marks=pytest.mark.slow),
        pytest.param("convolution", marks=pytest.mark.slow),
    ],
)
def test_interpreted_kernels(chosen):
    arguments = ["-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "-k", chosen]
    file = str(HERE / "interpreted_triton.py")
    output = run_in_process([*arguments, file], TRITON_INTERPRET="1")
    assert " passed" in output
    assert "skipped" not in output


@needs_triton
def test_kernels_compile_without_a_gpu(tmp_path):
    file = str(HERE / "compiled_triton.py")
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    output = run_in_process([file, "90"], **environment)
    assert "selective_scan_forward_kernel" in output
    assert "causal_conv1d_backward_kernel" in output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_backend_says_what_is_missing(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    wanted = "CUDA" if importlib.util.find_spec("triton") else "not installed"
    assert wanted in triton.unavailable()
    inputs = random_inputs(4)
    with pytest.raises(ValueError, match=wanted):
        selective_scan_fn(**inputs, backend="triton")
    with pytest.raises(ValueError, match=wanted):
        causal_conv1d_fn(inputs["u"], inputs["A"], backend="triton")


@needs_triton
def test_amd_gpus_are_left_to_other_backends(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "ROCm" in triton.unavailable()
    assert "ROCm" in triton_conv.unavailable()


@needs_triton
@pytest.mark.parametrize("missing", ["compiler", "headers"])
def test_without_a_compiler_other_backends_compute(monkeypatch, tmp_path, missing):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (tmp_path / "gcc").write_text("#!/bin/sh")
    (tmp_path / "gcc").chmod(0o700)
    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    triton._can_compile.cache_clear()
    assert triton.unavailable() is None
    (tmp_path / {"compiler": "gcc", "headers": "Python.h"}[missing]).unlink()
    triton._can_compile.cache_clear()
    assert "C compiler" in triton.unavailable()
    triton._can_compile.cache_clear()


@pytest.mark.parametrize(
    ("time", "dtype", "device", "message"),
    [
        (4, torch.float64, "cpu", "float64"),
        (4, torch.float32, "meta", "meta"),
        (0, torch.float32, "cpu", "nothing"),
    ],
)
def test_calls_that_do_not_fit_are_refused_with_a_reason(time, dtype, device, message, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0" if device == "meta" else "1")
    inputs = random_inputs(time)
    tensors = [inputs[name].to(device, dtype) for name in ("u", "delta", "A", "B", "C")]
    arguments = ScanArguments((Way(*tensors),), None, True, None)
    assert message in triton.unsupported(arguments)
