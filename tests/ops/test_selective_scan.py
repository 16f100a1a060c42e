"""Every backend computes what the definition says, and the definition what a plain loop does."""

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.selective_scan import bidirectional_scan_fn, selective_scan_fn
from tests.ops.scans import (
    FAST,
    TENSORS,
    assert_close,
    device_of,
    in_double,
    memory_of_nan,
    plain_loop,
    random_inputs,
    relative_error,
    run,
    way_of,
    with_gradients,
)

every_backend = pytest.mark.parametrize("backend", FAST)
all_backends = pytest.mark.parametrize("backend", ["reference", *FAST])


def lengths_for(time, batch=3):
    return torch.tensor([time, 0, (time + 1) // 2, time - 1][:batch])


def item_by_item(inputs, lengths, reverse, reset_every):
    """Each item and block alone through the plain loop, frames turned round for reverse."""
    outputs = torch.zeros_like(inputs["u"])
    states = []
    parameters = {name: inputs[name] for name in ("A", "D", "delta_bias")}
    for item, length in enumerate(lengths.tolist()):
        state = inputs["initial_state"][item : item + 1]
        blocks = list(range(0, length, reset_every))
        for nth, lo in enumerate(blocks[::-1] if reverse else blocks):
            frames = torch.arange(lo, min(lo + reset_every, length))
            frames = frames.flip(0) if reverse else frames
            cut = {
                name: inputs[name][item : item + 1][..., frames]
                for name in ("u", "delta", "B", "C", "z")
            }
            start = state if nth == 0 else torch.zeros_like(state)
            y, state = plain_loop(**cut, **parameters, initial_state=start)
            outputs = outputs.clone()
            outputs[item, :, frames] = y[0]
        states.append(state)
    return outputs, torch.cat(states)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("reset_every", [4, 5, 100])
def test_reference_is_the_plain_loop_over_each_item_and_block(reverse, reset_every):
    inputs = random_inputs(13, batch=4, dtype=torch.float64)
    lengths = torch.tensor([13, 0, 8, 12])
    leaves = {name: x.double().requires_grad_() for name, x in inputs.items()}
    wanted = with_gradients(*item_by_item(leaves, lengths, reverse, reset_every), leaves)
    found = in_double(inputs, lengths=lengths, reverse=reverse, reset_every=reset_every)
    assert_close(found, wanted, 1e-13)


@every_backend
@pytest.mark.parametrize("time", [13, 65])
@pytest.mark.parametrize("reset_every", [None, 8])
def test_every_combination_of_lengths_direction_state_and_blocks(backend, time, reset_every):
    inputs = random_inputs(time)
    for with_lengths, reverse, with_state in itertools.product([False, True], repeat=3):
        options = {
            "lengths": lengths_for(time) if with_lengths else None,
            "reverse": reverse,
            "reset_every": reset_every,
        }
        chosen = dict(inputs)
        if not with_state:
            del chosen["initial_state"]
        assert_close(run(backend, chosen, **options), in_double(chosen, **options), 1e-5)


@every_backend
@pytest.mark.parametrize("time", [1, 2, 3, 31, 63, 64, 127, 128, 129])
@pytest.mark.parametrize("channels_last", [False, True])
def test_lengths_around_block_boundaries(backend, time, channels_last):
    inputs = random_inputs(time, channels_last=channels_last, state=16, dim=17)
    options = {"lengths": lengths_for(time), "reverse": channels_last, "reset_every": 50}
    assert_close(run(backend, inputs, **options), in_double(inputs, **options), 1e-5)


@every_backend
@pytest.mark.parametrize("reset_every", [1, 2, 64, 70])
def test_blocks_of_any_size(backend, reset_every):
    inputs = random_inputs(70)
    options = {"lengths": torch.tensor([70, 65, 64]), "reset_every": reset_every}
    for reverse in (False, True):
        found = run(backend, inputs, reverse=reverse, **options)
        assert_close(found, in_double(inputs, reverse=reverse, **options), 1e-5)


@every_backend
@pytest.mark.parametrize("constant", ["", "B", "C", "BC"])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_constant_and_grouped_projections(backend, constant, groups):
    inputs = random_inputs(21, constant=constant, groups=groups, state=7)
    options = {"lengths": lengths_for(21), "reverse": True}
    assert_close(run(backend, inputs, **options), in_double(inputs, **options), 1e-5)


@every_backend
def test_a_projection_without_a_group_axis_serves_all_groups(backend):
    inputs = random_inputs(9, groups=2)
    shared = dict(inputs, B=inputs["B"][:, 0])
    repeated = dict(inputs, B=inputs["B"][:, :1].expand(-1, 2, -1, -1))
    found, wanted = run(backend, shared), in_double(repeated)
    wanted["dB"] = wanted["dB"].sum(1)
    assert_close(found, wanted, 1e-5)


@all_backends
@pytest.mark.parametrize("absent", ["D", "z", "delta_bias", "softplus"])
def test_optional_parts_may_be_absent(backend, absent):
    inputs = random_inputs(11)
    if absent == "softplus":
        inputs["delta"] = inputs["delta"].abs()
        inputs["delta_bias"] = inputs["delta_bias"].abs()
    else:
        del inputs[absent]
    options = {"delta_softplus": absent != "softplus", "return_last_state": True}

    def results(name, dtype):
        leaves = {
            key: x.to(device_of(name), dtype).detach().requires_grad_() for key, x in inputs.items()
        }
        return with_gradients(*selective_scan_fn(**leaves, backend=name, **options), leaves)

    neutral = dict(inputs)
    if absent == "D":
        neutral["D"] = torch.zeros(6)
    if absent == "delta_bias":
        neutral["delta_bias"] = torch.zeros(6)
    wanted = results("reference", torch.float64)
    assert_close(results(backend, torch.float32), wanted, 1e-5)
    if absent in ("D", "delta_bias"):
        same = in_double(neutral)
        del same[f"d{absent}"]
        assert_close(wanted, same, 1e-13)


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_less_than_twice_the_plain_loop_in_it(backend, dtype):
    inputs = random_inputs(61, dtype=dtype, dim=8, state=16)
    wanted = in_double(inputs)
    leaves = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}
    plain = with_gradients(*plain_loop(**leaves), leaves)
    found = run(backend, inputs)
    assert found.keys() == wanted.keys()
    for name, reference in wanted.items():
        allowed = 2 * relative_error(plain[name], reference)
        assert relative_error(found[name], reference) < allowed, name


@all_backends
def test_types_of_results_are_those_of_the_inputs(backend):
    inputs = random_inputs(7)
    mixed = {"u": torch.bfloat16, "delta": torch.float32, "B": torch.float16, "z": torch.float16}
    leaves = {
        name: x.to(device_of(backend), mixed.get(name, x.dtype)).requires_grad_()
        for name, x in inputs.items()
    }
    if backend == "mamba_ssm":
        pytest.skip("mamba_ssm takes one dtype for all sequences")
    y, last_state = selective_scan_fn(
        **leaves, delta_softplus=True, return_last_state=True, backend=backend
    )
    assert y.dtype == torch.bfloat16
    assert last_state.dtype == torch.float32
    y.float().sum().backward()
    for name, x in leaves.items():
        assert x.grad.dtype == x.dtype, name
    # Mixed types agree with the same values computed in float64.
    wanted = in_double({name: x.detach().cpu() for name, x in leaves.items()})
    assert relative_error(y.detach().cpu().double(), wanted["y"]) < 4e-3
    assert relative_error(last_state.detach().cpu().double(), wanted["last_state"]) < 1e-5


@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
def test_float64_stays_float64(backend):
    inputs = {name: x.double() for name, x in random_inputs(9).items()}
    y, last_state = selective_scan_fn(
        **inputs, delta_softplus=True, return_last_state=True, backend=backend
    )
    assert y.dtype == last_state.dtype == torch.float64
    wanted = in_double(inputs)
    assert relative_error(y, wanted["y"]) < 1e-14
    assert relative_error(last_state, wanted["last_state"]) < 1e-14


@all_backends
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("reset_every", [None, 4])
def test_padding_may_hold_anything(backend, poison, reverse, reset_every):
    inputs = random_inputs(19)
    lengths = torch.tensor([19, 0, 7])
    padding = torch.arange(19) >= lengths[:, None]
    poisoned = dict(inputs)
    for name in ("u", "delta", "B", "C", "z"):
        mask = padding.view(3, *[1] * (inputs[name].dim() - 2), 19)
        poisoned[name] = inputs[name].masked_fill(mask, poison)
    options = {"lengths": lengths, "reverse": reverse, "reset_every": reset_every}
    found, wanted = run(backend, poisoned, **options), run(backend, inputs, **options)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=0)
    for name in ("y", "du", "ddelta", "dz"):
        assert not found[name].movedim(1, 2)[padding].any(), name
    # An item without frames hands its state through.
    torch.testing.assert_close(
        found["last_state"][1].float(), inputs["initial_state"][1], rtol=0, atol=0
    )


