"""What the compiled convolution promises beyond the others: any layout and type, one node."""

import itertools

import pytest
import torch

from ops.causal_conv1d import causal_conv1d_fn, cpu
from tests.ops.scans import relative_error
from tests.ops.test_cpu_scan import ORDERS, in_memory_order

pytestmark = pytest.mark.skipif(
    cpu.unavailable() is not None, reason=f"no compiled convolution: {cpu.unavailable()}"
)


def random_inputs(frames, dim=20, width=4, batch=3):
    generator = torch.Generator().manual_seed(frames)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    return [
        normal(batch, dim, frames),
        normal(dim, width),
        normal(dim),
        normal(batch, dim, width - 1),
    ]


def run(backend, inputs, dtype=None, **options):
    """Output, state and the gradients of a fixed weighting of them."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    x, weight, bias, initial_state = leaves
    y, state = causal_conv1d_fn(
        x, weight, bias, "silu", initial_state=initial_state, return_last_state=True,
        backend=backend, **options,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=generator).to(x)).sum() for x in (y, state))
    return [y.detach(), state.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dim", [16, 35])
def test_results_do_not_depend_on_the_layout(order, dim):
    x, *parameters = random_inputs(131, dim)
    options = {"lengths": torch.tensor([131, 70, 2]), "reverse": True}
    wanted = run("cpu", [x, *parameters], **options)
    found = run("cpu", [in_memory_order(x, order), *parameters], **options)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 9])
def test_any_width_around_the_edges_of_tiles_and_blocks(width):
    for frames, reset_every, reverse in itertools.product(
        [1, 2, 64, 65, 130], [None, 3, 64], [False, True]
    ):
        inputs = random_inputs(frames, dim=18, width=width)
        options = {
            "lengths": torch.tensor([frames, frames // 2, 0]),
            "reset_every": reset_every,
            "reverse": reverse,
        }
        found = run("cpu", inputs, **options)
        wanted = run("torch", inputs, torch.float64, **options)
        for a, b in zip(found, wanted, strict=True):
            assert relative_error(a.double(), b) < 1e-5 or b.numel() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_and_rounded_once(dtype):
    x, *parameters = random_inputs(100)
    wide = run("cpu", [x.to(dtype).float(), *parameters])
    found = run("cpu", [x.to(dtype), *parameters])
    assert found[0].dtype == found[2].dtype == dtype
    assert torch.equal(found[0], wide[0].to(dtype))


def test_repeated_runs_give_the_same_bits():
    inputs = random_inputs(500, dim=150)
    first = run("cpu", inputs)
    for _ in range(3):
        for a, b in zip(run("cpu", inputs), first, strict=True):
            assert torch.equal(a, b)


def test_padding_is_not_read_and_taps_end_at_blocks():
    x, *parameters = random_inputs(40)
    options = {"lengths": torch.tensor([40, 17, 0]), "reset_every": 10}
    wanted = run("cpu", [x, *parameters], **options)
    poisoned = x.clone()
    for item, length in enumerate([40, 17, 0]):
        poisoned[item, :, length:] = float("nan")
    for a, b in zip(run("cpu", [poisoned, *parameters], **options), wanted, strict=True):
        assert torch.equal(a, b)
    poisoned[0, :, 13] = float("inf")
    y = run("cpu", [poisoned, *parameters], **options)[0]
    assert torch.equal(y[0, :, :10], wanted[0][0, :, :10])
    assert torch.equal(y[0, :, 20:], wanted[0][0, :, 20:])


def test_operator_passes_torchs_own_checks():
    x, weight, bias, initial_state = (x.requires_grad_() for x in random_inputs(20))
    operator = torch.ops.mamba_asr.causal_conv1d_cpu.default
    lengths = torch.tensor([20, 3, 0])
    torch.library.opcheck(operator, (x, weight, bias, "silu", lengths, True, None, 7, True))
    torch.library.opcheck(operator, (x, weight, None, None, None, False, initial_state, None, True))


def test_an_export_with_free_time_holds_one_node():
    class Convolution(torch.nn.Module):
        def forward(self, x, weight):
            return causal_conv1d_fn(x, weight, activation="silu", backend="cpu")

    free = ({2: torch.export.Dim("time", min=2, max=4000)}, None)
    program = torch.export.export(Convolution(), tuple(random_inputs(33)[:2]), dynamic_shapes=free)
    names = [str(node.target) for node in program.graph.nodes]
    assert sum("causal_conv1d_cpu" in name for name in names) == 1
    other = tuple(random_inputs(70)[:2])
    assert torch.equal(program.module()(*other), Convolution()(*other))
