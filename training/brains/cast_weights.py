"""Weights in the precision of autocast: cast once a step and all at once, not one use at a time.

Autocast casts every weight and, in the backward, every gradient of one by itself: two dozen kernel
launches of a ConMamba layer, each of which costs the host more than the GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from modules.mamba import Mamba
from modules.plain_layers import is_plain

# A mixer's kernels prepare these themselves.
_OF_A_MIXER = ("conv1d", "conv1d_b", "x_proj", "x_proj_b", "dt_proj", "dt_proj_b")


class CastWeights:
    """The weights that autocast would cast below some modules.

    Args:
        modules: networks in training.
        dtype: of autocast.
    """

    def __init__(self, modules: Iterable[nn.Module], dtype: torch.dtype):
        self.dtype = dtype
        self._slots = [slot for module in modules for slot in _slots_of(module)]
        unique = {id(module._parameters[name]): None for module, name in self._slots}
        self._place = {key: place for place, key in enumerate(unique)}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, modules have the cast weights; gradients arrive at the weights themselves."""
        own = [module._parameters[name] for module, name in self._slots]
        unique = list({id(weight): weight for weight in own}.values())
        cast = _Cast.apply(self.dtype, *unique) if unique else ()
        for (module, name), weight in zip(self._slots, own, strict=True):
            module._parameters[name] = cast[self._place[id(weight)]]  # type: ignore[assignment]
        try:
            yield
        finally:
            for (module, name), weight in zip(self._slots, own, strict=True):
                module._parameters[name] = weight


def _slots_of(network: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    spared = set()
    for module in network.modules():
        if isinstance(module, Mamba):
            spared |= {id(getattr(module, name, None)) for name in _OF_A_MIXER}
    for module in network.modules():
        if id(module) in spared or not is_plain(module):
            continue
        for name in ("weight", "bias"):
            parameter = module._parameters.get(name)
            wanted = parameter is not None and parameter.requires_grad
            if wanted and parameter.dtype == torch.float32:
                yield module, name


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        cast = [torch.empty_like(weight, dtype=dtype) for weight in weights]
        torch._foreach_copy_(cast, list(weights))
        return tuple(cast)

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        given = [grad for grad in grads if grad is not None]
        wide = [torch.empty_like(grad, dtype=torch.float32) for grad in given]
        if wide:
            torch._foreach_copy_(wide, given)
        found = iter(wide)
        return None, *(None if grad is None else next(found) for grad in grads)
