"""The mixer: what it computes, what it may see, and what its state carries."""

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from modules.mamba import Mamba, MambaState
from tests.ops.scans import plain_loop, relative_error

D_MODEL, INNER, TAPS, STATE, RANK = 12, 24, 4, 16, 1


def make_mixer(bidirectional=False, seed=0, **options):
    torch.manual_seed(seed)
    mixer = Mamba(D_MODEL, bidirectional=bidirectional, **options)
    # Distinct decays and direct paths, so that mixed-up directions or channels show.
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            if name.startswith(("A", "D")):
                parameter += 0.3 * torch.randn_like(parameter)
    return mixer


def make_frames(batch, time, seed=1):
    return torch.randn(batch, time, D_MODEL, generator=torch.Generator().manual_seed(seed))


def textbook_direction(mixer, suffix, x_BET, z_BET):
    """Convolution, projections, scan and gate in the words of the paper, first frame to last."""
    conv, x_proj, dt_proj = (
        getattr(mixer, f"{name}{suffix}") for name in ("conv1d", "x_proj", "dt_proj")
    )
    u = F.silu(conv(x_BET)[..., : x_BET.shape[-1]])
    dt, B, C = x_proj(u.transpose(1, 2)).split([mixer.dt_rank, STATE, STATE], dim=-1)
    y, _ = plain_loop(
        u,
        (dt @ dt_proj.weight.T).transpose(1, 2),
        -getattr(mixer, f"A{suffix}_log").exp(),
        B.transpose(1, 2).unsqueeze(1),
        C.transpose(1, 2).unsqueeze(1),
        getattr(mixer, f"D{suffix}"),
        z_BET,
        dt_proj.bias,
        torch.zeros(x_BET.shape[0], INNER, STATE, dtype=x_BET.dtype),
    )
    return y


def textbook_mixer(mixer, x_BTD):
    x_BET, z_BET = mixer.in_proj(x_BTD).transpose(1, 2).chunk(2, dim=1)
    y = textbook_direction(mixer, "", x_BET, z_BET)
    if mixer.bidirectional:
        y_b = textbook_direction(mixer, "_b", x_BET.flip(-1), z_BET.flip(-1))
        y = (y + y_b.flip(-1)) / 2
    return mixer.out_proj(y.transpose(1, 2))


def gradients_of(mixer, function, x_BTD):
    x_BTD = x_BTD.clone().requires_grad_()
    mixer.zero_grad()
    y = function(x_BTD)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    return {"y": y.detach(), "x": x_BTD.grad} | {
        name: parameter.grad.clone() for name, parameter in mixer.named_parameters()
    }


@pytest.mark.parametrize("bidirectional", [False, True])
def test_parameters_have_the_names_and_shapes_of_mamba_ssm_and_vision_mamba(bidirectional):
    shared = {
        "in_proj.weight": (2 * INNER, D_MODEL),
        "out_proj.weight": (D_MODEL, INNER),
    }
    direction = {
        "A{}_log": (INNER, STATE),
        "D{}": (INNER,),
        "conv1d{}.weight": (INNER, 1, TAPS),
        "conv1d{}.bias": (INNER,),
        "x_proj{}.weight": (RANK + 2 * STATE, INNER),
        "dt_proj{}.weight": (INNER, RANK),
        "dt_proj{}.bias": (INNER,),
    }
    wanted = dict(shared)
    for suffix in ("", "_b") if bidirectional else ("",):
        wanted |= {name.format(suffix): shape for name, shape in direction.items()}
    state_dict = make_mixer(bidirectional).state_dict()
    assert {name: tuple(x.shape) for name, x in state_dict.items()} == wanted


