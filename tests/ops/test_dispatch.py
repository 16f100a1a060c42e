"""Who computes a call: the caller's word, the environment's, the fastest; and what is refused."""

import logging
import re
import subprocess
import sys
import types

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from modules.mamba import Mamba
from ops import doctor
from ops.backends import Backends
from ops.causal_conv1d import causal_conv1d_fn
from ops.mamba_inner import Direction, chunk_cpu, mamba_inner_fn, mamba_inner_step
from ops.selective_scan import bidirectional_scan_fn, mamba_ssm, selective_scan_fn
from ops.selective_scan.arguments import ScanArguments, normalise
from ops.selective_scan.dispatch import BACKENDS
from tests.ops.scans import random_inputs, relative_error, way_of


def scan(**changes):
    inputs = random_inputs(6)
    arguments = {**inputs, "delta_softplus": True, **changes}
    return selective_scan_fn(**arguments)


def stub(unavailable=None, unsupported=None, failure=None):
    module = types.SimpleNamespace(
        unavailable=lambda: unavailable, unsupported=lambda *arguments: unsupported
    )
    if failure is not None:
        module.prepare = lambda: failure
    return module


@pytest.fixture
def backends(monkeypatch):
    """Three backends, fastest first: cpu, torch, reference."""
    monkeypatch.delenv("MAMBA_ASR_SCAN", raising=False)

    stubs = {name: stub() for name in ("reference", "torch", "cpu")}
    return Backends("stubs", stubs, {None: ("cpu", "torch", "reference")})


def choose(backends, requested="auto"):
    return backends.name(backends.choose(requested, torch.device("cpu"), ()))


def test_auto_takes_the_first_that_is_available_supports_the_call_and_builds(backends):
    assert choose(backends) == "cpu"
    for obstacle in ("unavailable", "unsupported", "failure"):
        backends.modules["cpu"] = stub(**{obstacle: "because"})
        assert choose(backends) == "torch"
    backends.modules["torch"] = stub(unsupported="because")
    assert choose(backends) == "reference"


def test_auto_says_once_which_it_takes(backends, caplog):
    with caplog.at_level(logging.INFO, logger="ops.backends"):
        choose(backends)
        choose(backends)
    assert [record.message for record in caplog.records] == ["stubs: backend cpu on cpu"]


def test_the_environment_overrides_auto_but_not_the_caller(backends, monkeypatch):
    monkeypatch.setenv("MAMBA_ASR_SCAN", "torch")
    assert choose(backends) == "torch"
    assert choose(backends, "reference") == "reference"
    # A name that only another operation has.
    monkeypatch.setenv("MAMBA_ASR_SCAN", "mamba_ssm")
    assert choose(backends) == "cpu"


def test_an_override_that_does_not_fit_a_call_is_reported_once(backends, monkeypatch, caplog):
    monkeypatch.setenv("MAMBA_ASR_SCAN", "torch")
    backends.modules["torch"] = stub(unsupported="it is Friday")
    assert choose(backends) == "cpu"
    assert choose(backends) == "cpu"
    warnings = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert warnings == ["stubs: MAMBA_ASR_SCAN=torch does not fit a call: it is Friday"]


def test_an_override_that_cannot_be_used_is_an_error(backends, monkeypatch):
    monkeypatch.setenv("MAMBA_ASR_SCAN", "torch")
    backends.modules["torch"] = stub(unavailable="no such machine")
    with pytest.raises(ValueError, match=r"torch \(MAMBA_ASR_SCAN=torch\).*no such machine"):
        choose(backends)
    monkeypatch.setenv("MAMBA_ASR_SCAN", "fast")
    with pytest.raises(ValueError, match="MAMBA_ASR_SCAN=fast; wanted one of auto, reference"):
        choose(backends)


def test_a_backend_asked_for_must_be_able_to(backends):
    for obstacle in ("unavailable", "unsupported", "failure"):
        backends.modules["cpu"] = stub(**{obstacle: "a reason"})
        with pytest.raises(ValueError, match=r"cpu.*a reason"):
            choose(backends, "cpu")
    with pytest.raises(ValueError, match="unknown stubs backend 'gpu'; wanted auto, reference"):
        choose(backends, "gpu")


