"""Parameter groups, clipping and schedules."""

import pytest
import torch
from speechbrain.nnet.schedulers import NoamScheduler

from modules.frontend import ConvolutionFrontEnd
from modules.TransformerASR import TransformerASR
from training.brains.optimization import (
    WarmupHoldCosineScheduler,
    clip_gradients,
    count_parameters,
    first_lr,
    parameter_groups,
)


@pytest.fixture(scope="module", params=["conmamba", "conformer", "mamba", "transformer"])
def network(request):
    return torch.nn.ModuleDict(
        {
            "CNN": ConvolutionFrontEnd([8, 10, 80]),
            "Transformer": TransformerASR(
                tgt_vocab=7,
                input_size=640,
                d_model=8,
                nhead=2,
                num_encoder_layers=1,
                num_decoder_layers=1,
                d_ffn=16,
                encoder_module=request.param,
                decoder_module="mamba" if request.param == "mamba" else "transformer",
                attention_type="RelPosMHAXL" if request.param == "conformer" else "regularMHA",
                normalize_before=True,
            ),
        }
    )


def names_of(group, network):
    names = {id(p): name for name, p in network.named_parameters()}
    return {names[id(p)] for p in group["params"]}


def test_every_parameter_is_in_exactly_one_group(network):
    decay, keep = (names_of(group, network) for group in parameter_groups(network))
    assert not decay & keep
    assert decay | keep == {name for name, _ in network.named_parameters()}


def test_what_decay_would_harm_gets_none(network):
    decay_group, keep_group = parameter_groups(network)
    assert keep_group["weight_decay"] == 0.0
    assert "weight_decay" not in decay_group
    harmed = {
        name
        for name, _ in network.named_parameters()
        if "A_log" in name
        or "A_b_log" in name
        or name.endswith((".D", ".D_b"))
        or "norm" in name
        or "bias" in name
    }
    assert harmed <= names_of(keep_group, network)


def test_matrices_decay(network):
    decay = names_of(parameter_groups(network)[0], network)
    assert "CNN.convblock_0.convs.conv_0.conv.weight" in decay
    assert all(network.get_parameter(name).ndim >= 2 for name in decay)
    matrices = {"in_proj.weight", "out_proj.weight", "x_proj.weight", "dt_proj.weight"}
    for name, _ in network.named_parameters():
        if "mamba" in name and any(name.endswith(matrix) for matrix in matrices):
            assert name in decay


def test_a_norm_over_two_dimensions_gets_no_decay():
    # The front end normalises over (frequency, channel): its weight is a matrix.
    front_end = ConvolutionFrontEnd([8, 10, 80])
    norms = [m for m in front_end.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert norms
    assert all(norm.weight.ndim == 2 for norm in norms)
    spared = {id(p) for p in parameter_groups(front_end)[1]["params"]}
    assert all(id(norm.weight) in spared for norm in norms)


def test_a_shared_parameter_is_optimised_once():
    layer = torch.nn.Linear(3, 3)
    decay, keep = parameter_groups(torch.nn.ModuleList([layer, torch.nn.Sequential(layer)]))
    assert [len(decay["params"]), len(keep["params"])] == [1, 1]
    assert count_parameters([layer, torch.nn.Sequential(layer)]) == 12


def test_a_frozen_parameter_is_left_out():
    layer = torch.nn.Linear(3, 3)
    layer.weight.requires_grad = False
    assert [len(group["params"]) for group in parameter_groups(layer)] == [0, 1]
    assert count_parameters([layer]) == 3


def two_groups():
    first, second = torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.zeros(9))
    first.grad, second.grad = torch.full((4,), 3.0), torch.full((9,), -4.0)
    optimizer = torch.optim.SGD([{"params": [first]}, {"params": [second]}], lr=1.0)
    return optimizer, first, second


def test_clipping_bounds_the_norm_over_all_groups():
    optimizer, first, second = two_groups()
    norm = clip_gradients(optimizer, 1.0)
    torch.testing.assert_close(norm, torch.tensor((4 * 9.0 + 9 * 16.0) ** 0.5))
    clipped = torch.cat([first.grad, second.grad])
    torch.testing.assert_close(clipped.norm(), torch.tensor(1.0), rtol=1e-5, atol=0)
    torch.testing.assert_close(second.grad[0] / first.grad[0], torch.tensor(-4.0 / 3.0))


@pytest.mark.parametrize("max_norm", [100.0, -1.0, 0.0])
def test_a_small_norm_or_no_limit_leaves_gradients_alone(max_norm):
    optimizer, first, second = two_groups()
    norm = clip_gradients(optimizer, max_norm)
    torch.testing.assert_close(norm, torch.tensor(180.0**0.5))
    assert (first.grad == 3.0).all()
    assert (second.grad == -4.0).all()


@pytest.mark.parametrize("schedule", ["noam", "cosine"])
def test_first_step_does_not_take_the_peak_rate(schedule):
    if schedule == "noam":
        scheduler = NoamScheduler(lr_initial=1e-3, n_warmup_steps=100)
    else:
        scheduler = WarmupHoldCosineScheduler(1e-3, n_warmup_steps=100, total_steps=1000)
    assert first_lr(scheduler) == pytest.approx(1e-5)


def rates(scheduler, steps):
    """Learning rate that each optimiser step is taken with."""
    optimizer = torch.optim.SGD(
        [{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(2)], lr=first_lr(scheduler)
    )
    taken = []
    for _ in range(steps):
        assert len({group["lr"] for group in optimizer.param_groups}) == 1
        taken.append(optimizer.param_groups[0]["lr"])
        before, after = scheduler(optimizer)
        assert (before, after) == (taken[-1], optimizer.param_groups[0]["lr"])
    return taken


def test_warm_up_then_plateau_then_cosine():
    scheduler = WarmupHoldCosineScheduler(
        2.0, n_warmup_steps=4, n_hold_steps=3, total_steps=11, final_fraction=0.25
    )
    expected = [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0]
    half_down = 2.0 * (0.25 + 0.75 * 0.5)
    taken = rates(scheduler, 13)
    assert taken[:7] == pytest.approx(expected)
    assert taken[8] == pytest.approx(half_down)
    assert taken[10:] == pytest.approx([0.5, 0.5, 0.5])
    assert taken[3:] == sorted(taken[3:], reverse=True)


def test_without_warm_up_the_plateau_comes_first():
    taken = rates(WarmupHoldCosineScheduler(1.0, 0, n_hold_steps=2, total_steps=5), 3)
    assert taken[:2] == [1.0, 1.0]
    assert taken[2] < 1.0


def test_a_schedule_without_room_to_decay_is_refused():
    with pytest.raises(ValueError, match="total_steps"):
        WarmupHoldCosineScheduler(1.0, n_warmup_steps=5, n_hold_steps=5, total_steps=10)


def test_a_restored_schedule_goes_on_where_it_was(tmp_path):
    whole = rates(WarmupHoldCosineScheduler(1.0, 3, total_steps=9), 8)
    scheduler = WarmupHoldCosineScheduler(1.0, 3, total_steps=9)
    rates(scheduler, 5)
    scheduler._save(tmp_path / "scheduler.ckpt")
    restored = WarmupHoldCosineScheduler(1.0, 3, total_steps=9)
    restored._load(tmp_path / "scheduler.ckpt")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=whole[5])
    assert [restored(optimizer)[1] for _ in range(2)] == whole[6:8]
