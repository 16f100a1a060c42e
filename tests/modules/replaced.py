"""Layers put around or in the place of a network's own, and the plain layers that equal them."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Adapter(nn.Module):
    """A layer and a second one of its shape beside it, as adapters are; shows the first's weights.

    Reading them, as peft's wrappers let one do, misses the second layer.
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base, self.branch = base, copy.deepcopy(base)
        for parameter in self.branch.parameters():
            nn.init.normal_(parameter, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.branch(x)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias


class QuantisedLinear(nn.Module):
    """A linear layer with weights in int8."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.scale = base.weight.detach().abs().amax() / 127
        self.weight = nn.Parameter((base.weight / self.scale).round().char(), requires_grad=False)
        self.bias = base.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias)


class DoubledWeight(Tensor):
    """A weight that counts twice in every product."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        if function not in (F.linear, F.conv1d):
            return super().__torch_function__(function, types, arguments, options)
        with torch._C.DisableTorchFunctionSubclass():
            x, weight, *others = arguments
            return function(x, 2 * weight.as_subclass(Tensor), *others, **(options or {}))


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def double_by_hook(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    return layer


def double_by_parametrization(layer: nn.Module) -> nn.Module:
    for name in [name for name, _ in layer.named_parameters()]:
        parametrize.register_parametrization(layer, name, Twice())
    return layer


def double_by_another_forward(layer: nn.Module) -> nn.Module:
    layer.forward = lambda x: 2 * type(layer).forward(layer, x)
    return layer


def double_by_special_weight(layer: nn.Module) -> nn.Module:
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(DoubledWeight))
    if layer.bias is not None:
        layer.bias.data.mul_(2)
    return layer


WAYS_TO_DOUBLE = {
    "wrapper": lambda layer: nn.Sequential(layer, Twice()),
    "hook": double_by_hook,
    "parametrization": double_by_parametrization,
    "forward": double_by_another_forward,
    "special weight": double_by_special_weight,
}
"""Layers that give twice what they would give, without a change of ``weight`` itself."""


def replace(network: nn.Module, name: str, change) -> None:
    """Puts ``change(layer)`` in the place of the layer called ``name``."""
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, change(network.get_submodule(name)))


@torch.no_grad()
def doubled(layer: nn.Module) -> nn.Module:
    """The layer with twice its weights."""
    for parameter in layer.parameters():
        parameter.mul_(2)
    return layer


@torch.no_grad()
def merged(adapter: Adapter) -> nn.Module:
    """The one layer that gives what an adapter gives."""
    layer = copy.deepcopy(adapter.base)
    for parameter, addition in zip(layer.parameters(), adapter.branch.parameters(), strict=True):
        parameter.add_(addition)
    return layer