def test_both_operations_obey_the_override(monkeypatch):
    monkeypatch.setenv("MAMBA_ASR_SCAN", "nonsense")
    with pytest.raises(ValueError, match="MAMBA_ASR_SCAN=nonsense"):
        scan()
    with pytest.raises(ValueError, match="MAMBA_ASR_SCAN=nonsense"):
        causal_conv1d_fn(torch.randn(1, 2, 3), torch.randn(2, 4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"u": torch.randn(3, 6)}, r"u has shape \(3, 6\); wanted \(batch, dim, time\)"),
        ({"A": torch.randn(6)}, r"A has shape \(6,\); wanted \(dim, state\)"),
        ({"A": torch.randn(6, 5, dtype=torch.complex64)}, "A has dtype torch.complex64"),
        ({"A": torch.randn(6, 5).double()}, "A in float64 but u, "),
        ({"delta": torch.randn(3, 6, 7)}, r"delta has shape \(3, 6, 7\)"),
        ({"B": torch.randn(3, 5, 7)}, r"B has shape \(3, 5, 7\); wanted \(batch, state, time\)"),
        ({"C": torch.randn(3, 4, 5, 6)}, "C has 4 groups, which do not divide dim 6"),
        (
            {"B": torch.randn(3, 2, 5, 6), "C": torch.randn(3, 3, 5, 6)},
            "B has 2 groups and C 3; wanted the same number",
        ),
        ({"B": torch.randn(5)}, r"B has shape \(5,\)"),
        ({"D": torch.randn(5)}, r"D has shape \(5,\)"),
        ({"initial_state": torch.randn(3, 5, 6)}, "initial_state has shape"),
        ({"lengths": torch.tensor([1, 2])}, r"lengths has shape \(2,\); wanted \(batch,\)"),
        ({"lengths": torch.tensor([0.5, 1, 1])}, "lengths has dtype torch.float32; wanted"),
        ({"lengths": torch.tensor([1, 7, 2])}, "lengths run from 1 to 7; wanted values between 0"),
        ({"lengths": torch.tensor([1, -1, 2])}, "lengths run from -1 to 2"),
        ({"reset_every": 0}, "reset_every is 0; wanted a positive number of frames"),
        ({"reset_every": 2.5}, "reset_every is 2.5"),
        ({"backend": "cuda"}, "unknown selective_scan backend 'cuda'"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        scan(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.randn(3, 6)}, r"x has shape \(3, 6\)"),
        ({"weight": torch.randn(6, 1, 4)}, "drop its middle axis"),
        ({"weight": torch.randn(5, 4)}, r"weight has shape \(5, 4\)"),
        ({"activation": "relu"}, "activation is 'relu'; wanted None or 'silu'"),
        ({"initial_state": torch.randn(2, 6, 4)}, "initial_state has shape"),
        ({"bias": torch.randn(2)}, "bias has shape"),
        ({"reset_every": True}, "reset_every is True"),
    ],
)
def test_convolution_arguments_that_do_not_fit_are_named(changes, message):
    arguments = {"x": torch.randn(2, 6, 9), "weight": torch.randn(6, 4), **changes}
    with pytest.raises(ValueError, match=message):
        causal_conv1d_fn(**arguments)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"lengths": torch.tensor([6, 6, 6])}, "no lengths"),
        ({"reverse": True}, "forward only"),
        ({"initial_state": torch.zeros(3, 6, 5)}, "no initial_state"),
        ({"reset_every": 2}, "no reset_every"),
        ({}, "computes on CUDA only"),
    ],
)
def test_mamba_ssm_is_left_out_of_calls_it_cannot_take(changes, reason):
    inputs = random_inputs(6)
    del inputs["initial_state"]
    changes = dict(changes)
    lengths = changes.pop("lengths", None)
    arguments = ScanArguments((way_of(inputs, **changes),), inputs["z"], True, lengths)
    assert reason in mamba_ssm.unsupported(normalise(arguments))


def test_the_doctor_names_every_backend_and_the_choice(capsys, monkeypatch):
    monkeypatch.setenv("MAMBA_ASR_SCAN", "torch")
    assert doctor.main([]) == 0
    printed = capsys.readouterr().out
    for name in BACKENDS.names:
        assert f"  {name} " in printed
    assert re.search(r"selective_scan +on cpu +torch", printed)
    monkeypatch.setenv("MAMBA_ASR_SCAN", "nonsense")
    assert doctor.main([]) == 1


