"""Stands in for a GPU where there is none: Triton's kernels are specialised, never launched.

All that a host does for a launch is done, up to the call of the driver.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any
from unittest.mock import patch

import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel, make_backend
from triton.runtime import driver

import ops.causal_conv1d.triton as convolution
import ops.selective_scan.triton as scan
from ops import checks, dropout, triton_launcher
from ops.backends import OVERRIDE
from ops.causal_conv1d import triton_kernels
from ops.mamba_inner import dispatch, fused_triton
from ops.selective_scan import triton_launch

ABSENT_GPU = 0
# Multiprocessors of an H100 or H200.
MULTIPROCESSORS = 132

KERNELS: dict[ModuleType, tuple[str, ...]] = {
    triton_launch: (
        "selective_scan_forward_kernel",
        "selective_scan_backward_kernel",
        "selective_scan_ends_kernel",
        "pack_projections_kernel",
    ),
    triton_kernels: ("causal_conv1d_forward_kernel", "causal_conv1d_backward_kernel"),
    fused_triton: (
        "prepare_parameters_kernel",
        "collect_projections_kernel",
        "collect_parameters_kernel",
    ),
}
"""The modules that launch, and what."""


class AbsentGpu:
    """Stands for Triton's driver: there is nothing to launch anything on."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return ABSENT_GPU

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


class _Compiled(CompiledKernel):
    """What Triton would have compiled: a launch of it ends before the driver's."""

    def __init__(self, source: Any, launch: Callable[..., None]):
        self.src, self.name, self._run = source, source.name, launch
        self.module = self.function = self.packed_metadata = True

    def __del__(self) -> None:
        """There is nothing to unload."""


class Unlaunched:
    """Watches a kernel, which is specialised as for a GPU; keeps what is to be compiled.

    Attributes:
        variants: source, target and options of every specialisation.
        launches: how often it would have been launched.
    """

    def __init__(self, kernel: Any):
        self.kernel = kernel
        self.variants: list[tuple] = []
        self.forget()

    @property
    def name(self) -> str:
        return self.kernel.__name__

    def forget(self) -> None:
        self.variants.clear()
        self.launches = 0
        triton_launcher.forget()
        self.kernel.device_caches.clear()
        # Its first use, which sets what compiles it.
        _ = self.kernel.device_caches[ABSENT_GPU]
        self.kernel.compile = self._keep

    def _keep(self, source, target, options, **_):
        self.variants.append((source, target, options))
        return _Compiled(source, self._launch)

    def _launch(self, *_: Any) -> None:
        self.launches += 1

    def compile_wholly(self) -> Iterator[Any]:
        """Every variant as machine code."""
        for source, target, options in self.variants:
            yield triton.compile(source, target=target, options=options)

    def compile_partly(self) -> Iterator[Any]:
        """Every variant in Triton's own intermediate language."""
        for source, target, options in self.variants:
            backend = make_backend(target)
            options = backend.parse_options(options)
            context = ir.context()
            ir.load_dialects(context)
            backend.load_dialects(context)
            generation = backend.get_codegen_implementation(options)
            yield source.make_ir(target, options, generation, backend.get_module_map(), context)


@contextlib.contextmanager
def absent_gpu(capability: int) -> Iterator[dict[str, Unlaunched]]:
    """Within it the Triton backends take tensors of the CPU for those of a GPU.

    Nothing is computed, results are uninitialised memory. Gives the kernels by name.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, {OVERRIDE: "triton"}))
        # What is faster on a CPU than torch's.
        stack.enter_context(patch.object(dropout, "fits", lambda _: False))
        stack.enter_context(patch.object(checks, "is_on_cpu", lambda _: False))
        # A mode that counts is to see what runs without it.
        stack.enter_context(patch.object(dispatch, "is_observed", lambda _: False))
        for module in (scan, convolution):
            stack.enter_context(patch.object(module, "interpreted", lambda: True))
            stack.enter_context(patch.object(module, "unavailable", lambda: None))
        stack.enter_context(
            patch.object(triton_launch, "num_multiprocessors", lambda _: MULTIPROCESSORS)
        )
        previous = driver._active
        driver.set_active(AbsentGpu(capability))
        stack.callback(setattr, driver, "_active", previous)
        kernels = {}
        stack.callback(triton_launcher.forget)
        for module, names in KERNELS.items():
            for name in names:
                kernels[name] = Unlaunched(getattr(module, name))
                stack.callback(kernels[name].kernel.device_caches.clear)
        yield kernels


def launches(kernels: dict[str, Unlaunched]) -> Counter[str]:
    """How often each would have been launched."""
    return Counter({name: kernel.launches for name, kernel in kernels.items()})
