"""Launches Triton kernels again without looking anew for what was compiled.

For every launch Triton works out what to specialise a kernel to, and searches for it: some 25
microseconds of a host that a small network keeps waiting. What decides over that, types, alignment
and values of arguments, is the key to the compiled kernel here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.runtime import JITFunction

# Lengths are among the keys: those of long trainings must not pile up.
_MOST = 4096
_compiled: dict[tuple, tuple[Any, tuple]] = {}


def launcher(kernel: Any, grid: tuple[int, int, int]) -> Callable[..., None]:
    """``kernel[grid]``: takes the run-time arguments by position and the constants by name.

    Of an interpreted kernel, or what stands for one, exactly that.
    """
    if type(kernel) is not JITFunction:
        return kernel[grid]
    return functools.partial(_launch, kernel, grid)


def _launch(kernel: JITFunction, grid: tuple[int, int, int], *arguments, **options) -> None:
    key: list = [id(kernel), torch.cuda.current_device(), *options.values()]
    _describe(arguments, key)
    found = _compiled.get(tuple(key))
    if found is not None:
        compiled, constants = found
        compiled[grid](*arguments, *constants)
        return
    compiled = kernel[grid](*arguments, **options)
    if len(_compiled) >= _MOST:
        _compiled.clear()
    if compiled is not None:
        _compiled[tuple(key)] = compiled, constants_of(kernel, arguments, options)


def forget() -> None:
    """Look for every kernel anew."""
    _compiled.clear()


def constants_of(kernel: JITFunction, arguments: tuple, options: dict[str, Any]) -> tuple:
    """What follows ``arguments`` in the kernel's signature."""
    return tuple(options[name] for name in kernel.arg_names[len(arguments) :])


def _describe(arguments: tuple, description: list) -> None:
    """Adds all that Triton specialises a kernel to, and then some: all of every number."""
    for x in arguments:
        if isinstance(x, Tensor):
            description.append(x.dtype)
            description.append(x.data_ptr() % 16)
        elif isinstance(x, tuple):
            _describe(x, description)
        else:
            description.append(x)
