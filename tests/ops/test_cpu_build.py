"""Kernels are built once for each kind of machine, whole or not at all, and never in the way."""

import ctypes
import logging
import os
import platform
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from ops import backends, build
from ops.causal_conv1d import causal_conv1d_fn
from ops.packed_linear import cpu as packed_cpu
from ops.selective_scan import cpu as scan_cpu
from ops.selective_scan import selective_scan_fn
from tests.ops.scans import assert_close, in_double, random_inputs, run

OPS = Path(build.__file__).parent
with_compiler = pytest.mark.skipif(
    build.unavailable() is not None, reason=f"nothing can be built: {build.unavailable()}"
)


@pytest.fixture
def nothing_built(monkeypatch, tmp_path):
    """As in a new process on a machine with an empty cache; the old state returns afterwards."""
    monkeypatch.setattr(build, "_libraries", {})
    monkeypatch.setattr(build, "_failures", {})
    monkeypatch.setattr(backends, "_passed", set())
    monkeypatch.setenv("MAMBA_ASR_CACHE", str(tmp_path / "cache"))
    backends._tell_what_is_missing.cache_clear()
    yield tmp_path / "cache"
    backends._tell_what_is_missing.cache_clear()


@pytest.fixture
def source(tmp_path):
    """A kernel of one function, and the header it includes."""
    folder = tmp_path / "twice"
    folder.mkdir()
    header = folder / "factor.h"
    header.write_text("#define FACTOR 2\n")
    path = folder / "cpu.cpp"
    path.write_text('#include "factor.h"\nextern "C" __attribute__((visibility("default")))\n')
    with path.open("a") as file:
        file.write("int times_factor(int x) { return FACTOR * x; }\n")
    return path, header


def compiler_that(tmp_path, body):
    """A stand-in for the compiler, which answers ``--version`` and else runs ``body``."""
    script = tmp_path / "compiler"
    script.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo stand-in && exit 0\n{body}\n')
    script.chmod(0o755)
    return str(script)


def built(cache):
    return sorted(cache.glob("*/*.so"))


@with_compiler
def test_a_second_process_loads_what_the_first_one_built_and_writes_nothing(
    nothing_built, source, monkeypatch, tmp_path
):
    assert build.Kernel(*source).load().times_factor(21) == 42
    assert len(built(nothing_built)) == 1
    monkeypatch.setattr(build, "_libraries", {})
    monkeypatch.setattr(build, "_build", lambda *_: pytest.fail("built again"))
    monkeypatch.setattr(build, "_locked", lambda _: pytest.fail("the cache was written"))
    assert build.Kernel(*source).load().times_factor(4) == 8


@with_compiler
@pytest.mark.parametrize("change", ["source", "header", "flags", "torch", "instruction set"])
def test_every_change_that_matters_makes_a_new_build(nothing_built, source, monkeypatch, change):
    build.Kernel(*source).load()
    path, header = source
    if change == "source":
        path.write_text(path.read_text() + "\n")
    elif change == "header":
        header.write_text("#define FACTOR 3\n")
    elif change == "flags":
        monkeypatch.setenv("CXXFLAGS", "-O1")
    elif change == "torch":
        monkeypatch.setattr(torch, "__version__", "2.11.0")
    else:
        monkeypatch.setattr(build, "_instruction_set", lambda: "another machine's")
    monkeypatch.setattr(build, "_libraries", {})
    build.Kernel(*source).load()
    assert len(built(nothing_built)) == 2


@pytest.mark.parametrize(
    ("line", "other"),
    [
        ("flags\t\t: fpu sse2", "flags\t\t: fpu sse2 avx2"),
        ("Features\t: fp asimd", "Features\t: fp asimd sve"),
        ("cpu\t\t: POWER8 (architected)", "cpu\t\t: POWER10 (architected)"),
        ("features\t: esan3 zarch", "features\t: esan3 zarch vx"),
        ("isa\t\t: rv64imafdc", "isa\t\t: rv64imafdcv"),
    ],
)
def test_instruction_sets_are_told_apart(line, other, tmp_path):
    found = []
    for text in (line, other, line):
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{text}\ncpu MHz\t\t: 2400\n")
        found.append(build._instruction_set(tmp_path / "cpuinfo"))
    assert found[0] == found[2] != found[1]


