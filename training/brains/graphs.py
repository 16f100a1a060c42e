"""The encoder's part of a training step as CUDA graphs: a replay in the place of its launches.

Small batches leave a GPU waiting for the host, which launches more than a thousand kernels a step.
A graph is launched once. It is bound to a shape: batches are padded, in both axes, to one of few.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from speechbrain.utils.distributed import is_distributed_initialized
from torch import Tensor, nn

from common.errors import UserError
from modules.layer_stack import LayerStack
from modules.Transformer import ENCODERS
from modules.TransformerASR import ATTENTION_ENCODERS
from training.brains.cast_weights import CastWeights

Work = Callable[[], tuple[Tensor, ...]]
Record = Callable[[Work], tuple[tuple[Tensor, ...], Callable[[], None]]]
"""Does the work once and gives its results, and what does it again into the same results."""

WARM_UPS = 2


class GraphedEncoder:
    """Takes the place of an encoder's ``forward`` in training.

    A shape is captured when it comes for the second time. Others, everything that is no training,
    and chunks or inner outputs run as ever. What the graphs compute is what the layers compute: no
    valid frame depends on padding.

    Args:
        stack: the encoder's layers.
        max_shapes: how many shapes are captured.
        record: ``CudaRecorder`` of a GPU.
        dtype: of autocast.
    """

    def __init__(
        self, stack: LayerStack, max_shapes: int, record: Record, dtype: torch.dtype = torch.float32
    ):
        self.stack = stack
        self.max_shapes = max_shapes
        self.record = record
        self.dtype = dtype
        self.plain = stack.forward
        self.gradients = SharedGradients(stack)
        self.steps: dict[tuple[int, int], CapturedStep] = {}
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
        return _Replayed.apply(x_BTD, padding_BT, step)[:batch, :frames], []

    def _step(self, shape: tuple[int, int], src: Tensor) -> CapturedStep | None:
        self.seen[shape] += 1
        full = len(self.steps) == self.max_shapes
        if shape not in self.steps and self.seen[shape] > 1 and not full:
            x_BTD = src.new_zeros(*shape, src.shape[2]).requires_grad_()
            # What dropout draws depends on the place in the run alone.
            with torch.random.fork_rng([src.device] if src.is_cuda else []):
                self.steps[shape] = CapturedStep(
                    self.plain, self.stack, x_BTD, self.gradients, self.record, self.dtype
                )
        return self.steps.get(shape)


class SharedGradients:
    """The gradients of a network, in memory that stays where it is: every graph adds to it."""

    def __init__(self, network: nn.Module):
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.memory: list[Tensor] = []

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Add to the memory; a parameter without a gradient keeps what it has."""
        pairs = [(m, g) for m, g in zip(self.memory, gradients, strict=True) if g is not None]
        torch._foreach_add_([memory for memory, _ in pairs], [gradient for _, gradient in pairs])

    def allocate(self) -> None:
        """Have memory, if there is none yet."""
        if not self.memory:
            self.memory = [torch.zeros_like(p) for p in self.parameters]

    def take_place(self) -> None:
        """Be the parameters' gradients: from zero, or from what a batch before has left."""
        if self.parameters[0].grad is self.memory[0]:
            return
        torch._foreach_zero_(self.memory)
        for parameter, memory in zip(self.parameters, self.memory, strict=True):
            if parameter.grad is not None:
                memory.copy_(parameter.grad)
            parameter.grad = memory


class CapturedStep:
    """Forward and backward of the layers for one shape of their input.

    Args:
        layers: ``LayerStack.forward``.
        stack: whose weights they have.
        x_BTD: memory of the input, a leaf of autograd.
        gradients: where those of the weights go.
        record: see ``Record``.
        dtype: of autocast.
    """

    def __init__(
        self,
        layers: Callable,
        stack: nn.Module,
        x_BTD: Tensor,
        gradients: SharedGradients,
        record: Record,
        dtype: torch.dtype,
    ):
        self.layers = layers
        self.x_BTD = x_BTD
        self.padding_BT = torch.zeros(x_BTD.shape[:2], dtype=torch.bool, device=x_BTD.device)
        self.gradients = gradients
        self.dtype = dtype
        half = dtype != torch.float32
        self.weights = CastWeights([stack], dtype) if half else None
        gradients.allocate()
        self.live_BTD: Tensor | None = None
        self.grad_out_BTD = self._warm_up()
        (self.out_BTD,), self.replay_forward = record(self._forward)
        (self.grad_x_BTD,), self.replay_backward = record(self._backward)

    def _warm_up(self) -> Tensor:
        """Compile and load what the layers launch; gives zeros like their output."""
        aside = nullcontext()
        if self.x_BTD.is_cuda:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            aside = torch.cuda.stream(stream)
        with aside:
            for _ in range(WARM_UPS):
                (out_BTD,) = self._forward()
                grad_out_BTD = torch.zeros_like(out_BTD)
                self._gradients(grad_out_BTD)
        if self.x_BTD.is_cuda:
            torch.cuda.current_stream().wait_stream(stream)
        return grad_out_BTD

    def _forward(self) -> tuple[Tensor]:
        # Weights cached by autocast would be freed when the step ends.
        autocast = torch.autocast(
            self.x_BTD.device.type, self.dtype, self.weights is not None, cache_enabled=False
        )
        cast = nullcontext() if self.weights is None else self.weights.in_place()
        with torch.enable_grad(), autocast, cast:
            self.live_BTD = self.layers(self.x_BTD, src_key_padding_mask=self.padding_BT)[0]
        return (self.live_BTD.detach(),)

    def _backward(self) -> tuple[Tensor]:
        grad_x_BTD, *gradients = self._gradients(self.grad_out_BTD)
        self.gradients.add(gradients)
        return (grad_x_BTD,)

    def _gradients(self, grad_out_BTD: Tensor) -> tuple[Tensor, ...]:
        assert self.live_BTD is not None
        inputs = (self.x_BTD, *self.gradients.parameters)
        gradients = torch.autograd.grad(self.live_BTD, inputs, grad_out_BTD, allow_unused=True)
        self.live_BTD = None
        return gradients


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BTD: Tensor, padding_BT: Tensor, step: CapturedStep) -> Tensor:
        ctx.step = step
        step.x_BTD.copy_(x_BTD)
        step.padding_BT.copy_(padding_BT)
        step.replay_forward()
        return step.out_BTD.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out_BTD: Tensor):
        step = ctx.step
        step.gradients.take_place()
        step.grad_out_BTD.copy_(grad_out_BTD)
        step.replay_backward()
        return step.grad_x_BTD.detach(), None, None


class CudaRecorder:
    """Records work as CUDA graphs that share one pool of memory.

    That is right for steps of which one ends before another begins: what a graph leaves beside its
    results may be overwritten by the next one.
    """

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
        """See ``Record``."""
        graph = torch.cuda.CUDAGraph()
        # The thread that pins the loader's batches goes on meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            results = work()
        return results, graph.replay


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
        options: run options: device, compile.

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
