"""What the Triton kernels compute, by Triton's interpreter; `test_triton` runs this file.

Uninitialised memory holds NaN here, so that everything must be written before it is read.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
import triton.runtime.interpreter as interpreter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ops.causal_conv1d import causal_conv1d_fn
from ops.mamba_inner import Direction, mamba_inner_fn
from ops.selective_scan import Way, bidirectional_scan_fn, selective_scan_fn, triton_launch
from tests.ops.scans import (
    assert_close,
    in_double,
    memory_of_nan,
    plain_loop,
    random_inputs,
    relative_error,
    run,
    way_of,
    with_gradients,
)

TOLERANCE = 1e-5
few = settings(
    max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(autouse=True)
def _memory_holds_nan():
    with memory_of_nan():
        yield


@pytest.fixture
def _rounding(monkeypatch):
    """Conversions to 16 bits round to nearest as on a GPU; the interpreter cuts digits off."""
    convert = interpreter._convert_float

    def rounded(values, input_dtype, output_dtype, rounding_mode):
        if output_dtype.name != "bf16" or input_dtype.name != "fp32":
            return convert(values, input_dtype, output_dtype, rounding_mode)
        bits = torch.from_numpy(values.copy()).to(torch.bfloat16).view(torch.int16)
        return bits.numpy().view("uint16")

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


def poisoned(inputs, lengths):
    """``inputs`` with NaN where the lengths say that nothing counts."""
    inputs = dict(inputs)
    for name in ("u", "delta", "z", "B", "C", "x"):
        if name in inputs and inputs[name].dim() > 2:
            inputs[name] = inputs[name].clone()
            for item, length in enumerate(lengths.tolist()):
                inputs[name][item, ..., length:] = float("nan")
    return inputs


def check_scan(inputs, **options):
    wanted = in_double(inputs, **options)
    if options.get("lengths") is not None:
        inputs = poisoned(inputs, options["lengths"])
    assert_close(run("triton", inputs, **options), wanted, TOLERANCE)


@pytest.mark.parametrize("time", [1, 2, 16, 17, 37])
def test_scan_of_any_length(time):
    check_scan(random_inputs(time, batch=1, dim=3, state=2, channels_last=time % 2 == 0))


@pytest.mark.parametrize(
    ("reverse", "entered", "reset_every"), itertools.product([0, 1], [0, 1], [None, 10])
)
def test_scan_options(reverse, entered, reset_every):
    inputs = random_inputs(18, batch=2, dim=2, state=1)
    if not entered:
        del inputs["initial_state"]
    lengths = torch.tensor([17, 0] if entered else [18, 7])
    check_scan(inputs, lengths=lengths, reverse=bool(reverse), reset_every=reset_every)


@given(st.data())
@few
def test_scan_of_any_call(data):
    time = data.draw(st.integers(1, 20))
    inputs = random_inputs(
        time,
        batch=2,
        dim=data.draw(st.sampled_from([1, 4])),
        state=data.draw(st.sampled_from([1, 3])),
        constant=data.draw(st.sampled_from(["", "", "B", "C", "BC"])),
        channels_last=data.draw(st.booleans()),
    )
    for name in ("D", "z", "delta_bias", "initial_state"):
        if data.draw(st.booleans()):
            del inputs[name]
    lengths = data.draw(st.lists(st.integers(0, time), min_size=2, max_size=2) | st.none())
    check_scan(
        inputs,
        lengths=None if lengths is None else torch.tensor(lengths),
        reverse=data.draw(st.booleans()),
        reset_every=data.draw(st.integers(1, time) | st.none()),
    )


@pytest.mark.parametrize(("multiprocessors", "channels_last"), [(0, False), (1000, True)])
def test_scan_with_any_block_size(multiprocessors, channels_last, monkeypatch):
    monkeypatch.setattr(triton_launch, "num_multiprocessors", lambda _: multiprocessors)
    inputs = random_inputs(9, batch=1, dim=68, state=3, groups=2, channels_last=channels_last)
    check_scan(inputs, reverse=True)


@pytest.fixture
def _short_pieces(monkeypatch):
    """Time is cut wherever it can be."""
    tuning = triton_launch.TUNING._replace(programs=1000, enough_programs=1000, min_piece_frames=1)
    monkeypatch.setattr(triton_launch, "TUNING", tuning)


@pytest.mark.usefixtures("_short_pieces")
@pytest.mark.parametrize(
    ("reverse", "reset_every"), itertools.product([False, True], [None, 7, 16, 40])
)
def test_scan_in_pieces(reverse, reset_every):
    inputs = random_inputs(50, batch=3, dim=2, state=1)
    lengths = torch.tensor([50, 35, 0])
    check_scan(inputs, lengths=lengths, reset_every=reset_every, reverse=reverse)


@pytest.mark.usefixtures("_short_pieces")
@pytest.mark.parametrize("constant", ["B", "C"])
def test_scan_in_pieces_without_a_gate(constant):
    inputs = random_inputs(33, batch=1, dim=3, state=2, constant=constant, channels_last=True)
    for name in ("z", "D", "delta_bias", "initial_state"):
        del inputs[name]
    check_scan(inputs, reverse=constant == "C")


def test_scan_with_many_states():
    check_scan(random_inputs(3, batch=1, dim=9, state=33))


def test_scan_without_softplus_and_with_extreme_steps():
    inputs = random_inputs(18, batch=1, dim=4, state=2)
    inputs["delta"] = torch.tensor([1e-6, 20.0, 0.3, 1e-6])[:, None].expand(4, 18)[None].clone()
    del inputs["delta_bias"]

    def outcome(backend, dtype):
        leaves = {name: x.to(dtype).detach().requires_grad_() for name, x in inputs.items()}
        y, last = selective_scan_fn(**leaves, return_last_state=True, backend=backend)
        return with_gradients(y, last, leaves)

    wanted = outcome("reference", torch.float64)
    assert_close(outcome("triton", torch.float32), wanted, TOLERANCE)
    # Softplus gives the same steps: its small results must keep their digits.
    inputs["delta"] = torch.log(torch.expm1(inputs["delta"].double())).float()
    check_scan(inputs)


@pytest.mark.usefixtures("_rounding")
def test_scan_of_narrow_types():
    inputs = random_inputs(18, batch=1, dim=4, state=3, dtype=torch.bfloat16)
    exact = in_double(inputs)
    found = run("triton", inputs)
    leaves = {name: x.bfloat16().detach().requires_grad_() for name, x in inputs.items()}
    loop = with_gradients(*plain_loop(**leaves), leaves)
    for name, wanted in exact.items():
        bound = 2 * relative_error(loop[name], wanted)
        assert relative_error(found[name], wanted) < bound, name


def test_scan_of_mixed_types():
    inputs = random_inputs(18, batch=1, dim=4, state=2)
    inputs |= {"delta": inputs["delta"].half(), "B": inputs["B"].bfloat16()}
    inputs |= {"z": inputs["z"].half(), "A": inputs["A"].half()}
    wanted = in_double(inputs)
    found = run("triton", inputs)
    for name in ("y", "last_state", "du", "dC", "dD", "ddelta_bias", "dinitial_state"):
        assert relative_error(found[name], wanted[name]) < TOLERANCE, name
    for name in ("ddelta", "dA", "dB", "dz"):
        # The gradient is rounded, or cut off by the interpreter, to the type of its tensor.
        assert relative_error(found[name], wanted[name]) < 2**-7, name


def test_scan_writes_the_same_bits_again():
    inputs = random_inputs(5, batch=1, dim=34, state=2)
    first, second = run("triton", inputs), run("triton", inputs)
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


@pytest.mark.parametrize(
    ("lengths", "reset_every", "alike"),
    [(None, None, True), ([19, 0], 7, True), ([19, 0], 7, False)],
)
def test_scan_in_both_directions(lengths, reset_every, alike):
    lengths = None if lengths is None else torch.tensor(lengths)
    forward, backward = (
        random_inputs(19, batch=2, dim=3, state=2, channels_last=last, seed=seed)
        for seed, last in ((0, True), (1, alike))
    )
    if lengths is not None:
        forward, backward = poisoned(forward, lengths), poisoned(backward, lengths)

    def outcome(backend, dtype):
        first, second = (
            {
                name: x.to(dtype).detach().requires_grad_()
                for name, x in inputs.items()
                if name != "initial_state"
            }
            for inputs in (forward, backward)
        )
        del second["z"]
        ways = way_of(first), way_of(second, reverse=True, reset_every=reset_every)
        y = bidirectional_scan_fn(*ways, first["z"], True, lengths=lengths, backend=backend)
        leaves = first | {f"{name}_b": x for name, x in second.items()}
        return with_gradients(y, y.new_zeros(1), leaves)

    wanted = outcome("reference", torch.float64)
    assert_close(outcome("triton", torch.float32), wanted, TOLERANCE)


def mixer_leaves(time, directions):
    """Input, states and parameters of a mixer's inner part, by name."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    batch, inner, states, rank, width = 2, 4, 2, 1, 4
    leaves = {"xz": normal(batch, time, 2 * inner)}
    leaves |= {"conv": normal(batch, inner, width - 1), "ssm": normal(batch, inner, states)}
    for way in directions:
        leaves |= {
            f"conv_weight_{way}": normal(inner, width),
            f"conv_bias_{way}": normal(inner),
            f"x_proj_{way}": normal(rank + 2 * states, inner),
            f"dt_proj_{way}": normal(inner, rank),
            f"dt_bias_{way}": normal(inner),
            f"A_log_{way}": torch.rand(inner, states, generator=generator),
            f"D_{way}": normal(inner),
        }
    return leaves


