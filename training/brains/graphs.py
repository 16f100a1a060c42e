"""Front end and encoder in training as CUDA graphs: replays in the place of their launches.

Small batches leave a GPU waiting for the host, which launches more than a thousand kernels a step.
A graph is launched once. It is bound to a shape: batches are padded, in both axes, to one of few.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from speechbrain.utils.distributed import is_distributed_initialized
from torch import Tensor, nn

from common.errors import UserError
from modules.frontend import ConvolutionFrontEnd
from modules.layer_stack import LayerStack
from modules.Transformer import ENCODERS
from modules.TransformerASR import ATTENTION_ENCODERS
from training.brains.cast_weights import CastWeights
from training.shapes import rounded_up

Work = Callable[[], tuple[Tensor, ...]]
Record = Callable[[Work], tuple[tuple[Tensor, ...], Callable[[], None]]]
"""Does the work once and gives its results, and what does it again into the same results."""

WARM_UPS = 2
_PER_OCTAVE = 8


class GraphedCalls:
    """Calls of a module in training, replayed for the shapes that come more than once.

    A shape is captured when it comes for the second time.

    Args:
        module: whose weights the call has.
        call: ``(x, about) -> ys``, all with rows in front, ``x`` and each of ``ys`` with frames
            behind them; rows and frames that ``about`` calls padding have no effect on others.
        max_shapes: how many shapes are captured.
        record: ``CudaRecorder`` of a GPU, this module's own.
        dtype: of autocast.
    """

    def __init__(
        self,
        module: nn.Module,
        call: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
        max_shapes: int,
        record: Record,
        dtype: torch.dtype,
    ):
        self.module = module
        self.call = call
        self.max_shapes = max_shapes
        self.record = record
        self.dtype = dtype
        self.gradients = SharedGradients(module)
        self.steps: dict[tuple[int, ...], CapturedStep] = {}
        self.seen: Counter[tuple[int, ...]] = Counter()

    def __call__(self, x: Tensor, about: Tensor, filler: int) -> tuple[Tensor, ...] | None:
        """``call(x, about)`` with more rows and frames, or None where this shape is not captured.

        Args:
            filler: what ``about`` says of padding.
        """
        if not (self.module.training and torch.is_grad_enabled()):
            return None
        (batch, frames), rest = x.shape[:2], x.shape[2:]
        shape = rounded_up(batch, _PER_OCTAVE), rounded_up(frames, _PER_OCTAVE), *rest
        more = shape[0] - batch, shape[1] - frames
        padded = F.pad(about, (0, more[1]) * (about.dim() - 1) + (0, more[0]), value=filler)
        step = self._step(shape, x, padded)
        if step is None:
            return None
        padded_x = F.pad(x, (0, 0) * len(rest) + (0, more[1], 0, more[0]))
        return _Replayed.apply(padded_x, padded, step.anchor, step)

    def _step(self, shape: tuple[int, ...], x: Tensor, about: Tensor) -> CapturedStep | None:
        self.seen[shape] += 1
        full = len(self.steps) == self.max_shapes
        if shape not in self.steps and self.seen[shape] > 1 and not full:
            memory = x.new_zeros(shape).requires_grad_(x.requires_grad)
            # What dropout draws depends on the place in the run alone.
            with torch.random.fork_rng([x.device] if x.is_cuda else []):
                self.steps[shape] = CapturedStep(self, memory, about.clone())
        return self.steps.get(shape)


class GraphedEncoder:
    """Takes the place of an encoder's ``forward`` in training.

    Shapes that are not captured, everything that is no training, and chunks or inner outputs run as
    ever. What the graphs compute is what the layers compute: no valid frame depends on padding.

    Args:
        stack: the encoder's layers.
        inner_layers: whose outputs training wants, too.
        Others as in ``GraphedCalls``.
    """

    def __init__(
        self,
        stack: LayerStack,
        max_shapes: int,
        record: Record,
        dtype: torch.dtype = torch.float32,
        inner_layers: Collection[int] = (),
    ):
        self.plain = plain = stack.forward
        self.inner_layers = tuple(inner_layers)

        def call(x_BTD: Tensor, padding_BT: Tensor) -> tuple[Tensor, ...]:
            out_BTD, inner = plain(
                x_BTD, src_key_padding_mask=padding_BT, intermediate_layers=inner_layers
            )
            return out_BTD, *inner

        self.calls = GraphedCalls(stack, call, max_shapes, record, dtype)

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
        others = (src_mask, pos_embs, dynchunktrain_config)
        outputs = None
        as_captured = tuple(intermediate_layers) == self.inner_layers
        if as_captured and all(other is None for other in others):
            padding_BT = src_key_padding_mask
            if padding_BT is None:
                padding_BT = torch.zeros(src.shape[:2], dtype=torch.bool, device=src.device)
            outputs = self.calls(src, padding_BT, filler=1)
        if outputs is None:
            return self.plain(
                src,
                src_mask,
                src_key_padding_mask,
                pos_embs,
                dynchunktrain_config,
                intermediate_layers,
            )
        out_BTD, *inner = (output[: src.shape[0], : src.shape[1]] for output in outputs)
        return out_BTD, inner


class GraphedFrontEnd:
    """Takes the place of a front end's ``forward`` in training.

    Args:
        front_end: features to fewer frames.
        Others as in ``GraphedCalls``.
    """

    def __init__(
        self,
        front_end: ConvolutionFrontEnd,
        max_shapes: int,
        record: Record,
        dtype: torch.dtype = torch.float32,
    ):
        self.plain = plain = front_end.forward
        self.out_frames = front_end.out_frames

        def call(feats_BTM: Tensor, num_frames_B: Tensor) -> tuple[Tensor, ...]:
            return (plain(feats_BTM, num_frames_B),)

        self.calls = GraphedCalls(front_end, call, max_shapes, record, dtype)

    def __call__(self, feats_BTM: Tensor, num_frames_B: Tensor | None = None) -> Tensor:
        """As ``ConvolutionFrontEnd.forward``."""
        outputs = None
        if num_frames_B is not None:
            outputs = self.calls(feats_BTM, num_frames_B, filler=0)
        if outputs is None:
            return self.plain(feats_BTM, num_frames_B)
        batch, frames = feats_BTM.shape[:2]
        return outputs[0][:batch, : self.out_frames(frames)]


class SharedGradients:
    """The gradients of a network, in memory that stays where it is: every graph adds to it.

    Graphs differentiate by aliases of the weights. What autograd keeps of a weight itself belongs
    to the stream of the step that used it before, which a graph must not wait for.
    """

    def __init__(self, network: nn.Module):
        self.slots = [
            (module, name)
            for module in network.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None and parameter.requires_grad
        ]
        unique = {id(module._parameters[name]): (module, name) for module, name in self.slots}
        self.parameters = [module._parameters[name] for module, name in unique.values()]
        self.aliases = [parameter.detach().requires_grad_() for parameter in self.parameters]
        self.alias_of = dict(zip(unique, self.aliases, strict=True))
        self.memory: list[Tensor] = []

    @contextmanager
    def aliased(self) -> Iterator[None]:
        """Inside, the network has the aliases of its weights."""
        own = [module._parameters[name] for module, name in self.slots]
        for (module, name), parameter in zip(self.slots, own, strict=True):
            module._parameters[name] = self.alias_of[id(parameter)]
        try:
            yield
        finally:
            for (module, name), parameter in zip(self.slots, own, strict=True):
                module._parameters[name] = parameter

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
    """Forward and backward of a call for one shape of its input.

    Args:
        calls: what is called.
        x: memory of its input, a leaf of autograd.
        about: memory of what is said of it.
    """

    def __init__(self, calls: GraphedCalls, x: Tensor, about: Tensor):
        self.call, self.dtype, self.gradients = calls.call, calls.dtype, calls.gradients
        self.x, self.about = x, about
        # Autograd goes on to what is behind the call, even where nothing before it has a gradient.
        self.anchor = torch.zeros((), device=x.device, requires_grad=True)
        half = self.dtype != torch.float32
        with self.gradients.aliased():
            self.weights = CastWeights([calls.module], self.dtype) if half else None
        self.gradients.allocate()
        self.live: tuple[Tensor, ...] | None = None
        recorder = calls.record
        with recorder.aside() if isinstance(recorder, CudaRecorder) else nullcontext():
            self.grad_outs = self._warm_up()
        self.outs, self.replay_forward = calls.record(self._forward)
        self.grad_x, self.replay_backward = calls.record(self._backward)

    def _warm_up(self) -> tuple[Tensor, ...]:
        """Compile and load what the call launches; gives zeros like its outputs."""
        for _ in range(WARM_UPS):
            grad_outs = tuple(torch.zeros_like(out) for out in self._forward())
            self._differentiate(grad_outs)
        return grad_outs

    def _forward(self) -> tuple[Tensor, ...]:
        # Weights cached by autocast would be freed when the step ends.
        autocast = torch.autocast(
            self.x.device.type, self.dtype, self.weights is not None, cache_enabled=False
        )
        cast = nullcontext() if self.weights is None else self.weights.in_place()
        with torch.enable_grad(), autocast, self.gradients.aliased(), cast:
            self.live = self.call(self.x, self.about)
        return tuple(out.detach() for out in self.live)

    def _backward(self) -> tuple[Tensor, ...]:
        grad_x, of_weights = self._differentiate(self.grad_outs)
        self.gradients.add(of_weights)
        return grad_x

    def _differentiate(
        self, grad_outs: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Gradients of the input, if it has one, and of the weights."""
        assert self.live is not None
        x = (self.x,) if self.x.requires_grad else ()
        inputs = (*x, *self.gradients.aliases)
        found = torch.autograd.grad(self.live, inputs, grad_outs, allow_unused=True)
        self.live = None
        return found[: len(x)], found[len(x) :]


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, about: Tensor, anchor: Tensor, step: CapturedStep):
        ctx.step = step
        step.x.copy_(x)
        step.about.copy_(about)
        step.replay_forward()
        return tuple(out.detach() for out in step.outs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grad_outs: Tensor):
        step = ctx.step
        step.gradients.take_place()
        torch._foreach_copy_(step.grad_outs, grad_outs)
        step.replay_backward()
        grad_x = step.grad_x[0].detach() if step.grad_x else None
        return grad_x, None, None, None


class CudaRecorder:
    """Records work as CUDA graphs on one stream, which share one pool of memory.

    That is right for steps of which one ends before another begins: what a graph leaves beside its
    results may be overwritten by the next one. So each module has a recorder of its own: the
    backward of a front end comes after all of the encoder behind it.
    """

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Inside, work goes to the stream of the graphs: autograd binds what it makes to it, and
        libraries get their memory for it."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream().wait_stream(self.stream)

    def __call__(self, work: Work) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
        """See ``Record``."""
        graph = torch.cuda.CUDAGraph()
        # The thread that pins the loader's batches goes on meanwhile.
        with torch.cuda.graph(
            graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
        ):
            results = work()
        return results, graph.replay


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
