"""Launches Triton kernels without working out anew what was worked out before.

For every launch Triton works out what to specialise a kernel to, and searches for it: some 25
microseconds of a host that a small network keeps waiting. What shapes decide is a `Plan`, made once
for each; with types, strides and alignment of the pointers it is the key to the compiled kernel.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.runtime import JITFunction

# Lengths are among the keys: those of long trainings must not pile up.
_MOST = 4096
_compiled: dict[tuple, tuple[Any, tuple]] = {}


class Plan:
    """Launches of a kernel that differ in their pointers alone, on one device; kept by who plans.

    Args:
        grid: programs along each axis.
        numbers: the run-time arguments that follow the pointers.
        constants: compile-time arguments and options of the compiler.
    """

    def __init__(self, grid: tuple[int, int, int], numbers: tuple = (), **constants: Any):
        self.grid, self.numbers, self.constants = grid, numbers, constants


def launch(kernel: Any, plan: Plan, *pointers: Any) -> None:
    """``kernel[plan.grid](*pointers, *plan.numbers, **plan.constants)``.

    Of an interpreted kernel, or what stands for one, exactly that.

    Args:
        pointers: tensors, integers that may change from call to call, None, and tuples of these.
    """
    if type(kernel) is not JITFunction:
        kernel[plan.grid](*pointers, *plan.numbers, **plan.constants)
        return
    key = id(kernel), plan, _describe(pointers)
    found = _compiled.get(key)
    if found is not None:
        compiled, rest = found
        compiled[plan.grid](*pointers, *rest)
        return
    arguments = (*pointers, *plan.numbers)
    compiled = kernel[plan.grid](*arguments, **plan.constants)
    if len(_compiled) >= _MOST:
        _compiled.clear()
    if compiled is not None:
        constants = [plan.constants[name] for name in kernel.arg_names[len(arguments) :]]
        _compiled[key] = compiled, (*plan.numbers, *constants)


def forget() -> None:
    """Look for every kernel anew."""
    _compiled.clear()


def _describe(arguments: tuple) -> tuple:
    """All that Triton specialises a kernel to, and then some: all of every number."""
    return tuple(
        [
            x
            if x is None or type(x) is int
            else (x.dtype, x.data_ptr() % 16)
            if isinstance(x, Tensor)
            else _describe(x)
            for x in arguments
        ]
    )