def test_the_doctor_explains_itself_without_examining_anything(capsys):
    with pytest.raises(SystemExit) as end:
        doctor.main(["--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert "which backends work on this machine" in printed
    assert BACKENDS.operation not in printed


def test_directions_of_other_shapes_are_refused():
    one, other = random_inputs(6), random_inputs(7)
    with pytest.raises(ValueError, match=r"u_b has shape \(3, 6, 7\); wanted that of u_f"):
        bidirectional_scan_fn(way_of(one), way_of(other, reverse=True), one["z"], True)


def direction(**changes):
    """Parameters of inner width 8, 4 taps, rank 1 and 4 states."""
    shapes = ((8, 4), (8,), (9, 8), (8, 1), (8,), (8, 4), (8,))
    return Direction(*map(torch.randn, shapes))._replace(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"D": torch.randn(2)}, r"D has shape \(2,\); wanted \(E,\) = \(8,\)"),
        ({"dt_bias": torch.randn(2)}, "dt_bias has shape"),
        ({"conv_bias": torch.randn(3)}, "conv_bias has shape"),
        ({"x_proj": torch.randn(2, 8)}, r"x_proj has shape \(2, 8\); wanted \(R \+ 2N, E\)"),
        ({"dt_proj": torch.randn(3, 1)}, "dt_proj has shape"),
        ({"conv_weight": torch.randn(2, 4)}, "conv_weight has shape"),
        ({"conv_weight": torch.randn(8, 1, 4)}, r"conv_weight .*\(8, 1, 4\).*wanted .*\(E, W\)"),
        ({"A_log": torch.randn(8)}, r"\(8,\).*wanted \(E, N\)"),
    ],
)
@torch.no_grad()
def test_parameters_of_a_mixer_that_do_not_fit_are_named(changes, message):
    states = torch.zeros(1, 8, 3), torch.zeros(1, 8, 4)
    for frames in (2, 70):
        with pytest.raises(ValueError, match=message):
            mamba_inner_fn(torch.randn(1, frames, 16), direction(**changes))
    with pytest.raises(ValueError, match=message):
        mamba_inner_step(torch.randn(1, 16), direction(**changes), *states)


@pytest.mark.parametrize(
    "changes",
    [
        {"A_log": torch.randn(8, 3)},
        {"conv_weight": torch.randn(8, 2)},
        {"x_proj": torch.randn(10, 8), "dt_proj": torch.randn(8, 2)},
    ],
)
def test_both_directions_of_a_mixer_have_the_same_shapes(changes):
    with pytest.raises(ValueError, match="of the backward direction has shape"):
        mamba_inner_fn(torch.randn(1, 5, 16), direction(), direction(**changes))


@pytest.mark.parametrize("shapes", [((1, 8, 2), (1, 8, 4)), ((1, 8, 3), (2, 8, 4))])
def test_states_of_a_step_that_do_not_fit_are_refused(shapes):
    with pytest.raises(ValueError, match="_state has shape"):
        mamba_inner_step(torch.randn(1, 16), direction(), *map(torch.zeros, shapes))
    with pytest.raises(ValueError, match=r"xz has shape \(1, 15\)"):
        mamba_inner_step(torch.randn(1, 15), direction(), *map(torch.zeros, shapes))


@pytest.mark.parametrize("forced", ["torch", "reference"])
@torch.no_grad()
def test_the_override_rules_out_the_kernel_for_a_few_frames(forced, monkeypatch):
    monkeypatch.delenv("MAMBA_ASR_SCAN", raising=False)
    tensors = torch.randn(1, 16), torch.zeros(1, 8, 3), torch.zeros(1, 8, 4), *direction()
    if not chunk_cpu.fits(*tensors):
        pytest.skip("not compiled here")
    monkeypatch.setenv("MAMBA_ASR_SCAN", "cpu")
    assert chunk_cpu.fits(*tensors)
    monkeypatch.setenv("MAMBA_ASR_SCAN", forced)
    assert not chunk_cpu.fits(*tensors)


@torch.no_grad()
def test_a_step_obeys_its_backend(monkeypatch):
    monkeypatch.delenv("MAMBA_ASR_SCAN", raising=False)
    call = torch.randn(1, 16), direction(), torch.zeros(1, 8, 3), torch.zeros(1, 8, 4)
    if not chunk_cpu.fits(call[0], *call[2:]):
        pytest.skip("not compiled here")
    done = []
    kernel = chunk_cpu.chunk
    monkeypatch.setattr(chunk_cpu, "chunk", lambda *given: done.append(1) or kernel(*given))
    for forced, backend, compiled in (
        ("auto", "auto", True),
        ("auto", "cpu", True),
        ("auto", "reference", False),
        ("auto", "torch", False),
        ("torch", "auto", False),
        ("torch", "cpu", True),
    ):
        monkeypatch.setenv("MAMBA_ASR_SCAN", forced)
        done.clear()
        mamba_inner_step(*call, backend=backend)
        assert bool(done) == compiled, (forced, backend)
    monkeypatch.delenv("MAMBA_ASR_SCAN")
    done.clear()
    network = Mamba(8, backend="reference")
    network.step(torch.randn(1, 8), network.initial_state(1))
    assert not done