@all_backends
@pytest.mark.parametrize("reverse", [False, True])
def test_padding_to_any_length_changes_nothing(backend, reverse):
    inputs = random_inputs(40)
    lengths = torch.tensor([17, 9, 16])
    cut = {
        name: x[..., :17] if name in ("u", "delta", "B", "C", "z") else x
        for name, x in inputs.items()
    }
    long = run(backend, inputs, lengths=lengths, reverse=reverse, reset_every=8)
    short = run(backend, cut, lengths=lengths, reverse=reverse, reset_every=8)
    for name in ("last_state", "y"):
        torch.testing.assert_close(long[name][..., :17], short[name][..., :17], rtol=0, atol=1e-6)


@all_backends
def test_not_a_number_stays_in_its_block(backend):
    inputs = random_inputs(12)
    inputs["u"][:, :, 5] = float("nan")
    y = run(backend, inputs, reset_every=4)["y"]
    assert torch.isfinite(y[..., :4]).all()
    assert torch.isfinite(y[..., 8:]).all()
    y = run(backend, inputs, reset_every=4, reverse=True)["y"]
    assert torch.isfinite(y[..., :4]).all()
    assert torch.isfinite(y[..., 8:]).all()


@every_backend
@pytest.mark.parametrize("reverse", [False, True])
def test_no_result_depends_on_uninitialised_memory(backend, reverse):
    inputs = random_inputs(67, dim=5)
    options = {"lengths": torch.tensor([67, 64, 3]), "reverse": reverse, "reset_every": 30}
    wanted = run(backend, inputs, **options)
    with memory_of_nan():
        found = run(backend, inputs, **options)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=0)


