"""Dropout of the CPU kernel: what stays, what goes, how often, and the same in the gradient."""

import pytest
import torch

from ops.dropout import dropout, fits

pytestmark = pytest.mark.skipif(not fits(torch.empty(1)), reason="no C++ compiler")
# One element, around a vector, around a unit of work of the kernel.
SIZES = [1, 7, 16, 17, 8192, 8193, 20011]


def value_and_gradient(x, p):
    x = x.detach().requires_grad_()
    y = dropout(x, p)
    # Uneven, so that a gradient in the wrong place shows.
    weights = torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype).view(x.shape)
    (gradient,) = torch.autograd.grad(y, x, weights)
    return y.detach(), gradient, weights


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kept_elements_and_their_gradients_are_scaled_and_the_others_zero(dtype, size):
    # None is zero by itself: zero tells what was dropped.
    x = torch.linspace(1, 2, size).to(dtype)
    y, gradient, weights = value_and_gradient(x, 0.25)
    assert y.dtype == gradient.dtype == dtype
    kept = y != 0
    assert kept.double().mean().item() == pytest.approx(0.75, abs=5 * 0.43 / size**0.5)
    for actual, whole in ((y, x), (gradient, weights)):
        assert torch.equal(actual[kept], (whole[kept].float() * (1 / 0.75)).to(dtype))
        assert not actual[~kept].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_a_short_type_passes_unchanged(dtype):
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    y = dropout(x, 0.0)
    numbers = ~x.isnan()
    assert torch.equal(y[numbers].view(torch.int16), x[numbers].view(torch.int16))
    assert y[~numbers].isnan().all()


@pytest.mark.parametrize("p", [0.001, 0.1, 0.9])
def test_frequency_is_p(p):
    y = dropout(torch.ones(1_000_000), p)
    deviation = (p * (1 - p) / y.numel()) ** 0.5
    assert (y == 0).double().mean().item() == pytest.approx(p, abs=5 * deviation)


def test_places_and_seeds_drop_independently():
    def dropped():
        return (dropout(torch.ones(200_000), 0.5) == 0) * 2.0 - 1

    first, second = dropped(), dropped()
    # Five standard deviations of a mean of 200,000 signs.
    bound = 5 / 200_000**0.5
    assert (first * second).mean().abs() < bound
    for distance in (1, 2, 8, 16, 17, 1024, 8192):
        assert (first[distance:] * first[:-distance]).mean().abs() < bound, distance


def test_one_seed_of_torch_gives_one_mask():
    masks = []
    for seed in (4, 4, 5):
        torch.manual_seed(seed)
        masks.append(dropout(torch.ones(999), 0.4))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_threads_change_no_bit():
    x, before = torch.randn(200_001), torch.get_num_threads()
    outputs = []
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            torch.manual_seed(2)
            outputs.append(value_and_gradient(x, 0.3)[:2])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for pair in zip(*outputs, strict=True))


def test_a_transposed_input_keeps_its_places():
    x = torch.rand(70, 130).t() + 1
    y, gradient, weights = value_and_gradient(x, 0.5)
    kept = y != 0
    assert torch.equal(y[kept], 2 * x[kept])
    assert torch.equal(gradient, torch.where(kept, 2 * weights, 0.0))


def test_nothing_comes_of_nothing():
    assert dropout(torch.empty(0, 3), 0.5).shape == (0, 3)


def test_other_types_and_devices_do_not_fit():
    assert not fits(torch.empty(1, dtype=torch.float64))
    assert not fits(torch.empty(1, device="meta"))


def test_all_but_certain_dropout_drops():
    assert not dropout(torch.ones(1000), 1 - 2**-40).any()
