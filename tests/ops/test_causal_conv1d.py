"""Every backend of the causal convolution computes what torch's own convolution says."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.causal_conv1d import causal_conv1d_fn
from ops.causal_conv1d.dispatch import BACKENDS
from tests.ops.scans import (
    assert_close,
    device_of,
    memory_of_nan,
    present_backends,
    relative_error,
    with_gradients,
)

FAST = present_backends(BACKENDS)
every_backend = pytest.mark.parametrize("backend", FAST)
all_backends = pytest.mark.parametrize("backend", ["reference", *FAST])


def random_inputs(time, *, batch=4, dim=5, width=4, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        "x": normal(batch, dim, time),
        "weight": normal(dim, width),
        "bias": normal(dim),
        "initial_state": normal(batch, dim, width - 1),
    }


def run(backend, inputs, dtype=None, **options):
    device = device_of(backend)
    leaves = {
        name: x.to(device, dtype or x.dtype).detach().requires_grad_() for name, x in inputs.items()
    }
    if options.get("lengths") is not None:
        options["lengths"] = options["lengths"].to(device)
    options.setdefault("activation", "silu")
    y, state = causal_conv1d_fn(**leaves, return_last_state=True, backend=backend, **options)
    return with_gradients(y, state, leaves)


def item_by_item(inputs, lengths, reverse, reset_every):
    """Each item and block alone through torch's convolution, turned round for reverse."""
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    width = weight.shape[1]
    outputs, states = torch.zeros_like(x), []
    for item, length in enumerate(lengths.tolist()):
        state = inputs["initial_state"][item : item + 1]
        blocks = list(range(0, length, reset_every))
        for nth, lo in enumerate(blocks[::-1] if reverse else blocks):
            frames = torch.arange(lo, min(lo + reset_every, length))
            frames = frames.flip(0) if reverse else frames
            start = state if nth == 0 else torch.zeros_like(state)
            extended = torch.cat([start, x[item : item + 1][..., frames]], dim=-1)
            y = F.silu(F.conv1d(extended, weight[:, None], bias, groups=len(bias)))
            outputs = outputs.clone()
            outputs[item, :, frames] = y[0]
            state = extended[..., extended.shape[-1] - (width - 1) :]
        states.append(state)
    return outputs, torch.cat(states)


@functools.cache
def in_double(time, width=4, lengths=None, reverse=False, reset_every=None):
    lengths = None if lengths is None else torch.tensor(lengths)
    inputs = random_inputs(time, width=width)
    return run("reference", inputs, torch.float64, lengths=lengths, reverse=reverse,
               reset_every=reset_every)  # fmt: skip