@pytest.mark.parametrize("name", ["nonsense", "triton"])
@torch.no_grad()
def test_a_step_refuses_what_the_whole_refuses(name, monkeypatch):
    monkeypatch.setattr(BACKENDS, "modules", BACKENDS.modules | {"triton": stub("no GPU")})
    xz_BF, states = torch.randn(1, 16), (torch.zeros(1, 8, 3), torch.zeros(1, 8, 4))
    message = "nonsense" if name == "nonsense" else "triton .* cannot be used here: no GPU"
    for forced, backend in (("auto", name), (name, "auto")):
        monkeypatch.setenv("MAMBA_ASR_SCAN", forced)
        with pytest.raises(ValueError, match=message):
            mamba_inner_step(xz_BF, direction(), *states, backend=backend)
        with pytest.raises(ValueError, match=message):
            mamba_inner_fn(xz_BF[:, None], direction(), backend=backend)


def test_lengths_that_the_host_may_not_look_at_are_clamped(monkeypatch):
    # As on an accelerator.
    monkeypatch.setattr("ops.checks.is_on_cpu", lambda _: False)
    xz_BTF, way = torch.randn(2, 6, 16), direction()
    found, wanted = (
        mamba_inner_fn(xz_BTF, way, lengths=torch.tensor(lengths), backend="torch")
        for lengths in ([9, -3], [6, 0])
    )
    assert torch.equal(found[0], wanted[0])


def test_what_torch_func_transforms_goes_to_the_reference(monkeypatch):
    monkeypatch.delenv("MAMBA_ASR_SCAN", raising=False)
    inputs = random_inputs(6)
    weight, lengths = torch.randn(6, 4), torch.tensor([6, 0, 3])

    def loss(x):
        x = causal_conv1d_fn(x, weight, activation="silu", lengths=lengths)
        y = selective_scan_fn(**{**inputs, "u": x}, delta_softplus=True, lengths=lengths)
        return y.square().sum()

    x = inputs["u"].clone().requires_grad_()
    (wanted,) = torch.autograd.grad(loss(x), x)
    x = inputs["u"]
    torch.testing.assert_close(torch.func.grad(loss)(x), wanted, rtol=1e-4, atol=1e-5)
    losses = torch.vmap(loss)(torch.stack([x, 2 * x]))
    torch.testing.assert_close(losses, torch.stack([loss(x), loss(2 * x)]))
    with pytest.raises(ValueError, match="transform the backend reference alone"):
        torch.vmap(lambda x: causal_conv1d_fn(x, weight, backend="torch"))(x[None])


def test_torch_func_maps_lengths():
    xz_KBTF = torch.randn(3, 2, 6, 16, dtype=torch.float64)
    way = Direction(*(x.double() for x in direction()))
    lengths_KB = torch.tensor([[6, 2], [0, 3], [5, 6]])

    def loss(xz_BTF, lengths_B):
        return mamba_inner_fn(xz_BTF, way, lengths=lengths_B, chunk_size=4)[0].square().sum()

    found = torch.vmap(torch.func.grad(loss))(xz_KBTF, lengths_KB)
    leaf = xz_KBTF.flatten(0, 1).requires_grad_()
    (wanted,) = torch.autograd.grad(loss(leaf, lengths_KB.flatten()), leaf)
    assert relative_error(found.flatten(0, 1), wanted) < 1e-9


WITHOUT_MEMORY = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from modules.Conmamba import ConmambaEncoderLayer, for_streams
from modules.dropout import Dropout
from ops.mamba_inner import mamba_inner_fn, mamba_inner_step
from ops import packed_linear
from tests.ops.test_dispatch import direction

with FakeTensorMode():
    states = torch.zeros(2, 8, 3), torch.zeros(2, 8, 4)
    assert mamba_inner_step(torch.randn(2, 16), direction(), *states)[0].shape == (2, 8)
    for frames in (3, 70):
        xz_BTF = torch.randn(2, frames, 16, requires_grad=True)
        lengths = torch.tensor([frames, 2])
        mamba_inner_fn(xz_BTF, direction(), direction(), lengths=lengths)[0].sum().backward()
        assert xz_BTF.grad.shape == xz_BTF.shape
        with torch.no_grad():
            y, *_ = mamba_inner_fn(xz_BTF, direction(), return_state=True)
        assert y.shape == (2, frames, 8)
    assert Dropout(0.5)(torch.ones(4)).shape == (4,)
    with torch.no_grad():
        assert not packed_linear.fits(torch.ones(2, 4), torch.ones(3, 4), None)
        assert for_streams(ConmambaEncoderLayer(8, 16)).fused is None
