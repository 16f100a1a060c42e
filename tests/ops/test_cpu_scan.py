"""What the compiled scan promises beyond the others: any layout and type, the same bits again."""

import concurrent.futures
import itertools

import pytest
import torch

from ops.selective_scan import bidirectional_scan_fn, cpu, selective_scan_fn
from tests.ops.scans import assert_close, in_double, random_inputs, relative_error, run, way_of

pytestmark = pytest.mark.skipif(
    cpu.unavailable() is not None, reason=f"no compiled scan: {cpu.unavailable()}"
)


def in_memory_order(x, order):
    """``x`` (batch, channel, frame) with equal values, its axes in memory as ``order`` says."""
    if order == "slice of something wider":
        wide = torch.full((x.shape[0], x.shape[2], 2 * x.shape[1] + 3), float("nan"), dtype=x.dtype)
        view = wide[..., 2 : 2 + x.shape[1]].transpose(1, 2)
    elif order == "every other frame":
        view = torch.full((*x.shape[:2], 2 * x.shape[2]), float("nan"), dtype=x.dtype)[..., ::2]
    elif order == "batch last":
        view = torch.empty(*x.shape[1:], x.shape[0], dtype=x.dtype).permute(2, 0, 1)
    elif order == "channels last":
        view = torch.empty(x.shape[0], x.shape[2], x.shape[1], dtype=x.dtype).transpose(1, 2)
    else:
        view = torch.empty(x.shape, dtype=x.dtype)
    return view.copy_(x)


ORDERS = [
    "time last",
    "channels last",
    "slice of something wider",
    "every other frame",
    "batch last",
]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dim", [16, 35])
def test_results_do_not_depend_on_the_layout(order, dim):
    inputs = random_inputs(67, dim=dim, state=16)
    options = {"lengths": torch.tensor([67, 40, 3]), "reverse": True}
    wanted = run("cpu", inputs, **options)
    sequences = ("u", "delta", "z")
    moved = {n: in_memory_order(x, order) if n in sequences else x for n, x in inputs.items()}
    moved |= {n: in_memory_order(x[:, 0], order)[:, None] for n, x in inputs.items() if n in "BC"}
    found = run("cpu", moved, **options)
    for name, expected in wanted.items():
        assert torch.equal(found[name], expected), name


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", ["u", "delta", "B", "C", "z", "A", "delta_bias"])
def test_what_is_not_a_number_shows(name, channels_last):
    inputs = random_inputs(67, dim=32, state=16, channels_last=channels_last)
    varies = inputs[name].dim() >= 3
    inputs[name][(1, ..., 3, 20) if varies else (3,)] = torch.nan
    wanted = selective_scan_fn(**inputs, delta_softplus=True, backend="reference")
    found = selective_scan_fn(**inputs, delta_softplus=True, backend="cpu")
    assert wanted.isnan().any()
    assert torch.equal(found.isnan(), wanted.isnan())


def test_layouts_and_types_may_be_mixed():
    inputs = random_inputs(35, dim=20, channels_last=True)
    types = [torch.float32, torch.bfloat16, torch.float16]
    for types_here in itertools.islice(itertools.product(types, repeat=5), 0, None, 40):
        mixed = dict(inputs)
        for name, dtype in zip(("u", "delta", "B", "C", "z"), types_here, strict=True):
            mixed[name] = inputs[name].to(dtype)
        mixed["z"] = mixed["z"].contiguous()
        leaves = {name: x.requires_grad_() for name, x in mixed.items()}
        y, last_state = selective_scan_fn(
            **leaves, delta_softplus=True, return_last_state=True, backend="cpu"
        )
        assert y.dtype == types_here[0]
        assert last_state.dtype == torch.float32
        grads = torch.autograd.grad(y.float().sum() + last_state.sum(), list(leaves.values()))
        assert [g.dtype for g in grads] == [x.dtype for x in leaves.values()]
        wanted = selective_scan_fn(
            **{name: x.detach().double() for name, x in mixed.items()},
            delta_softplus=True,
            backend="reference",
        )
        rounding = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[types_here[0]]
        assert relative_error(y.detach().double(), wanted) < rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_precision_number_is_read_and_written_exactly(dtype):
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
    u = every.view(1, 16, -1)
    # With B = 0 the scan hands on D u, rounded once more.
    zeros = torch.zeros(1, 1, u.shape[-1])
    y = selective_scan_fn(
        u, torch.zeros_like(u), -torch.ones(16, 1), zeros, zeros, torch.ones(16), backend="cpu"
    )
    finite = u.isfinite()
    assert torch.equal(y[finite], u[finite])
    # dt u = 0 inf is NaN, in the plain loop as well.
    assert not y[~finite].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_are_rounded_as_torch_rounds(dtype):
    gate = torch.cat([torch.randn(4096) * 10.0**k for k in range(-9, 6)]).view(1, 16, -1)
    ones = torch.ones_like(gate)
    zeros = torch.zeros(1, 1, gate.shape[-1])

    def gated(u):
        A, D = -torch.ones(16, 1), torch.ones(16)
        return selective_scan_fn(u, ones, A, zeros, zeros, D, gate, backend="cpu")

    assert torch.equal(gated(ones.to(dtype)), gated(ones).to(dtype))


