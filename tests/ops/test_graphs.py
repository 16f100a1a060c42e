"""torch.compile and torch.export see one node per scan, for any length and with its gradient."""

import pytest
import torch
from torch import nn

from modules.mamba import Mamba
from ops.causal_conv1d import causal_conv1d_fn
from ops.selective_scan import selective_scan_fn
from tests.ops.scans import FAST, random_inputs, relative_error, run, with_gradients

on_cpu = pytest.mark.parametrize(
    "backend", [name for name in FAST if name not in ("triton", "mamba_ssm")]
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@on_cpu
def test_a_compiled_scan_equals_the_eager_one(backend):
    inputs = random_inputs(70)
    lengths = torch.tensor([70, 0, 33])
    compiled = torch.compile(selective_scan_fn, backend="aot_eager", fullgraph=True)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    y, last_state = compiled(
        **leaves, delta_softplus=True, return_last_state=True, lengths=lengths, reverse=True,
        reset_every=30, backend=backend,
    )  # fmt: skip
    found = with_gradients(y, last_state, leaves)
    wanted = run(backend, inputs, lengths=lengths, reverse=True, reset_every=30)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=1e-6)


@on_cpu
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_compiled_mixer_equals_the_eager_one(backend, bidirectional):
    torch.manual_seed(0)
    mixer = Mamba(16, bidirectional=bidirectional, backend=backend)
    compiled = torch.compile(mixer, backend="aot_eager", fullgraph=True)
    lengths = torch.tensor([21, 12])

    def results(function):
        mixer.zero_grad()
        x = torch.linspace(-1, 1, 2 * 21 * 16).view(2, 21, 16).requires_grad_()
        y = function(x, lengths)
        y.square().sum().backward()
        return [y.detach(), x.grad, *(p.grad for p in mixer.parameters())]

    for found, wanted in zip(results(compiled), results(mixer), strict=True):
        assert relative_error(found, wanted) < 1e-5


@on_cpu
def test_operators_pass_torchs_own_checks(backend):
    inputs = random_inputs(9, batch=2, dim=3, state=2)
    if backend == "torch":
        inputs = {name: x.double() for name, x in inputs.items()}
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.calls = []

        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            if function.namespace == "mamba_asr":
                self.calls.append((function, arguments))
            return function(*arguments, **(options or {}))

    with Recorder() as recorder:
        selective_scan_fn(
            **leaves, delta_softplus=True, lengths=torch.tensor([9, 4]), backend=backend
        )
    ((operator, arguments),) = recorder.calls
    arguments = tuple(
        x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x
        for x in arguments
    )
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(operator, arguments, test_utils=checks)


class Encoder(nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.mixer = Mamba(16, bidirectional=True, backend=backend)

    def forward(self, x, lengths):
        return x + self.mixer(x, lengths)


@on_cpu
def test_an_export_holds_one_node_per_scan_for_any_length(backend):
    encoder = Encoder(backend).eval()
    time = torch.export.Dim("time", min=2, max=4000)
    example = (torch.randn(2, 50, 16), torch.tensor([50, 20]))
    program = torch.export.export(
        encoder, example, dynamic_shapes={"x": {1: time}, "lengths": None}
    )
    targets = [str(node.target) for node in program.graph.nodes]
    scans = [name for name in targets if "selective_scan" in name]
    assert 1 <= len(scans) <= 2
    x, lengths = torch.randn(2, 131, 16), torch.tensor([131, 77])
    torch.testing.assert_close(
        program.module()(x, lengths), encoder(x, lengths), rtol=1e-5, atol=1e-5
    )


@on_cpu
def test_a_compiled_convolution_equals_the_eager_one(backend):
    x, weight = torch.randn(2, 4, 20, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    compiled = torch.compile(causal_conv1d_fn, backend="aot_eager", fullgraph=True)
    found = compiled(x, weight, activation="silu", reverse=True, backend=backend)
    wanted = causal_conv1d_fn(x, weight, activation="silu", reverse=True, backend=backend)
    torch.testing.assert_close(found, wanted)
    for one, other in zip(
        torch.autograd.grad(found.sum(), (x, weight)),
        torch.autograd.grad(wanted.sum(), (x, weight)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@on_cpu
def test_gradients_have_the_layout_that_the_graph_was_told(backend):
    inputs = random_inputs(9, constant="BC")
    for name in ("A", "B", "C"):
        inputs[name] = inputs[name].t().contiguous().t()
    inputs["initial_state"] = inputs["initial_state"].transpose(1, 2).contiguous().transpose(1, 2)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    compiled = torch.compile(selective_scan_fn, backend="inductor", fullgraph=True)
    y, last_state = compiled(**leaves, delta_softplus=True, return_last_state=True, backend=backend)
    found = with_gradients(y, last_state, leaves)
    for name, wanted in run(backend, inputs).items():
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=1e-5)


@on_cpu
def test_a_chunk_wise_mixer_exports_with_free_time(backend):
    class ChunkWise(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mixer = Mamba(8, bidirectional=True, backend=backend)

        def forward(self, x):
            return self.mixer(x, chunk_size=8)

    layer = ChunkWise().eval()
    time = torch.export.Dim("time", min=2, max=4000)
    program = torch.export.export(layer, (torch.randn(1, 20, 8),), dynamic_shapes={"x": {1: time}})
    for frames in (3, 8, 61):
        x = torch.randn(1, frames, 8)
        torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-5, atol=1e-5)