def mixer_outcome(leaves, directions, backend, dtype=None, **options):
    own = {name: x.to(dtype or x.dtype).detach().requires_grad_() for name, x in leaves.items()}
    ways = [
        Direction(**{field: own[f"{field}_{way}"] for field in Direction._fields})
        for way in directions
    ]
    y, conv_state, ssm_state = mamba_inner_fn(
        own["xz"], *ways, conv_state=own.get("conv"), ssm_state=own.get("ssm"), return_state=True,
        backend=backend, **options,
    )  # fmt: skip
    last = torch.cat([conv_state, ssm_state], dim=-1)
    return with_gradients(y, last if "conv" in own else y.new_zeros(1), own)


def test_scan_in_a_mixer_with_states_and_chunks():
    leaves = mixer_leaves(19, "fb")
    options = {"lengths": torch.tensor([19, 6]), "chunk_size": 8}
    wanted = mixer_outcome(leaves, "fb", "reference", torch.float64, **options)
    assert_close(mixer_outcome(leaves, "fb", "triton", **options), wanted, TOLERANCE)


@pytest.mark.usefixtures("_short_pieces")
@pytest.mark.parametrize("directions", ["f", "fb"])
def test_scan_in_a_mixer_without_states(directions):
    leaves = mixer_leaves(35, directions)
    del leaves["conv"], leaves["ssm"]
    wanted = mixer_outcome(leaves, directions, "reference", torch.float64)
    assert_close(mixer_outcome(leaves, directions, "triton"), wanted, TOLERANCE)