@every_backend
@pytest.mark.parametrize("step", [1e-6, 20.0])
@pytest.mark.parametrize("reverse", [False, True])
def test_extreme_step_sizes(backend, step, reverse):
    inputs = random_inputs(150, state=16)
    inputs["A"] = -torch.arange(1.0, 17.0).repeat(6, 1)
    del inputs["delta_bias"]
    inputs["delta"] = torch.full_like(inputs["delta"], step)
    # Beyond 20 softplus is the identity; below, its inverse is taken in float64.
    raw = torch.tensor(step, dtype=torch.float64).expm1().log() if step < 20 else step
    inputs["delta"].fill_(float(raw))
    found, wanted = run(backend, inputs, reverse=reverse), in_double(inputs, reverse=reverse)
    assert_close(found, wanted, 1e-5)


@every_backend
def test_steps_from_vanishing_to_huge_in_one_sequence(backend):
    inputs = random_inputs(200, state=16)
    exponents = torch.linspace(-6, 1.3, 200)[torch.randperm(200)]
    inputs["delta"] = (10.0**exponents).expand(3, 6, 200).clone()
    inputs["delta_bias"].zero_()
    assert_close(run(backend, inputs), in_double(inputs), 1e-5)


@functools.cache
def hundred_thousand_frames_in_double():
    return run("torch", random_inputs(100_000, batch=1, dim=4, state=4), dtype=torch.float64)