"""


def test_tensors_without_memory_go_through_every_operation():
    # In a process of its own, which an address of no memory would end.
    ran = subprocess.run([sys.executable, "-c", WITHOUT_MEMORY], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit")
@pytest.mark.parametrize("frames", [5, 70])
@torch.no_grad()
def test_a_trace_holds_what_is_computed(frames):
    way, network = direction(), Mamba(8).requires_grad_(False)
    state = network.initial_state(2)
    for function, shape in (
        (lambda x: mamba_inner_fn(x, way)[0], (2, frames, 16)),
        (lambda x: mamba_inner_fn(x, way, lengths=torch.tensor([frames, 3]))[0], (2, frames, 16)),
        (lambda x: network.step(x, state)[0], (2, 8)),
    ):
        traced = torch.jit.trace(function, torch.randn(shape), check_trace=False)
        x = torch.randn(shape)
        assert relative_error(traced(x), function(x)) < 1e-4


@pytest.mark.parametrize("with_gradients", [False, True])
def test_forward_mode_differentiates(with_gradients):
    way, states = direction(), (torch.zeros(2, 8, 3), torch.zeros(2, 8, 4))
    xz_BTF, tangent_BTF = torch.randn(2, 2, 5, 16)

    def outputs(xz_BTF):
        step, *_ = mamba_inner_step(xz_BTF[:, 0], way, *states)
        return mamba_inner_fn(xz_BTF, way)[0], step

    _, wanted = torch.func.jvp(outputs, (xz_BTF,), (tangent_BTF,))
    with torch.set_grad_enabled(with_gradients), forward_ad.dual_level():
        found = outputs(forward_ad.make_dual(xz_BTF, tangent_BTF))
        found = tuple(forward_ad.unpack_dual(y).tangent for y in found)
    torch.testing.assert_close(found, wanted)


@torch.no_grad()
def test_a_mode_sees_the_products_of_a_step():
    network = Mamba(8)
    state = network.initial_state(1)
    with FlopCounterMode(display=False) as counted:
        network.step(torch.randn(1, 8), state)
    # Those of in_proj and out_proj.
    assert counted.get_total_flops() > 2 * (8 * 32 + 16 * 8)


@torch.no_grad()
def test_torch_func_maps_a_mixer():
    network = Mamba(8)
    x_BTD, state = torch.randn(2, 5, 8), network.initial_state(1)
    mapped = torch.vmap(network)(x_BTD[:, None])[:, 0]
    torch.testing.assert_close(mapped, network(x_BTD))
    stepped = torch.vmap(lambda x_D: network.step(x_D[None], state)[0])(x_BTD[:, 0])[:, 0]
    torch.testing.assert_close(stepped, network(x_BTD[:, :1])[:, 0])


@pytest.mark.parametrize("frames", [0, 6])
@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_outputs_may_be_changed_in_place(backend, frames):
    inputs = random_inputs(frames, channels_last=True)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    weight = torch.randn(6, 2, requires_grad=True)
    xz_BTF = torch.randn(2, frames, 16, requires_grad=True)
    for outputs in (
        selective_scan_fn(**leaves, return_last_state=True, backend=backend),
        causal_conv1d_fn(leaves["u"], weight, return_last_state=True, backend=backend),
        mamba_inner_fn(xz_BTF, direction(), return_state=True, backend=backend),
    ):
        for x in outputs:
            x *= 2
        sum(x.sum() for x in outputs).backward()


class StateOfMemory(torch.autograd.Function):
    """As mamba_ssm's: the last state is a part of what its backward reads."""

    @staticmethod
    def forward(ctx, u):
        states = torch.stack([u, u + 1])
        ctx.save_for_backward(states)
        return u * 2, states[-1]

    @staticmethod
    def backward(ctx, grad_y, grad_state):
        (states,) = ctx.saved_tensors
        return 2 * grad_y + 0 * states[0]


def test_a_state_of_mamba_ssm_may_be_changed_and_has_no_gradient(monkeypatch):
    inputs = random_inputs(6)
    del inputs["initial_state"]
    kernel = types.SimpleNamespace(
        selective_scan_fn=lambda u, *given, **options: StateOfMemory.apply(u)
    )
    monkeypatch.setattr(mamba_ssm, "_interface", lambda: kernel)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    arguments = normalise(ScanArguments((way_of(leaves),), leaves["z"], True, None))
    y, state = mamba_ssm.scan(arguments)
    state *= 2
    y.sum().backward()
    with pytest.raises(RuntimeError, match="no gradient of the last state"):
        state.sum().backward()