def test_sizes_follow_the_arguments():
    mixer = Mamba(40, d_state=8, d_conv=3, expand=3, bias=True, conv_bias=False)
    assert mixer.d_inner == 120
    assert mixer.dt_rank == math.ceil(40 / 16)
    assert mixer.in_proj.bias.shape == (240,)
    assert mixer.conv1d.bias is None
    y, state = mixer(torch.randn(2, 5, 40), return_state=True)
    assert y.shape == (2, 5, 40)
    assert state.conv.shape == (2, 120, 2)
    assert state.ssm.shape == (2, 120, 8)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_dynamics_are_s4d_real_also_after_another_initialisation(bidirectional):
    mixer = Mamba(64, bidirectional=bidirectional)
    conv_bound = 1 / math.sqrt(TAPS)

    def check():
        for suffix in ("", "_b") if bidirectional else ("",):
            rates = getattr(mixer, f"A{suffix}_log").exp()
            torch.testing.assert_close(rates, torch.arange(1.0, 17.0).expand(128, 16))
            assert (getattr(mixer, f"D{suffix}") == 1).all()
            dt_proj = getattr(mixer, f"dt_proj{suffix}")
            dt = F.softplus(dt_proj.bias)
            assert dt.min() >= 0.999e-3
            assert dt.max() <= 0.1001
            # Log-uniform: half of the channels below the geometric mean of the ends.
            assert 0.3 < (dt < 0.01).float().mean() < 0.7
            assert dt_proj.weight.abs().max() <= mixer.dt_rank**-0.5
            conv = getattr(mixer, f"conv1d{suffix}")
            assert conv.weight.abs().max() <= conv_bound
            assert conv.weight.std() > 0.4 * conv_bound

    check()
    for parameter in mixer.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_normal_(parameter)
    in_proj = mixer.in_proj.weight.clone()
    mixer.reset_dynamics()
    check()
    torch.testing.assert_close(mixer.in_proj.weight, in_proj, rtol=0, atol=0)
    mixer.reset_parameters()
    check()
    assert not torch.equal(mixer.in_proj.weight, in_proj)


def test_decays_and_direct_paths_ask_for_no_weight_decay():
    marked = {
        name
        for name, parameter in make_mixer(True).named_parameters()
        if getattr(parameter, "_no_weight_decay", False)
    }
    assert marked == {"A_log", "D", "A_b_log", "D_b"}


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_a_mixer_is_what_the_paper_writes(bidirectional, backend):
    mixer = make_mixer(bidirectional, backend=backend)
    x_BTD = make_frames(2, 37)
    found = gradients_of(mixer, mixer, x_BTD)
    mixer.double()
    wanted = gradients_of(mixer, lambda x: textbook_mixer(mixer, x), x_BTD.double())
    for name, reference in wanted.items():
        assert relative_error(found[name].double(), reference) < 1e-5, name


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_float64_mixer_stays_in_float64(bidirectional):
    mixer = make_mixer(bidirectional).double()
    x_BTD = make_frames(1, 9).double()
    y = mixer(x_BTD)
    assert y.dtype == torch.float64
    assert relative_error(y, textbook_mixer(mixer, x_BTD)) < 1e-13