@pytest.mark.slow
@every_backend
def test_a_hundred_thousand_frames(backend):
    inputs = random_inputs(100_000, batch=1, dim=4, state=4)
    # The definition would take minutes; the torch backend in float64 is tested against it above.
    wanted = hundred_thousand_frames_in_double()
    found = run(backend, inputs)
    assert all(torch.isfinite(x).all() for x in found.values())
    assert_close(found, wanted, 1e-5)


@pytest.mark.parametrize("backend", ["auto", "reference", "torch"])
def test_nothing_to_scan(backend):
    for time, batch in ((0, 2), (5, 0)):
        inputs = random_inputs(time, batch=batch)
        leaves = {name: x.requires_grad_() for name, x in inputs.items()}
        y, last_state = selective_scan_fn(
            **leaves, delta_softplus=True, return_last_state=True, backend=backend
        )
        assert y.shape == (batch, 6, time)
        torch.testing.assert_close(last_state, inputs["initial_state"], rtol=0, atol=0)
        (y.sum() + last_state.sum()).backward()
        torch.testing.assert_close(
            leaves["initial_state"].grad, torch.ones_like(last_state), rtol=0, atol=0
        )


@pytest.mark.parametrize("backend", ["auto", "reference", "torch"])
def test_no_frames_without_gate_and_direct_path_have_a_gradient(backend):
    inputs = random_inputs(0)
    u = inputs["u"].requires_grad_()
    y = selective_scan_fn(u, *(inputs[name] for name in ("delta", "A", "B", "C")), backend=backend)
    y.sum().backward()
    assert u.grad.shape == u.shape


@all_backends
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_cutting_equals_no_cutting(backend, data):
    time = data.draw(st.integers(2, 45), label="time")
    cuts = data.draw(st.lists(st.integers(0, time), max_size=5), label="cuts")
    lengths = data.draw(st.lists(st.integers(0, time), min_size=3, max_size=3), label="lengths")
    reverse = data.draw(st.booleans(), label="reverse")
    inputs = random_inputs(time, seed=time)
    lengths = torch.tensor(lengths)
    whole = run(backend, inputs, lengths=lengths, reverse=reverse)

    device = device_of(backend)
    leaves = {name: x.to(device).requires_grad_() for name, x in inputs.items()}
    edges = [0, *sorted(cuts), time]
    pieces = [None] * (len(edges) - 1)
    state = leaves["initial_state"]
    for piece in reversed(range(len(pieces))) if reverse else range(len(pieces)):
        lo, hi = edges[piece], edges[piece + 1]
        cut = {
            name: x[..., lo:hi] if name in ("u", "delta", "B", "C", "z") else x
            for name, x in leaves.items()
        }
        cut["initial_state"] = state
        pieces[piece], state = selective_scan_fn(
            **cut,
            delta_softplus=True,
            return_last_state=True,
            lengths=(lengths - lo).clamp(0, hi - lo).to(device),
            reverse=reverse,
            backend=backend if hi > lo else "auto",
        )
    assert_close(with_gradients(torch.cat(pieces, -1), state, leaves), whole, 1e-5)


@all_backends
@pytest.mark.parametrize("reverse", [False, True])
def test_later_frames_in_scan_order_have_no_gradient(backend, reverse):
    inputs = {name: x.to(device_of(backend)) for name, x in random_inputs(20).items()}
    for name in TENSORS[:5]:
        inputs[name].requires_grad_()
    y = selective_scan_fn(**inputs, delta_softplus=True, reverse=reverse, backend=backend)
    y[..., 9].sum().backward()
    hidden = slice(0, 9) if reverse else slice(10, 20)
    for name in ("u", "delta", "B", "C"):
        assert not inputs[name].grad[..., hidden].any(), name
    assert inputs["u"].grad[..., 9].any()


@all_backends
def test_inputs_and_states_are_left_as_they_were(backend):
    inputs = {name: x.to(device_of(backend)) for name, x in random_inputs(20).items()}
    before = {name: x.clone() for name, x in inputs.items()}
    y, last_state = selective_scan_fn(
        **inputs, delta_softplus=True, return_last_state=True, reset_every=6, backend=backend
    )
    y.fill_(3.0)
    last_state.fill_(3.0)
    for name, x in inputs.items():
        torch.testing.assert_close(x, before[name], rtol=0, atol=0)


