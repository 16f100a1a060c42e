"""The exponential moving average of a model's weights, which is what is evaluated."""

import torch
from speechbrain.utils import checkpoints
from torch import nn


@checkpoints.register_checkpoint_hooks
class WeightAverage:
    """Follows the parameters of a model, step by step.

    The weights that a run begins with are worth nothing: the decay of step ``n`` is at most
    ``(1 + n) / (10 + n)``.

    Args:
        model: whose parameters are averaged. Modules around it may change, it itself must not.
        decay: what a step leaves of the average, above 0 and below 1.

    Paper: Polyak and Juditsky, 1992; the decay of the first steps is TensorFlow's.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = model
        self.decay = decay
        self.parameters = list(model.parameters())
        self.averages = [p.detach().clone() for p in self.parameters]
        self.average_of = dict(zip(map(id, self.parameters), self.averages, strict=True))
        self.is_in_model = False

    @torch.no_grad()
    def reset(self) -> None:
        """Begin anew with the weights that the model has."""
        torch._foreach_copy_(self.averages, self.parameters)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow optimiser step number ``step``, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.averages, self.parameters, 1 - decay)

    def put_in(self) -> None:
        """Let the model have the averages; ``take_out`` gives it its own weights back."""
        if not self.is_in_model:
            self._swap()

    def take_out(self) -> None:
        """Let the model have its own weights, as it may have them already."""
        if self.is_in_model:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        own = [p.detach().clone() for p in self.parameters]
        torch._foreach_copy_(self.parameters, self.averages)
        torch._foreach_copy_(self.averages, own)
        self.is_in_model = not self.is_in_model

    @checkpoints.mark_as_saver
    def _save(self, path):
        """A state of the model with the averages in the place of its parameters."""
        state = self.model.state_dict()
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            state[name] = self.average_of[id(parameter)]
        torch.save(state, path)

    @checkpoints.mark_as_loader
    @torch.no_grad()
    def _load(self, path, end_of_epoch=False):
        del end_of_epoch
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, parameter in self.model.named_parameters():
            self.average_of[id(parameter)].copy_(state[name])
