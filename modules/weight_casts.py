"""Under autocast, the weights of a layer cast in one go instead of one by one, there and back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from modules.mamba import Mamba

_CAST = (nn.Linear, nn.Conv1d, nn.Conv2d)
# Weights of a piece of memory begin at multiples of so many, for aligned access.
_ALIGNMENT = 64


@contextlib.contextmanager
def cast_together(layer: nn.Module, device: torch.device) -> Iterator[None]:
    """Within it linear layers and convolutions in ``layer`` have weights in autocast's type.

    Numbers and gradients are those that autocast gives, which would launch a kernel for every
    weight and another for its gradient: small layers on a GPU wait for those. Without autocast, and
    while a graph is traced, nothing happens. Mixers prepare weights by themselves.
    """
    if not torch.is_autocast_enabled(device.type) or torch.compiler.is_compiling():
        yield
        return
    places = [
        (module, name)
        for module in _modules_to_cast(layer)
        for name in ("weight", "bias")
        if type(getattr(module, name, None)) is nn.Parameter
        and getattr(module, name).dtype == torch.float32
    ]
    if not places:
        yield
        return
    dtype = torch.get_autocast_dtype(device.type)
    casts = _Cast.apply(dtype, *(getattr(module, name) for module, name in places))
    # Attributes of an instance come before its parameters, which stay where they are.
    for (module, name), cast in zip(places, casts, strict=True):
        vars(module)[name] = cast
    try:
        yield
    finally:
        for module, name in places:
            # Another thread may have been here.
            vars(module).pop(name, None)


def _modules_to_cast(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, Mamba):
        yield from (part for part in (module.in_proj, module.out_proj) if type(part) in _CAST)
        return
    if type(module) in _CAST:
        yield module
    for child in module.children():
        yield from _modules_to_cast(child)


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dtype, *weights):
        ctx.set_materialize_grads(False)
        casts = _new_together(weights, dtype)
        torch._foreach_copy_(casts, list(weights))
        return tuple(casts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        present = [grad for grad in grads if grad is not None]
        if present:
            casts = _new_together(present, torch.float32)
            torch._foreach_copy_(casts, present)
            found = iter(casts)
        return None, *(None if grad is None else next(found) for grad in grads)


def _new_together(like: tuple[Tensor, ...] | list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Uninitialised tensors of these shapes in one piece of memory."""
    sizes = [-(-x.numel() // _ALIGNMENT) * _ALIGNMENT for x in like]
    memory = like[0].new_empty(sum(sizes), dtype=dtype)
    return [
        piece[: x.numel()].view(x.shape) for x, piece in zip(like, memory.split(sizes), strict=True)
    ]
