"""The encoder's part of a training step as CUDA graphs: a replay in the place of its launches.

Small batches leave a GPU waiting for the host, which launches more than a thousand kernels a step.
A graph is launched once. It is bound to a shape: batches are padded, in both axes, to one of few.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from speechbrain.utils.distributed import is_distributed_initialized
from torch import Tensor, nn

from common.errors import UserError
from modules.layer_stack import LayerStack
from modules.Transformer import ENCODERS
from modules.TransformerASR import ATTENTION_ENCODERS

Step = Callable[[Tensor, Tensor], Tensor]


class GraphedEncoder:
    """Takes the place of an encoder's ``forward`` in training.

    A shape is captured when it comes for the second time. Others, everything that is no training,
    and chunks or inner outputs run as ever. What the graphs compute is what the layers compute: no
    valid frame depends on padding.

    Args:
        stack: the encoder's layers.
        max_shapes: how many shapes are captured; they share their memory.
        capture: makes the step of one shape of the layers and examples of their input.
    """

    def __init__(
        self,
        stack: LayerStack,
        max_shapes: int,
        capture: Callable[[nn.Module, tuple[Tensor, Tensor]], Step],
    ):
        self.stack = stack
        self.max_shapes = max_shapes
        self.capture = capture
        self.plain = stack.forward
        self.steps: dict[tuple[int, int], Step] = {}
        self.seen: Counter[tuple[int, int]] = Counter()

    def __call__(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        pos_embs: Tensor | None = None,
        dynchunktrain_config: Any = None,
        intermediate_layers: Collection[int] = (),
    ) -> tuple[Tensor, list[Tensor]]:
        """As ``LayerStack.forward``."""
        padding_BT = src_key_padding_mask
        others = (src_mask, pos_embs, dynchunktrain_config, intermediate_layers or None)
        if not (self.stack.training and torch.is_grad_enabled()) or any(
            other is not None for other in others
        ):
            return self.plain(
                src, src_mask, padding_BT, pos_embs, dynchunktrain_config, intermediate_layers
            )
        batch, frames, _ = src.shape
        if padding_BT is None:
            padding_BT = torch.zeros(batch, frames, dtype=torch.bool, device=src.device)
        shape = rounded_up(batch), rounded_up(frames)
        step = self._step(shape, src)
        if step is None:
            return self.plain(src, src_key_padding_mask=padding_BT)
        more = shape[0] - batch, shape[1] - frames
        x_BTD = F.pad(src, (0, 0, 0, more[1], 0, more[0]))
        padding_BT = F.pad(padding_BT, (0, more[1], 0, more[0]), value=True)
        return step(x_BTD, padding_BT)[:batch, :frames], []

    def _step(self, shape: tuple[int, int], src: Tensor) -> Step | None:
        self.seen[shape] += 1
        full = len(self.steps) == self.max_shapes
        if shape not in self.steps and self.seen[shape] > 1 and not full:
            x_BTD = src.new_zeros(*shape, src.shape[2]).requires_grad_()
            padding_BT = torch.zeros(shape, dtype=torch.bool, device=src.device)
            self.steps[shape] = self.capture(_Layers(self.plain, self.stack), (x_BTD, padding_BT))
        return self.steps.get(shape)


class _Layers(nn.Module):
    """A module of its own for every shape: what captures it replaces its ``forward``."""

    def __init__(self, plain: Callable, stack: LayerStack):
        super().__init__()
        self.plain, self.stack = plain, stack

    def forward(self, x_BTD: Tensor, padding_BT: Tensor) -> Tensor:
        return self.plain(x_BTD, src_key_padding_mask=padding_BT)[0]


class CudaCapture:
    """Captures steps as CUDA graphs in one pool of memory: one of them runs at a time.

    Args:
        dtype: of autocast.
    """

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, layers: nn.Module, example: tuple[Tensor, Tensor]) -> Step:
        """A step whose forward and backward are replays."""
        random_state = torch.cuda.get_rng_state()
        # Weights cached by autocast would be freed when the step ends.
        enabled = self.dtype != torch.float32
        with torch.autocast("cuda", self.dtype, enabled=enabled, cache_enabled=False):
            step = torch.cuda.make_graphed_callables(layers, example, pool=self.pool)
        torch.cuda.set_rng_state(random_state)
        return step


def rounded_up(count: int) -> int:
    """The next of eight numbers to the octave; small ones stay.

    >>> [rounded_up(count) for count in (1, 15, 17, 100, 1000)]
    [1, 15, 18, 104, 1024]
    """
    grain = 1 << max(count.bit_length() - 4, 0)
    return -(-count // grain) * grain


def check_graphs(hparams: Any, options: Any) -> None:
    """Whether ``cuda_graphs`` fits the rest of what was asked for.

    Args:
        hparams: of the recipe.
        options: run options: device, grad_accumulation_factor, compile.

    Raises:
        UserError: it does not.
    """
    encoder = hparams.encoder_module
    able = ", ".join(name for name in ENCODERS if name not in ATTENTION_ENCODERS)
    reasons = [
        (
            torch.device(options.device).type != "cuda",
            f"the device is {options.device}; it needs CUDA",
        ),
        (
            encoder in ATTENTION_ENCODERS,
            f"encoder_module is {encoder}; encoders that attend are not captured, {able} are",
        ),
        (is_distributed_initialized(), "torchrun has started several processes; it works in one"),
        (
            options.grad_accumulation_factor > 1,
            "grad_accumulation_factor is above 1; a captured step has room for the gradients of "
            "one batch: set it 1",
        ),
        (options.compile, "--compile makes graphs of its own; leave one of them out"),
        (hparams.gradient_checkpointing, "gradient_checkpointing runs layers twice; set it False"),
        (
            getattr(hparams.Transformer.encoder, "layerdrop_prob", 0.0) > 0,
            "layerdrop_prob leaves out other layers in every step; set it 0",
        ),
    ]
    for applies, reason in reasons:
        if applies:
            raise UserError(f"cuda_graphs is {hparams.cuda_graphs}, but {reason}.")
