"""Compiles C++ at its first use, once for each machine type, and loads it.

Torch is imported for what uses it alone: the search in decoding/ is built without.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # a module, or nothing

logger = logging.getLogger(__name__)

_HEADER = Path(__file__).with_name("simd.h")

# The kernels are written in GCC's and Clang's vector extension; nothing may reorder their sums.
_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-shared",
    "-w",
    "-fno-math-errno",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
]
_NATIVE = {"x86_64": "-march=native", "amd64": "-march=native"}

_lock = threading.Lock()
_libraries: dict[Path, ctypes.CDLL] = {}
_failures: dict[Path, str] = {}


def _free_lock() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    # The thread that builds is not in the copy of a process.
    os.register_at_fork(after_in_child=_free_lock)


class BuildError(RuntimeError):
    """The kernels cannot be compiled or loaded here; the message says why."""


def unavailable(uses_torch: bool = True) -> str | None:
    """Why no kernel can be built on this machine, as far as that is known without trying."""
    if reason := _no_compiler():
        return reason
    if uses_torch and _parallel_for() is None:
        return f"torch {_torch_version()} has no torch_parallel_for; torch 2.11 has"
    return None


class Kernel:
    """The C++ file of an operation, compiled at its first use.

    Args:
        source: the file, which includes ``header``.
        flags: for the compiler, after the usual ones.
        uses_torch: it is called with `parallel_for_address`.
    """

    def __init__(
        self,
        source: Path,
        header: Path = _HEADER,
        flags: tuple[str, ...] = (),
        uses_torch: bool = True,
    ):
        self._source, self._header = source, header
        self._flags, self._uses_torch = flags, uses_torch

    def unavailable(self) -> str | None:
        """Why it cannot be built on this machine, as far as that is known without trying."""
        if self._source in _libraries:
            return None
        return _failures.get(self._source) or unavailable(self._uses_torch)

    def load(self) -> ctypes.CDLL:
        """The library; built unless this machine has it already.

        Raises:
            BuildError: no compiler, or it failed. What failed is not tried again by this process.
        """
        with _lock:
            if self._source not in _libraries:
                reason = self.unavailable()
                if reason is not None:
                    raise BuildError(reason)
                try:
                    _libraries[self._source] = _load(
                        self._source, self._header, self._flags, self._uses_torch
                    )
                except (OSError, subprocess.SubprocessError) as error:
                    reason = f"the kernels could not be built or loaded: {_explain(error)}"
                    _failures[self._source] = reason
                    raise BuildError(reason) from error
            return _libraries[self._source]

    def prepare(self) -> str | None:
        """Builds it where this machine has none yet; why that failed, if so."""
        try:
            self.load()
        except BuildError as error:
            return str(error)
        return None


@functools.cache
def parallel_for_address() -> int:
    """Address of torch's C function ``torch_parallel_for``, which gives kernels torch's threads."""
    address = ctypes.cast(_parallel_for(), ctypes.c_void_p).value
    assert address is not None
    return address


def cache_folder() -> Path:
    """Where builds are kept: $MAMBA_ASR_CACHE, or mamba_asr in the user's cache folder.

    Raises:
        OSError: there is no such folder, since the user has no home.
    """
    folder = os.environ.get("MAMBA_ASR_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(folder).expanduser() if folder else Path(base).expanduser() / "mamba_asr"
    except RuntimeError as error:
        raise OSError(f"{error} MAMBA_ASR_CACHE may name a folder.") from error


def _load(source: Path, header: Path, flags: tuple[str, ...], uses_torch: bool) -> ctypes.CDLL:
    command = [*_command(), *flags]
    folder = cache_folder() / _key(source, header, command, _torch_version() if uses_torch else "")
    library = folder / f"{source.parent.name}.so"
    if not _is_whole(library):
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "lock"):
            # Another process may have built it while this one waited.
            if not _is_whole(library):
                _build(command, source, library)
    return ctypes.CDLL(str(library))


def _is_whole(library: Path) -> bool:
    """Whether a library is what was built: to load a damaged one may end the process."""
    try:
        return _digest_file(library).read_text(encoding="ascii") == _digest(library)
    except (OSError, UnicodeDecodeError):
        return False


def _digest_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _build(command: list[str], source: Path, library: Path) -> None:
    # A warning, since a default logging configuration shows nothing less and the wait needs a word.
    logger.warning("building %s for this CPU (some seconds, once)", source.parent.name)
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        unfinished = Path(scratch) / library.name
        files = [str(source), "-o", str(unfinished)]
        try:
            _run(*command, *files)
        except subprocess.CalledProcessError as error:
            # A compiler that does not know this CPU can still build for the plain architecture.
            plain = [flag for flag in command if not flag.endswith("=native")]
            try:
                _run(*plain, *files)
            except subprocess.CalledProcessError:
                raise error from None
        # Renamed into place whole and on disk, so that a build cut short is never loaded.
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        digest = Path(scratch) / "digest"
        digest.write_text(_digest(unfinished), encoding="ascii")
        os.replace(unfinished, library)
        os.replace(digest, _digest_file(library))


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        # Where a network file system has no locks two processes may build at once; each renames a
        # complete library into place, so only the time is lost.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            # A copy of this process (fork) has the file open, too, and would keep the lock.
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)


def _command() -> list[str]:
    native = _NATIVE.get(platform.machine().lower(), "-mcpu=native")
    flags = shlex.split(os.environ.get("CXXFLAGS", ""))
    return [*_compiler(), *_FLAGS, native, *flags]


def _no_compiler() -> str | None:
    if fcntl is None:
        return "the kernels need GCC or Clang; on Windows use WSL"
    if not _compiler():
        wanted = os.environ.get("CXX")
        searched = f"CXX={wanted} was not found" if wanted else "no c++, g++ or clang++ on the PATH"
        return f"{searched}; install a C++ compiler (Debian: apt install g++, macOS: xcode-select)"
    return None


def _compiler() -> tuple[str, ...]:
    """The command of the compiler, nothing if there is none."""
    if wanted := shlex.split(os.environ.get("CXX", "")):
        path = shutil.which(wanted[0])
        return (path, *wanted[1:]) if path else ()
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return (path,)
    return ()


def _with_includes(source: Path) -> list[Path]:
    """The file, and those that it includes by their paths."""
    found = [source]
    for name in re.findall(r'^#include "(.+)"', source.read_text(encoding="utf-8"), re.MULTILINE):
        found += _with_includes((source.parent / name).resolve())
    return found


def _key(source: Path, header: Path, command: list[str], torch_version: str) -> str:
    version = _run(*_compiler(), "--version")
    digest = hashlib.sha256()
    for part in (
        *(path.read_bytes() for path in (*_with_includes(source), header)),
        torch_version.encode(),
        shlex.join(command).encode(),
        version.encode(),
        _instruction_set().encode(),
    ):
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:20]


def _instruction_set(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What this CPU can execute: in a shared home the next machine may lack it."""
    with contextlib.suppress(OSError):
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            # Of x86, Arm, s390x, RISC-V and POWER.
            if name.strip() in ("flags", "Features", "features", "isa", "cpu"):
                return f"{platform.machine()} {' '.join(sorted(value.split()))}"
    model = platform.processor()
    if sys.platform == "darwin":
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            model = _run("sysctl", "-n", "machdep.cpu.brand_string")
    return f"{platform.machine()} {model}"


def _torch_version() -> str:
    import torch

    return torch.__version__


@functools.cache
def _parallel_for():
    import torch

    suffix = "dylib" if sys.platform == "darwin" else "so"
    path = Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{suffix}"
    try:
        return ctypes.CDLL(str(path)).torch_parallel_for
    except (OSError, AttributeError):
        return None


def _explain(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        output = (error.stderr or error.stdout or "").strip().splitlines()
        return f"{shlex.join(error.cmd[:1])} exited with {error.returncode}: " + " | ".join(
            output[:3]
        )
    return str(error)
