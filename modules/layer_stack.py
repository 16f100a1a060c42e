"""Running a stack of encoder layers: layer drop, recomputation in the backward, inner outputs."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class LayerStack:
    """Mixin of the encoders: ``layers``, a closing ``norm``, and how to go through them.

    Attributes:
        layerdrop_prob: probability with which training leaves a layer out.
        gradient_checkpointing: keep each layer's input alone for the backward and recompute the
            rest. Same gradients, about one more forward of time.
    """

    layers: nn.ModuleList
    norm: nn.Module
    layerdrop_prob: float = 0.0
    gradient_checkpointing: bool = False
    training: bool

    def run_layers(
        self,
        x_BTD: Tensor,
        run_layer: Callable[[nn.Module, Tensor], Tensor],
        intermediate_layers: Collection[int] = (),
    ) -> tuple[Tensor, list[Tensor]]:
        """Applies ``run_layer(layer, x)`` for each layer in turn, then the closing norm.

        Args:
            intermediate_layers: layers, counted from 1, whose outputs are wanted as well.

        Returns:
            the output, and the wanted inner outputs in the order of depth, each through the closing
            norm as the output is.

        Raises:
            ValueError: a wanted layer does not exist.
        """
        beyond = [i for i in intermediate_layers if not 1 <= i <= len(self.layers)]
        if beyond:
            raise ValueError(
                f"intermediate_layers holds {beyond}; this encoder has layers 1 to "
                f"{len(self.layers)}."
            )
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        inner = []
        for depth, layer in enumerate(self.layers, start=1):
            if not self._dropped():
                if recompute:
                    x_BTD = checkpoint(run_layer, layer, x_BTD, use_reentrant=False)
                else:
                    x_BTD = run_layer(layer, x_BTD)
            if depth in intermediate_layers:
                inner.append(self.norm(x_BTD))
        return self.norm(x_BTD), inner

    def _dropped(self) -> bool:
        if not self.training or self.layerdrop_prob == 0.0:
            return False
        return torch.rand(()).item() < self.layerdrop_prob