@all_backends
@pytest.mark.parametrize("other_has", [{}, {"channels_last": False}, {"state": 7, "constant": "B"}])
@pytest.mark.parametrize("reset_every", [None, 5])
@pytest.mark.parametrize("with_lengths", [False, True])
def test_both_directions_at_once_are_the_mean_of_two_scans(
    backend, reset_every, with_lengths, other_has
):
    lengths = torch.tensor([23, 0, 11]) if with_lengths else None

    def leaves_of(dtype, device):
        like = {"channels_last": True}
        both = [random_inputs(23, seed=1, **like), random_inputs(23, seed=2, **like | other_has)]
        both[1]["z"] = both[0]["z"]
        for inputs in both:
            del inputs["initial_state"]
        return [
            {name: x.to(device, dtype).detach().requires_grad_() for name, x in inputs.items()}
            for inputs in both
        ]

    def gradients(y, both):
        y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).to(y))
        found = {"y": y}
        for direction, leaves in zip("fb", both, strict=True):
            found |= {f"d{name}_{direction}": x.grad for name, x in leaves.items()}
        return {name: x.detach().cpu().double() for name, x in found.items() if x is not None}

    one, other = leaves_of(torch.float64, "cpu")
    other["z"] = one["z"]
    wanted_y = 0.5 * (
        selective_scan_fn(**one, delta_softplus=True, lengths=lengths, backend="reference")
        + selective_scan_fn(
            **other,
            delta_softplus=True,
            lengths=lengths,
            reverse=True,
            reset_every=reset_every,
            backend="reference",
        )
    )
    wanted = gradients(wanted_y, (one, other))

    device = device_of(backend)
    one, other = leaves_of(torch.float32, device)
    other["z"] = one["z"]
    y = bidirectional_scan_fn(
        way_of(one),
        way_of(other, reverse=True, reset_every=reset_every),
        one["z"],
        True,
        lengths=None if lengths is None else lengths.to(device),
        backend=backend,
    )
    assert_close(gradients(y, (one, other)), wanted, 1e-5)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_two_directions_may_differ_in_their_types(backend):
    one, other = random_inputs(9, seed=1), random_inputs(9, seed=2)
    for inputs in (one, other):
        del inputs["initial_state"]
    ways = [way_of(one), way_of(other, reverse=True)]
    wanted = bidirectional_scan_fn(*ways, one["z"], True, backend=backend)
    other["u"] = other["u"].bfloat16()
    ways = [way_of(one), way_of(other, reverse=True)]
    found = bidirectional_scan_fn(*ways, one["z"], True, backend=backend)
    assert found.dtype == wanted.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05)


@all_backends
@pytest.mark.parametrize("constant", ["", "C", "BC"])
@pytest.mark.parametrize("reverse", [False, True])
def test_padding_gives_zeros_and_no_gradient_without_a_gate_too(backend, constant, reverse):
    inputs = random_inputs(13, constant=constant)
    del inputs["z"]
    options = {"lengths": lengths_for(13), "reverse": reverse}
    found = run(backend, inputs, **options)
    for item, length in enumerate(options["lengths"].tolist()):
        for name in ("y", "du", "ddelta"):
            assert not found[name][item, :, length:].any()
    wanted = in_double(inputs, **options)
    assert_close(found, wanted, 1e-5)
    # The definition's own gradients: each item alone, without padding.
    for item, length in enumerate(options["lengths"].tolist()):
        if length == 0:
            continue
        cut = {
            name: x[item : item + 1, ..., :length] if name in ("u", "delta") or x.dim() == 4 else x
            for name, x in inputs.items()
        }
        cut["initial_state"] = inputs["initial_state"][item : item + 1]
        u = cut["u"].double().requires_grad_()
        y = selective_scan_fn(
            **{**{n: x.double() for n, x in cut.items()}, "u": u},
            delta_softplus=True, reverse=reverse, backend="reference",
        )  # fmt: skip
        torch.testing.assert_close(y[0].detach(), wanted["y"][item, :, :length])
