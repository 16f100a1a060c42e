"""The Triton kernels, which a machine without a GPU interprets and compiles but cannot run.

The interpreter takes the place of Triton's compiler from the moment that Triton is imported, which
torch may do at any time. So what needs it, `interpreted_triton`, runs in a process of its own.
"""

import importlib.util
import os
import subprocess
import sys
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


class Driver:
    """Stands for Triton's, which it makes, or what launches with it, when it is first used."""

    def __init__(self, fails_at=None):
        self.fails_at, self.asked = fails_at, []

    def _make(self, part, made):
        self.asked.append(part)
        if part == self.fails_at:
            raise RuntimeError("Failed to find C compiler.")
        return made

    @property
    def active(self):
        return self._make("driver", self)

    @property
    def utils(self):
        return self._make("utils", None)


@needs_triton
@pytest.mark.parametrize("fails_at", ["driver", "utils", None])
def test_triton_itself_is_asked_once_whether_it_can_launch(monkeypatch, fails_at):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("MAMBA_ASR_SCAN", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    driver = Driver(fails_at)
    monkeypatch.setattr("triton.runtime.driver", driver)
    triton._cannot_launch.cache_clear()
    inputs = random_inputs(4)
    selective_scan_fn(**inputs)
    causal_conv1d_fn(inputs["u"], inputs["A"])
    assert not driver.asked, "for tensors on the CPU"
    for _ in range(2):
        reason = triton.unavailable()
        assert reason is None if fails_at is None else "C compiler" in reason
    assert driver.asked == (["driver"] if fails_at == "driver" else ["driver", "utils"])
    triton._cannot_launch.cache_clear()


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