@pytest.mark.parametrize("bidirectional", [False, True])
def test_autocast_keeps_the_scan_in_float32(bidirectional):
    mixer = make_mixer(bidirectional)
    x_BTD = make_frames(2, 50)
    exact = gradients_of(mixer, mixer, x_BTD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = mixer(x_BTD, return_state=True)
        assert y.dtype == torch.bfloat16
        assert state.ssm.dtype == torch.float32

        def cast(x):
            return mixer(x).float()

        rounded = gradients_of(mixer, cast, x_BTD)
    for name, reference in exact.items():
        assert rounded[name].dtype == reference.dtype, name
        assert relative_error(rounded[name], reference) < 0.03, name


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_padding_changes_no_frame_and_no_gradient(bidirectional, chunk_size):
    mixer = make_mixer(bidirectional)
    lengths = [13, 1, 8]
    x_BTD = make_frames(3, 13)
    for item, length in enumerate(lengths):
        x_BTD[item, length:] = 50.0

    def alone(x):
        items = [
            mixer(x[item : item + 1, :length], chunk_size=chunk_size)
            for item, length in enumerate(lengths)
        ]
        padded = [F.pad(y, (0, 0, 0, 13 - y.shape[1])) for y in items]
        return torch.cat(padded)

    wanted = gradients_of(mixer, alone, x_BTD)
    found = gradients_of(
        mixer, lambda x: mixer(x, torch.tensor(lengths), chunk_size=chunk_size), x_BTD
    )
    for name, reference in wanted.items():
        assert relative_error(found[name], reference) < 1e-5, name
    for item, length in enumerate(lengths):
        assert not found["y"][item, length:].any()
        assert not found["x"][item, length:].any()


@pytest.mark.parametrize("bidirectional", [False, True])
def test_padding_that_is_not_a_number_changes_no_frame(bidirectional):
    mixer = make_mixer(bidirectional)
    x_BTD, lengths = make_frames(2, 9), torch.tensor([9, 4])
    wanted = mixer(x_BTD, lengths)
    x_BTD[1, 4:] = math.nan
    x_BTD.requires_grad_()
    found = mixer(x_BTD, lengths)
    torch.testing.assert_close(found, wanted)
    found.square().sum().backward()
    assert x_BTD.grad.isfinite().all()


def test_a_causal_mixer_has_no_gradient_from_the_future():
    mixer = make_mixer()
    x_BTD = make_frames(2, 20).requires_grad_()
    mixer(x_BTD)[:, 11].sum().backward()
    assert not x_BTD.grad[:, 12:].any()
    assert x_BTD.grad[:, :12].any(dim=-1).all()


@pytest.mark.parametrize("chunk_size", [1, 3, 5, 20, 64])
def test_a_chunk_bounds_what_a_bidirectional_mixer_sees(chunk_size):
    mixer = make_mixer(True)
    x_BTD = make_frames(2, 20).requires_grad_()
    frame = 11
    mixer(x_BTD, chunk_size=chunk_size)[:, frame].sum().backward()
    end = min(20, (frame // chunk_size + 1) * chunk_size)
    assert not x_BTD.grad[:, end:].any()
    assert x_BTD.grad[:, :end].any(dim=-1).all()


def test_a_chunk_that_holds_everything_cuts_nothing():
    mixer = make_mixer(True)
    x_BTD = make_frames(2, 20)
    torch.testing.assert_close(mixer(x_BTD, chunk_size=20), mixer(x_BTD), rtol=0, atol=0)


@pytest.mark.parametrize("chunk_size", [1, 4, 7])
def test_a_bidirectional_mixer_streams_in_chunks(chunk_size):
    mixer = make_mixer(True)
    x_BTD = make_frames(2, 30)
    state, pieces = None, []
    for chunk in x_BTD.split(chunk_size, dim=1):
        y, state = mixer(chunk, state=state, chunk_size=chunk_size, return_state=True)
        pieces.append(y)
    torch.testing.assert_close(
        torch.cat(pieces, 1), mixer(x_BTD, chunk_size=chunk_size), rtol=1e-5, atol=1e-6
    )


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_causal_mixer_streams_in_any_cutting(data):
    time = data.draw(st.integers(1, 30), label="time")
    cuts = data.draw(st.lists(st.integers(0, time), max_size=5), label="cuts")
    lengths = torch.tensor(data.draw(st.lists(st.integers(0, time), min_size=3, max_size=3)))
    mixer, x_BTD = make_mixer(), make_frames(3, time)
    whole, last_state = mixer(x_BTD, lengths, return_state=True)
    state, pieces = mixer.initial_state(3), []
    edges = [0, *sorted(cuts), time]
    for lo, hi in itertools.pairwise(edges):
        y, state = mixer(
            x_BTD[:, lo:hi], (lengths - lo).clamp(0, hi - lo), state, return_state=True
        )
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state.conv, last_state.conv, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state.ssm, last_state.ssm, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_single_steps_equal_the_whole(gradients, dtype):
    mixer, x_BTD = make_mixer().to(dtype), make_frames(3, 17).to(dtype)
    whole, last_state = mixer(x_BTD, return_state=True)
    state, frames = mixer.initial_state(3), []
    with torch.set_grad_enabled(gradients):
        for x_BD in x_BTD.unbind(1):
            y, state = mixer.step(x_BD, state)
            frames.append(y)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {}
    torch.testing.assert_close(torch.stack(frames, 1), whole, **tolerance)
    torch.testing.assert_close(state.conv, last_state.conv, **tolerance)
    torch.testing.assert_close(state.ssm, last_state.ssm, **tolerance)


def test_gradients_flow_through_states():
    mixer, x_BTD = make_mixer(), make_frames(2, 12)
    wanted = gradients_of(mixer, mixer, x_BTD)

    def in_two(x):
        y, state = mixer(x[:, :5], return_state=True)
        return torch.cat([y, mixer(x[:, 5:], state=state)], dim=1)

    found = gradients_of(mixer, in_two, x_BTD)
    for name, reference in wanted.items():
        assert relative_error(found[name], reference) < 1e-5, name


def advance(mixer, x_BTD, state):
    with torch.no_grad():
        return mixer(x_BTD, state=state, return_state=True)


def test_rows_of_a_state_can_be_selected_repeated_and_reset():
    mixer = make_mixer()
    _, state = advance(mixer, make_frames(3, 9), mixer.initial_state(3))
    more = make_frames(3, 5, seed=2)
    wanted, _ = advance(mixer, more, state)

    order = torch.tensor([2, 0, 2])
    y, _ = advance(mixer, more[order], state.select(order))
    torch.testing.assert_close(y, wanted[order])
    mask = torch.tensor([True, False, True])
    y, _ = advance(mixer, more[mask], state.select(mask))
    torch.testing.assert_close(y, wanted[mask])

    y, _ = advance(mixer, more.repeat_interleave(2, 0), state.repeat(2))
    torch.testing.assert_close(y, wanted.repeat_interleave(2, 0))

    y, _ = advance(mixer, more, state.reset(mask))
    fresh, _ = advance(mixer, more, None)
    torch.testing.assert_close(y[mask], fresh[mask])
    torch.testing.assert_close(y[1], wanted[1])


def test_reset_clears_what_is_not_a_number():
    state = MambaState(torch.full((2, 3, 3), float("nan")), torch.full((2, 3, 4), float("nan")))
    cleared = state.reset(torch.tensor([True, False]))
    assert not cleared.conv[0].any()
    assert not cleared.ssm[0].any()
    assert cleared.ssm[1].isnan().all()


def test_a_state_is_never_changed_in_place():
    mixer = make_mixer()
    _, state = advance(mixer, make_frames(2, 7), None)
    conv, ssm = state.conv.clone(), state.ssm.clone()
    with torch.no_grad():
        _, stepped = mixer.step(make_frames(2, 1)[:, 0], state)
    _, longer = advance(mixer, make_frames(2, 6), state)
    _, frozen = mixer(make_frames(2, 6), torch.tensor([0, 3]), state, return_state=True)
    for derived in (stepped, longer, frozen, state.select(torch.tensor([0, 1])), state.repeat(2)):
        derived.conv.detach().fill_(7.0)
        derived.ssm.detach().fill_(7.0)
    state.reset(torch.tensor([True, True]))
    torch.testing.assert_close(state.conv, conv, rtol=0, atol=0)
    torch.testing.assert_close(state.ssm, ssm, rtol=0, atol=0)


def test_the_size_of_a_state_does_not_depend_on_time():
    mixer = make_mixer()
    sizes = set()
    for time in (1, 50):
        _, state = advance(mixer, make_frames(2, time), None)
        sizes.add((tuple(state.conv.shape), tuple(state.ssm.shape)))
    assert sizes == {((2, INNER, TAPS - 1), (2, INNER, STATE))}
    zeros = MambaState.zeros(2, INNER, STATE, TAPS)
    assert (tuple(zeros.conv.shape), tuple(zeros.ssm.shape)) in sizes


def test_no_frames_and_no_items_are_legal():
    for mixer in (make_mixer(), make_mixer(True)):
        assert mixer(make_frames(2, 0)).shape == (2, 0, D_MODEL)
        assert mixer(make_frames(0, 5)).shape == (0, 5, D_MODEL)
        lengths = torch.zeros(2, dtype=torch.int64)
        assert not mixer(make_frames(2, 5), lengths).any()


@torch.no_grad()
def step_without_gradients(mixer, state):
    """The compiled step, which trusts the shapes that it is given."""
    mixer.step(make_frames(2, 1)[:, 0], state)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda causal, both: both(make_frames(1, 3), state=causal.initial_state(1)),
         "bidirectional mixer was given a state without chunk_size"),
        (lambda causal, both: both.step(make_frames(1, 1)[:, 0], causal.initial_state(1)),
         "bidirectional mixer cannot step"),
        (lambda causal, both: causal(torch.randn(2, 3, 5)), r"wanted \(batch, time, 12\)"),
        (lambda causal, both: causal.step(torch.randn(2, 5), causal.initial_state(2)),
         r"wanted \(batch, 12\)"),
        (lambda causal, both: causal(make_frames(2, 3), state=causal.initial_state(3)),
         "state has shape"),
        (lambda causal, both: causal.step(make_frames(2, 1)[:, 0], causal.initial_state(3)),
         "one row per row of x"),
        (lambda causal, both: step_without_gradients(
            causal, dataclasses.replace(causal.initial_state(2), conv=torch.zeros(2, 24, 5))),
         r"conv state has shape \(2, 24, 5\)"),
        (lambda causal, both: step_without_gradients(
            causal, dataclasses.replace(causal.initial_state(2), conv=torch.zeros(1, 24, 3))),
         r"conv state has shape \(1, 24, 3\)"),
        (lambda causal, both: causal(make_frames(2, 3), torch.tensor([1, 4])),
         "lengths run from 1 to 4"),
        (lambda causal, both: causal(make_frames(2, 3), torch.tensor([0.5, 1.0])),
         "lengths has dtype"),
        (lambda causal, both: both(make_frames(2, 3), chunk_size=0), "0; wanted a positive"),
        (lambda causal, both: Mamba(0), "d_model is 0; wanted a positive integer"),
        (lambda causal, both: Mamba(8, d_state=2.5), "d_state is 2.5"),
    ],
)  # fmt: skip
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(make_mixer(), make_mixer(True))