@pytest.mark.parametrize("time", [1, 13])
@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("reset_every", [2, 3, 100])
def test_reference_is_torchs_convolution_of_each_item_and_block(time, width, reverse, reset_every):
    lengths = (time, 0, (time + 1) // 2, time - 1)
    leaves = {
        name: x.double().requires_grad_() for name, x in random_inputs(time, width=width).items()
    }
    outputs = item_by_item(leaves, torch.tensor(lengths), reverse, reset_every)
    found = in_double(time, width, lengths, reverse, reset_every)
    assert_close(found, with_gradients(*outputs, leaves), 1e-13)


@every_backend
@pytest.mark.parametrize(
    ("time", "width"), [(1, 4), (2, 4), (3, 5), (13, 1), (13, 2), (13, 4), (31, 5), (65, 4)]
)
def test_every_combination_of_lengths_direction_and_blocks(backend, time, width):
    for with_lengths, reverse, reset_every in itertools.product(
        [False, True], [False, True], [None, 1, 2, 8]
    ):
        lengths = (time, 0, (time + 1) // 2, time - 1) if with_lengths else None
        wanted = in_double(time, width, lengths, reverse, reset_every)
        options = {"reverse": reverse, "reset_every": reset_every}
        options["lengths"] = torch.tensor(lengths) if with_lengths else None
        inputs = random_inputs(time, width=width)
        assert_close(run(backend, inputs, **options), wanted, 1e-5)


@every_backend
@pytest.mark.parametrize("reverse", [False, True])
def test_any_memory_order_gives_the_same(backend, reverse):
    inputs = random_inputs(37)
    last = dict(inputs, x=inputs["x"].transpose(1, 2).contiguous().transpose(1, 2))
    wide = torch.full((4, 37, 12), float("nan"))
    wide[..., 3:8] = inputs["x"].transpose(1, 2)
    part = dict(inputs, x=wide[..., 3:8].transpose(1, 2))
    wanted = in_double(37, reverse=reverse)
    for ordered in (inputs, last, part):
        assert_close(run(backend, ordered, reverse=reverse), wanted, 1e-5)


@all_backends
@pytest.mark.parametrize("reverse", [False, True])
def test_without_bias_activation_and_state(backend, reverse):
    inputs = random_inputs(17)
    lengths = torch.tensor([17, 0, 4, 1])
    plain = {name: inputs[name] for name in ("x", "weight")}
    found = run(backend, plain, lengths=lengths, reverse=reverse, activation=None)
    with_zeros = dict(
        plain, bias=torch.zeros(5), initial_state=torch.zeros_like(inputs["initial_state"])
    )
    wanted = run("reference", with_zeros, torch.float64, lengths=lengths, reverse=reverse,
                 activation=None)  # fmt: skip
    assert_close(found, {name: wanted[name] for name in found}, 1e-5)
    x, weight = plain["x"][:1], plain["weight"][:, None]
    x = x.flip(-1) if reverse else x
    y = F.conv1d(F.pad(x, (3, 0)), weight, groups=5)
    y = y.flip(-1) if reverse else y
    assert relative_error(found["y"][:1], y.double()) < 1e-6


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_less_than_twice_torch_in_it(backend, dtype):
    inputs = {name: x.to(dtype) for name, x in random_inputs(61, dim=16).items()}
    wanted = run("reference", inputs, torch.float64)
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    plain = with_gradients(*item_by_item(leaves, torch.full((4,), 61), False, 61), leaves)
    found = run(backend, inputs)
    for name, reference in wanted.items():
        allowed = 2 * relative_error(plain[name], reference)
        assert relative_error(found[name], reference) <= allowed, name


@all_backends
def test_types_of_results_are_those_of_the_inputs(backend):
    inputs = random_inputs(7)
    inputs["x"] = inputs["x"].bfloat16()
    leaves = {name: x.to(device_of(backend)).requires_grad_() for name, x in inputs.items()}
    y, state = causal_conv1d_fn(**leaves, return_last_state=True, backend=backend)
    assert y.dtype == state.dtype == torch.bfloat16
    y.float().sum().backward()
    for name, x in leaves.items():
        assert x.grad.dtype == x.dtype, name


@all_backends
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("reset_every", [None, 5])
def test_padding_may_hold_anything(backend, poison, reverse, reset_every):
    inputs = random_inputs(19)
    lengths = torch.tensor([19, 0, 7, 18])
    padding = torch.arange(19) >= lengths[:, None]
    poisoned = dict(inputs, x=inputs["x"].masked_fill(padding[:, None], poison))
    options = {"lengths": lengths, "reverse": reverse, "reset_every": reset_every}
    found, wanted = run(backend, poisoned, **options), run(backend, inputs, **options)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=0)
    for name in ("y", "dx"):
        assert not found[name].movedim(1, 2)[padding].any(), name


@every_backend
@pytest.mark.parametrize("reverse", [False, True])
def test_no_result_depends_on_uninitialised_memory(backend, reverse):
    inputs = random_inputs(67)
    options = {"lengths": torch.tensor([67, 64, 3, 0]), "reverse": reverse, "reset_every": 30}
    wanted = run(backend, inputs, **options)
    with memory_of_nan():
        found = run(backend, inputs, **options)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=0)


@all_backends
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_cutting_equals_no_cutting(backend, data):
    time = data.draw(st.integers(1, 30), label="time")
    cuts = data.draw(st.lists(st.integers(0, time), max_size=6), label="cuts")
    lengths = data.draw(st.lists(st.integers(0, time), min_size=4, max_size=4), label="lengths")
    reverse = data.draw(st.booleans(), label="reverse")
    inputs, lengths = random_inputs(time, seed=time), torch.tensor(lengths)
    whole = run(backend, inputs, lengths=lengths, reverse=reverse)

    device = device_of(backend)
    leaves = {name: x.to(device).requires_grad_() for name, x in inputs.items()}
    edges = [0, *sorted(cuts), time]
    pieces = [None] * (len(edges) - 1)
    state = leaves["initial_state"]
    for piece in reversed(range(len(pieces))) if reverse else range(len(pieces)):
        lo, hi = edges[piece], edges[piece + 1]
        pieces[piece], state = causal_conv1d_fn(
            leaves["x"][..., lo:hi],
            leaves["weight"],
            leaves["bias"],
            "silu",
            lengths=(lengths - lo).clamp(0, hi - lo).to(device),
            reverse=reverse,
            initial_state=state,
            return_last_state=True,
            backend=backend if hi > lo else "auto",
        )
    assert_close(with_gradients(torch.cat(pieces, -1), state, leaves), whole, 1e-5)


@all_backends
def test_inputs_and_states_are_left_as_they_were(backend):
    inputs = {name: x.to(device_of(backend)) for name, x in random_inputs(3).items()}
    before = {name: x.clone() for name, x in inputs.items()}
    for lengths in (None, torch.zeros(4, dtype=torch.int64, device=inputs["x"].device)):
        y, state = causal_conv1d_fn(
            **inputs, lengths=lengths, return_last_state=True, backend=backend
        )
        y.fill_(3.0)
        state.fill_(3.0)
    for name, x in inputs.items():
        torch.testing.assert_close(x, before[name], rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["auto", "reference", "torch"])
def test_nothing_to_convolve(backend):
    for time, batch in ((0, 2), (5, 0)):
        inputs = random_inputs(time, batch=batch)
        y, state = causal_conv1d_fn(**inputs, return_last_state=True, backend=backend)
        assert y.shape == (batch, 5, time)
        torch.testing.assert_close(state, inputs["initial_state"], rtol=0, atol=0)