def test_repeated_runs_give_the_same_bits():
    inputs = random_inputs(300, batch=5, dim=150, state=16, channels_last=True)
    lengths = torch.tensor([300, 1, 257, 128, 64])
    leaves = [x.requires_grad_() for x in inputs.values()]

    def call():
        y, state = selective_scan_fn(
            **inputs, delta_softplus=True, return_last_state=True, lengths=lengths, backend="cpu"
        )
        return y, state, *torch.autograd.grad(y.square().sum() + state.sum(), leaves)

    first = call()
    for _ in range(4):
        for found, wanted in zip(call(), first, strict=True):
            assert torch.equal(found, wanted)


def test_threads_change_rounding_only():
    inputs = random_inputs(200, batch=1, dim=300, state=16, channels_last=True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run("cpu", inputs)
        torch.set_num_threads(4)
        shared = run("cpu", inputs)
    finally:
        torch.set_num_threads(threads)
    assert_close(shared, alone, 1e-6)


def test_several_threads_may_scan_at_once():
    inputs = random_inputs(90, dim=40, state=16)
    wanted = run("cpu", inputs)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: run("cpu", inputs), range(8)):
            for name, expected in wanted.items():
                assert torch.equal(found[name], expected), name


def test_frames_beyond_the_length_are_not_read():
    inputs = random_inputs(40, dim=20, channels_last=True)
    lengths = torch.tensor([40, 17, 0])
    wanted = run("cpu", inputs, lengths=lengths)
    for name in ("u", "delta", "B", "C", "z"):
        for item, length in enumerate(lengths.tolist()):
            inputs[name][item, ..., length:] = float("nan")
    found = run("cpu", inputs, lengths=lengths)
    for name, expected in wanted.items():
        assert torch.equal(found[name], expected), name


def test_nothing_crosses_a_block_boundary_not_even_nan():
    inputs = random_inputs(40, dim=20)
    wanted = run("cpu", inputs, reset_every=10)
    inputs["u"][:, :, 13] = float("nan")
    found = run("cpu", inputs, reset_every=10)
    for name in ("y", "du", "ddelta"):
        for frames in (slice(0, 10), slice(20, 40)):
            assert torch.equal(found[name][..., frames], wanted[name][..., frames]), name


def test_positive_rates_and_huge_steps_stay_finite_as_long_as_the_definition_does():
    inputs = random_inputs(30, dim=16, state=16)
    inputs["A"] = inputs["A"].abs() * 0.1
    assert_close(run("cpu", inputs), in_double(inputs), 1e-5)
    inputs["A"] = -inputs["A"] * 1e4
    inputs["delta"] = inputs["delta"] + 30
    assert_close(run("cpu", inputs), in_double(inputs), 1e-5)


def test_ten_thousand_decays_near_one_do_not_drift():
    # An exponential that errs on one side by 1e-7 would be wrong by 1e-3 at the end.
    frames = 10_000
    steps = torch.rand(1, 16, frames, generator=torch.Generator().manual_seed(0)) * 2e-3
    zeros = torch.zeros(1, 1, frames)
    _, state = selective_scan_fn(
        torch.zeros_like(steps),
        steps,
        torch.full((16, 1), -0.1),
        zeros,
        zeros,
        return_last_state=True,
        initial_state=torch.ones(1, 16, 1),
        backend="cpu",
    )
    wanted = torch.exp(-0.1 * steps.double().sum(-1, keepdim=True))
    assert relative_error(state.double(), wanted) < 1e-5


@pytest.mark.parametrize(("reverse", "reset_every"), [(False, None), (True, 1500), (True, None)])
def test_long_scans_in_which_units_take_turns(reverse, reset_every):
    inputs = random_inputs(4200, batch=4, dim=5, state=3)
    options = {"lengths": torch.tensor([4200, 1792, 1793, 0]), "reverse": reverse}
    options["reset_every"] = reset_every
    assert_close(run("cpu", inputs, **options), in_double(inputs, **options), 1e-5)


