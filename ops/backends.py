"""Chooses who computes an operation: the caller, the environment, or what is fastest here."""

from __future__ import annotations

import functools
import logging
import os
from types import ModuleType

import torch

from ops.checks import is_transformed

logger = logging.getLogger(__name__)

OVERRIDE = "MAMBA_ASR_SCAN"
OVERRIDE_VALUES = ("auto", "reference", "torch", "cpu", "triton", "mamba_ssm")


def override() -> str:
    """What the environment names instead of ``auto``, or ``auto``; it may be no backend at all."""
    return os.environ.get(OVERRIDE) or "auto"


class Backends:
    """The backends of one operation, each a module with ``unavailable`` and ``unsupported``.

    Args:
        operation: name of the operation, for messages.
        modules: the backends by name.
        preference: names in descending order of speed, by device type; ``None`` is any other
            device.
    """

    def __init__(
        self,
        operation: str,
        modules: dict[str, ModuleType],
        preference: dict[str | None, tuple[str, ...]],
    ):
        self.operation = operation
        self.modules = modules
        self.names = tuple(modules)
        self._preference = preference
        self._announced: set[tuple[str, str]] = set()

    def module(self, name: str) -> ModuleType:
        """The module of backend ``name``.

        Raises:
            ValueError: no such backend; the message lists those there are.
        """
        if name not in self.modules:
            raise ValueError(
                f"unknown {self.operation} backend {name!r}; wanted auto, {', '.join(self.names)}"
            )
        return self.modules[name]

    def name(self, module: ModuleType) -> str:
        """What a module that `choose` returned is called."""
        return next(name for name, loaded in self.modules.items() if loaded is module)

    def order(self, device_type: str) -> tuple[str, ...]:
        """Names that ``auto`` tries on a device, fastest first."""
        return self._preference.get(device_type, self._preference[None])

    def choose(self, requested: str, device: torch.device, arguments: tuple) -> ModuleType:
        """The module that computes this call.

        A backend asked for by name must be able to; ``auto`` takes what the environment variable
        MAMBA_ASR_SCAN names, or else the fastest backend that can. A call which the named backend
        does not support, while it does work here, goes to the fastest with one warning.

        Raises:
            ValueError: the backend does not exist, cannot be used here, or, named by the caller,
                does not support the call.
        """
        named = self.named(requested)
        if named is not None:
            reason = self._unsupported(named, arguments)
            if reason is None:
                return self.modules[named]
            if requested != "auto":
                raise ValueError(
                    f"{self.operation} backend {named} does not support this call: {reason}"
                )
            self._announce(logging.WARNING, f"{OVERRIDE}={named} does not fit a call: {reason}")
        for name in self.order(device.type):
            module = self.module(name)
            if self._unsupported(name, arguments) is not None:
                continue
            reason = obstacle(module)
            if reason is None:
                self._announce(logging.INFO, f"backend {name} on {device.type}")
                return module
            if not torch.compiler.is_compiling():
                _tell_what_is_missing(name, reason)
        raise ValueError(f"no {self.operation} backend takes this call on {device}")

    def named(self, requested: str) -> str | None:
        """The backend that the caller, or in place of ``auto`` the environment, asks for, if any.

        Raises:
            ValueError: it does not exist, or cannot be used here.
        """
        name, origin = requested, f"backend={requested!r}"
        if requested == "auto":
            name = override()
            origin = f"{OVERRIDE}={name}"
            if name not in OVERRIDE_VALUES:
                raise ValueError(f"{origin}; wanted one of {', '.join(OVERRIDE_VALUES)}")
            # A name that only the other operation knows leaves this one its own choice.
            if name not in self.names:
                return None
        reason = obstacle(self.module(name))
        if reason is not None:
            raise ValueError(
                f"{self.operation} backend {name} ({origin}) cannot be used here: {reason}; "
                "`python -m ops.doctor` lists what can"
            )
        return name

    def _unsupported(self, name: str, arguments: tuple) -> str | None:
        if name != "reference" and is_transformed():
            return "torch.func and forward-mode AD transform the backend reference alone"
        return self.modules[name].unsupported(arguments)

    def _announce(self, level: int, message: str) -> None:
        # A graph that is being traced has no place for a log call.
        if torch.compiler.is_compiling() or (self.operation, message) in self._announced:
            return
        self._announced.add((self.operation, message))
        logger.log(level, "%s: %s", self.operation, message)


def obstacle(module: ModuleType) -> str | None:
    """Why a backend cannot be used on this machine; one that has to be built is built for that."""
    checks = module.unavailable, getattr(module, "prepare", None)
    if checks in _passed:
        return None
    reason = next((found for check in checks if check and (found := check())), None)
    if reason is None:
        _passed.add(checks)
    return reason


# What could be used once can be used again; to ask a GPU takes long.
_passed: set[tuple] = set()


# Known while a graph is traced, which has no place for a compiler's work. This is all that
# torch.compiler.assume_constant_result does, after it has imported torch._dynamo for a second.
vars(obstacle)["_dynamo_marked_constant"] = True


@functools.cache
def _tell_what_is_missing(name: str, reason: str) -> None:
    """Once for all operations: results are the same, but they could come faster."""
    logger.warning("the %s backend is left out: %s", name, reason)