@with_compiler
def test_processes_that_start_together_build_once(nothing_built, source, monkeypatch, tmp_path):
    log = tmp_path / "log"
    compiler = shlex.join(build._compiler())
    body = f'echo built >> {log}\nsleep 0.3\nexec {compiler} "$@"'
    monkeypatch.setenv("CXX", compiler_that(tmp_path, body))
    # The lock is a file's, which keeps out threads as it does processes.
    call = (*source, (), True)
    threads = [threading.Thread(target=build._load, args=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert log.read_text().splitlines() == ["built"]
    assert len(built(nothing_built)) == 1


@with_compiler
def test_a_lock_of_a_process_that_died_does_not_block(nothing_built, source):
    build.Kernel(*source).load()
    (library,) = built(nothing_built)
    library.unlink()
    (library.parent / "lock").touch()
    build._libraries.clear()
    start = time.monotonic()
    assert build.Kernel(*source).load().times_factor(1) == 2
    assert time.monotonic() - start < 60


@with_compiler
def test_a_build_cut_short_leaves_nothing_behind(nothing_built, source, monkeypatch, tmp_path):
    body = 'for last; do :; done\necho half a library > "$last"\nexit 1'
    with monkeypatch.context() as patch:
        patch.setenv("CXX", compiler_that(tmp_path, body))
        with pytest.raises(build.BuildError):
            build.Kernel(*source).load()
    assert not built(nothing_built)
    monkeypatch.setattr(build, "_failures", {})
    assert build.Kernel(*source).load().times_factor(3) == 6


LOAD = """
import sys
from pathlib import Path
from ops import build

assert build.Kernel(*map(Path, sys.argv[1:])).load().times_factor(3) == 6
"""


@with_compiler
@pytest.mark.parametrize("damage", ["empty", "text", "half", "zeros", "no digest"])
def test_a_damaged_library_is_built_again(nothing_built, source, damage):
    build.Kernel(*source).load()
    (library,) = built(nothing_built)
    whole = library.read_bytes()
    # Not the file that this process has loaded.
    library.unlink()
    library.write_bytes(
        {
            "empty": b"",
            "text": b"no library",
            "half": whole[: len(whole) // 2],
            "zeros": whole[:4096].ljust(len(whole), b"\0"),
            "no digest": whole,
        }[damage]
    )
    if damage == "no digest":
        build._digest_file(library).unlink()
    # In processes of their own: to load such a file would end them.
    for builds in (True, False):
        ran = subprocess.run(
            [sys.executable, "-c", LOAD, *map(str, source)], capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stderr
        assert ("building" in ran.stderr) == builds
    assert library.read_bytes() == whole


@with_compiler
def test_a_library_that_is_whole_but_cannot_be_loaded_is_built_once(
    nothing_built, source, monkeypatch
):
    path, header = source
    path.write_text(
        'extern "C" int absent();\n'
        'extern "C" __attribute__((visibility("default"))) int times_factor(int) '
        "{ return absent(); }\n"
    )
    monkeypatch.setenv("CXXFLAGS", "-Wl,-z,now")
    assert "absent" in build.Kernel(path, header).prepare()
    assert len(built(nothing_built)) == 1
    monkeypatch.setattr(build, "_failures", {})
    monkeypatch.setattr(build, "_build", lambda *_: pytest.fail("built again"))
    assert "absent" in build.Kernel(path, header).prepare()


@with_compiler
def test_a_kernel_that_fails_leaves_the_others(nothing_built, source, tmp_path):
    path, header = source
    before, broken, after = (tmp_path / name / "cpu.cpp" for name in ("before", "broken", "after"))
    for other in (before, broken, after):
        other.parent.mkdir()
        other.write_text("this is no C++" if other is broken else path.read_text())
        (other.parent / "factor.h").write_text(header.read_text())
    loaded = build.Kernel(before, header)
    loaded.load()
    failed = build.Kernel(broken, header)
    assert "could not be built" in failed.prepare()
    assert failed.unavailable() == failed.prepare()
    assert loaded.unavailable() is None
    assert build.Kernel(after, header).load().times_factor(3) == 6


@with_compiler
def test_a_compiler_that_does_not_know_this_cpu_builds_for_any(
    nothing_built, source, monkeypatch, tmp_path
):
    compiler = shlex.join(build._compiler())
    body = f'case "$*" in *=native*) echo unknown flag >&2; exit 1;; esac\nexec {compiler} "$@"'
    monkeypatch.setenv("CXX", compiler_that(tmp_path, body))
    assert build.Kernel(*source).load().times_factor(5) == 10


def use_both_operations():
    inputs = random_inputs(9)
    y = selective_scan_fn(**inputs, delta_softplus=True)
    wanted = selective_scan_fn(**inputs, delta_softplus=True, backend="torch")
    assert torch.equal(y, wanted)
    x, weight = inputs["u"], torch.ones(inputs["u"].shape[1], 4)
    assert torch.equal(causal_conv1d_fn(x, weight), causal_conv1d_fn(x, weight, backend="torch"))


def test_without_a_compiler_torch_computes_and_one_message_says_why(
    nothing_built, monkeypatch, caplog
):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.delenv("MAMBA_ASR_SCAN", raising=False)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            use_both_operations()
    (message,) = [record.getMessage() for record in caplog.records]
    assert "CXX=no-such-compiler" in message
    with pytest.raises(ValueError, match="no-such-compiler"):
        selective_scan_fn(**random_inputs(3), backend="cpu")


def test_a_compiler_that_fails_is_tried_once(nothing_built, monkeypatch, caplog, tmp_path):
    log = tmp_path / "log"
    body = f"echo tried >> {log}\necho out of order >&2\nexit 1"
    monkeypatch.setenv("CXX", compiler_that(tmp_path, body))
    monkeypatch.delenv("MAMBA_ASR_SCAN", raising=False)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            use_both_operations()
    # For each of both operations once for this CPU, once for any.
    assert log.read_text().splitlines() == ["tried"] * 4
    missing = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert len(missing) == 1
    assert "out of order" in missing[0]
    assert "out of order" in scan_cpu.unavailable()


def test_an_unwritable_cache_is_a_reason_not_a_crash(nothing_built, monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("a file where a folder should be")
    monkeypatch.delenv("MAMBA_ASR_SCAN", raising=False)
    use_both_operations()


@with_compiler
@pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="flags of other machines differ"
)
@pytest.mark.parametrize("flags", ["-march=x86-64-v3", "-march=x86-64"])
def test_narrower_vectors_give_the_same_numbers(monkeypatch, flags):
    # In the usual cache, so that later runs need not build.
    if "v3" in flags and "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU has no AVX2")
    monkeypatch.setattr(build, "_libraries", {})
    monkeypatch.setenv("CXXFLAGS", flags)
    inputs = random_inputs(67, dim=35, state=16, groups=5, channels_last=True)
    options = {"lengths": torch.tensor([67, 40, 0]), "reverse": True, "reset_every": 21}
    wide = ctypes.c_int64()
    scan_cpu._kernel.load().selective_scan_layout(
        *(ctypes.byref(value) for value in (ctypes.c_int64(), wide, ctypes.c_int64()))
    )
    assert wide.value == (8 if "v3" in flags else 4)
    assert_close(run("cpu", inputs, **options), in_double(inputs, **options), 1e-5)
    inputs["delta"][0, 3, 20] = torch.nan
    y = selective_scan_fn(**inputs, delta_softplus=True, backend="cpu", **options)
    assert y[0, 3, :21].isnan().all()
    x, weight = inputs["u"], torch.randn(35, 4)
    found = causal_conv1d_fn(x, weight, activation="silu", backend="cpu")
    wanted = causal_conv1d_fn(x, weight, activation="silu", backend="reference")
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    rows, weight, bias = torch.randn(23, 35), torch.randn(45, 35), torch.randn(45)
    found = packed_cpu.packed_linear(rows, packed_cpu.pack(weight), bias, 45)
    wanted = torch.nn.functional.linear(rows, weight, bias)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def _unknown_user(uid):
    raise KeyError(uid)


def test_the_cache_follows_the_environment(monkeypatch):
    monkeypatch.setenv("MAMBA_ASR_CACHE", "/somewhere")
    assert build.cache_folder() == Path("/somewhere")
    monkeypatch.delenv("MAMBA_ASR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/else")
    assert build.cache_folder() == Path("/else/mamba_asr")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert build.cache_folder() == Path(os.path.expanduser("~/.cache/mamba_asr"))
    # An arbitrary user of a container has no home.
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", _unknown_user)
    with pytest.raises(OSError, match="MAMBA_ASR_CACHE may name a folder"):
        build.cache_folder()