@pytest.mark.parametrize("time", [75, 4200])
def test_both_directions_in_one_pass_equal_two_scans(time):
    first = random_inputs(time, dim=24, state=16, channels_last=True, seed=1)
    second = random_inputs(time, dim=24, state=16, channels_last=True, seed=2)
    for inputs in (first, second):
        del inputs["initial_state"]
    second["z"] = first["z"]
    lengths = torch.tensor([time, 32, 0])
    leaves = [x.requires_grad_() for x in (*first.values(), *second.values())]
    leaves = list({id(x): x for x in leaves}.values())
    weights = torch.randn(first["u"].shape)

    def gradients(y):
        return [y, *torch.autograd.grad((y * weights).sum(), leaves)]

    ways = way_of(first), way_of(second, reverse=True, reset_every=20)
    together = bidirectional_scan_fn(*ways, first["z"], True, lengths=lengths, backend="cpu")
    options = {"delta_softplus": True, "lengths": lengths, "backend": "reference"}
    apart = selective_scan_fn(**first, **options)
    apart = apart + selective_scan_fn(**second, reverse=True, reset_every=20, **options)
    for found, wanted in zip(gradients(together), gradients(apart / 2), strict=True):
        assert relative_error(found.double(), wanted.double()) < 1e-5


@pytest.fixture
def leaves():
    inputs = random_inputs(37, dim=20, channels_last=True)
    return {name: x.requires_grad_() for name, x in inputs.items()}


def test_operator_passes_torchs_own_checks(leaves):
    z, initial_state = leaves.pop("z"), leaves.pop("initial_state")
    operator = torch.ops.mamba_asr.selective_scan_cpu.default
    lengths = torch.tensor([37, 5, 0])
    both = [*way_of(leaves), *way_of(leaves, reverse=True, reset_every=9), z, True, lengths, True]
    leaves["initial_state"] = initial_state
    one = [*way_of(leaves, reverse=True, reset_every=8), *[None] * 10, None, False, None, True]
    torch.library.opcheck(operator, both)
    torch.library.opcheck(operator, one, test_utils=["test_schema", "test_faketensor"])


def test_compiled_code_sees_one_node_with_the_same_gradients(leaves):
    targets = []

    def record(graph, _example_inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes if "call" in node.op)
        return graph

    def call(**tensors):
        return selective_scan_fn(**tensors, delta_softplus=True, backend="cpu")

    tensors = list(leaves.values())
    wanted = torch.autograd.grad(call(**leaves).square().sum(), tensors)
    torch._dynamo.reset()
    y = torch.compile(call, backend=record, fullgraph=True)(**leaves)
    found = torch.autograd.grad(y.square().sum(), tensors)
    assert [name for name in targets if "mamba_asr" in name] == [
        "mamba_asr.selective_scan_cpu.default"
    ]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_an_export_with_free_time_holds_one_node():
    class Scan(torch.nn.Module):
        def forward(self, u, delta, A, B, C):
            return selective_scan_fn(u, delta, A, B, C, delta_softplus=True, backend="cpu")

    def arguments(frames):
        inputs = random_inputs(frames, dim=20, channels_last=True)
        return tuple(inputs[name] for name in ("u", "delta", "A", "B", "C"))

    time = {2: torch.export.Dim("time", min=2, max=4000)}
    along = {3: time[2]}
    program = torch.export.export(
        Scan(), arguments(33), dynamic_shapes=(time, time, None, along, along)
    )
    names = [str(node.target) for node in program.graph.nodes]
    assert sum("selective_scan_cpu" in name for name in names) == 1
    for frames in (2, 100):
        found = program.module()(*arguments(frames))
        assert torch.equal(found, Scan()(*arguments(frames)))


@pytest.mark.parametrize("dim", [9, 16, 35])
def test_expanded_inputs_are_read_as_their_copies_are(dim):
    """One value for all channels or all states, without memory for each: a stride of 0."""
    inputs = random_inputs(67, dim=dim, state=3)
    for names in (("u",), ("delta", "z"), ("B", "C"), ("u", "B")):
        moved = dict(inputs)
        for name in names:
            axis = 2 if name in "BC" else 1
            moved[name] = inputs[name].narrow(axis, 0, 1).expand_as(inputs[name])
            assert moved[name].stride(axis) == 0
        copies = {name: x.contiguous() for name, x in moved.items()}
        assert_close(run("cpu", moved), run("cpu", copies), 1e-6)


def test_no_channels_are_legal():
    inputs = random_inputs(5, dim=0)
    y = selective_scan_fn(**inputs, delta_softplus=True, backend="cpu")
    assert y.shape == (3, 0, 5)