@pytest.mark.usefixtures("_rounding")
def test_scan_in_a_mixer_of_narrow_activations():
    leaves = mixer_leaves(19, "fb")
    leaves["xz"] = leaves["xz"].bfloat16()
    wanted = mixer_outcome(leaves, "fb", "reference", torch.float64)
    found = mixer_outcome(leaves, "fb", "triton")
    for name, x in wanted.items():
        assert relative_error(found[name], x) < 2**-5, name


def test_scan_in_a_mixer_whose_parameters_are_narrow():
    # The kernels of the mixer leave this to those of the operations.
    leaves = {name: x.bfloat16() for name, x in mixer_leaves(5, "f").items()}
    wanted = mixer_outcome(leaves, "f", "reference", torch.float64)
    found = mixer_outcome(leaves, "f", "triton")
    for name, x in wanted.items():
        assert relative_error(found[name], x) < 2**-4, name


def test_scan_is_an_operator_with_a_fake():
    inputs = random_inputs(5, batch=1, dim=2, state=2, channels_last=True)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    operator = torch.ops.mamba_asr.selective_scan_triton.default
    no_second_way = [None] * len(Way._fields)
    torch.library.opcheck(
        operator,
        (*way_of(leaves), *no_second_way, leaves["z"], True, None, True),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def random_convolution(time, width=4, dim=3, channels_last=False):
    generator = torch.Generator().manual_seed(width)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    x = normal(3, time, dim).transpose(1, 2) if channels_last else normal(3, dim, time)
    state = normal(3, dim, width - 1)
    return {"x": x, "weight": normal(dim, width), "bias": normal(dim), "initial_state": state}


def check_convolution(inputs, lengths=None, activation="silu", **options):
    def outcome(backend, dtype, inputs):
        leaves = {name: x.to(dtype).detach().requires_grad_() for name, x in inputs.items()}
        y, state = causal_conv1d_fn(
            **leaves, lengths=lengths, activation=activation, return_last_state=True,
            backend=backend, **options,
        )  # fmt: skip
        return with_gradients(y, state, leaves)

    wanted = outcome("reference", torch.float64, inputs)
    if lengths is not None:
        inputs = poisoned(inputs, lengths)
    assert_close(outcome("triton", torch.float32, inputs), wanted, TOLERANCE)


@pytest.mark.parametrize(
    ("reverse", "entered", "reset_every"), itertools.product([0, 1], [0, 1], [None, 9])
)
def test_convolution_options(reverse, entered, reset_every):
    inputs = random_convolution(20, channels_last=bool(reverse))
    if not entered:
        del inputs["initial_state"]
    lengths = torch.tensor([20, 0, 2])
    check_convolution(inputs, lengths, reverse=bool(reverse), reset_every=reset_every)


@given(st.data())
@few
def test_convolution_of_any_call(data):
    time = data.draw(st.sampled_from([1, 2, 5, 64, 65]))
    inputs = random_convolution(
        time, width=data.draw(st.integers(1, 5)), dim=data.draw(st.sampled_from([1, 33]))
    )
    for name in ("bias", "initial_state"):
        if data.draw(st.booleans()):
            del inputs[name]
    lengths = data.draw(st.lists(st.integers(0, time), min_size=3, max_size=3) | st.none())
    check_convolution(
        inputs,
        None if lengths is None else torch.tensor(lengths),
        activation=data.draw(st.sampled_from([None, "silu"])),
        reverse=data.draw(st.booleans()),
        reset_every=data.draw(st.integers(1, time) | st.none()),
    )


@pytest.mark.usefixtures("_rounding")
def test_convolution_of_narrow_types():
    inputs = random_convolution(12)
    inputs["x"] = inputs["x"].bfloat16()
    double = {name: x.double() for name, x in inputs.items()}
    wanted = causal_conv1d_fn(**double, activation="silu", backend="reference")
    found = causal_conv1d_fn(**inputs, activation="silu", backend="triton")
    assert found.dtype == torch.bfloat16
    padded = torch.cat([inputs["initial_state"].bfloat16(), inputs["x"]], dim=-1)
    loop = F.silu(
        sum(
            padded[..., tap : tap + 12] * inputs["weight"].bfloat16()[:, tap, None]
            for tap in range(4)
        )
        + inputs["bias"].bfloat16()[:, None]
    )
    bound = 2 * relative_error(loop.double(), wanted)
    assert relative_error(found.double(), wanted) < bound


def test_convolution_is_an_operator_with_a_fake():
    inputs = {name: x.requires_grad_() for name, x in random_convolution(5).items()}
    torch.library.opcheck(
        torch.ops.mamba_asr.causal_conv1d_triton.default,
        (inputs["x"], inputs["weight"], inputs["bias"], "silu", None, False,
         inputs["initial_state"], None, True),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )  # fmt: skip
