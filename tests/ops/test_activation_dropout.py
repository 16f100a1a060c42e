import pytest
import torch
import torch.nn.functional as F

from ops.activation_dropout import activation_dropout_fn, cpu
from ops.activation_dropout.reference import ACTIVATIONS

needs_kernel = pytest.mark.skipif(
    cpu.unavailable() is not None or cpu.prepare() is not None, reason="no C++ compiler"
)
BACKENDS = ["reference", pytest.param("cpu", marks=needs_kernel)]
# One element, around a vector, around a unit of work of the kernel.
SIZES = [1, 7, 16, 17, 8192, 8193, 20011]


def value_and_gradient(x, *arguments, **options):
    x = x.detach().requires_grad_()
    y = activation_dropout_fn(x, *arguments, **options)
    # Uneven, so that a gradient in the wrong place shows.
    weights = torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype).view(x.shape)
    (gradient,) = torch.autograd.grad(y, x, weights)
    return y.detach(), gradient, weights


@needs_kernel
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_without_dropout_the_kernel_equals_the_definition_in_float64(activation, size):
    x = 4 * torch.randn(size)
    y, gradient, _ = value_and_gradient(x, activation, 0.0, backend="cpu")
    wanted, wanted_gradient, _ = value_and_gradient(x.double(), activation, 0.0)
    torch.testing.assert_close(y.double(), wanted, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(gradient.double(), wanted_gradient, atol=1e-6, rtol=1e-6)


@needs_kernel
@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_extreme_inputs_saturate(activation):
    x = torch.tensor([-1e30, -1e4, -50.0, 50.0, 1e4, 1e30])
    y, gradient, weights = value_and_gradient(x, activation, 0.0, backend="cpu")
    assert y[:3].abs().max() < 1e-15
    torch.testing.assert_close(y[3:], x[3:])
    torch.testing.assert_close(gradient / weights, (x > 0).float(), atol=1e-6, rtol=1e-6)
    assert activation_dropout_fn(torch.tensor([torch.nan]), activation, 0.0, backend="cpu").isnan()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_kept_elements_and_their_gradients_are_scaled_and_the_others_zero(
    activation, dtype, backend
):
    # Further out an activation is zero by itself, and zero tells what was dropped.
    x = torch.randn(37, 501).clamp(-3, 3).to(dtype)
    y, gradient, _ = value_and_gradient(x, activation, 0.25, backend=backend)
    assert y.dtype == gradient.dtype == dtype
    wanted, wanted_gradient, _ = value_and_gradient(x.double(), activation, 0.0)
    kept = y != 0
    assert kept.double().mean().item() == pytest.approx(0.75, abs=0.02)
    tolerance = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 3e-2}[dtype]
    for actual, exact in ((y, wanted), (gradient, wanted_gradient)):
        torch.testing.assert_close(
            actual[kept].double(), exact[kept] / 0.75, atol=tolerance, rtol=tolerance
        )
        assert not actual[~kept].any()


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_a_short_type_passes_unchanged(dtype):
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    y = activation_dropout_fn(x, None, 0.0, backend="cpu")
    numbers = ~x.isnan()
    assert torch.equal(y[numbers].view(torch.int16), x[numbers].view(torch.int16))
    assert y[~numbers].isnan().all()


@needs_kernel
def test_bfloat16_results_are_rounded_to_nearest():
    x = torch.randn(10_000).bfloat16()
    y = activation_dropout_fn(x, "silu", 0.0, backend="cpu")
    # One unit in the last place where the exact value lies next to the middle of two numbers.
    wanted = F.silu(x.double()).bfloat16()
    assert (y.view(torch.int16) - wanted.view(torch.int16)).abs().max() <= 1
    assert (y == wanted).double().mean() > 0.999


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [0.001, 0.1, 0.9])
def test_frequency_is_p(p, backend):
    y = activation_dropout_fn(torch.ones(1_000_000), None, p, backend=backend)
    deviation = (p * (1 - p) / y.numel()) ** 0.5
    assert (y == 0).double().mean().item() == pytest.approx(p, abs=5 * deviation)


@needs_kernel
def test_places_and_seeds_drop_independently():
    def dropped():
        return (activation_dropout_fn(torch.ones(200_000), None, 0.5, backend="cpu") == 0) * 2.0 - 1

    first, second = dropped(), dropped()
    # Five standard deviations of a mean of 200,000 signs.
    bound = 5 / 200_000**0.5
    assert (first * second).mean().abs() < bound
    for distance in (1, 2, 8, 16, 17, 1024, 8192):
        assert (first[distance:] * first[:-distance]).mean().abs() < bound, distance


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_seed_of_torch_gives_one_mask(backend):
    masks = []
    for seed in (4, 4, 5):
        torch.manual_seed(seed)
        masks.append(activation_dropout_fn(torch.ones(999), None, 0.4, backend=backend))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


@needs_kernel
def test_threads_change_no_bit():
    x = torch.randn(200_001)
    outputs = []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        torch.manual_seed(2)
        outputs.append(value_and_gradient(x, "gelu", 0.3, backend="cpu")[:2])
    assert all(torch.equal(*pair) for pair in zip(*outputs, strict=True))


@needs_kernel
def test_a_transposed_input_keeps_its_places():
    x = torch.randn(70, 130).t()
    y = activation_dropout_fn(x, "gelu", 0.5, backend="cpu")
    kept = y != 0
    torch.testing.assert_close(y[kept], 2 * F.gelu(x)[kept], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_nothing_is_dropped_outside_training_and_nothing_comes_of_nothing(backend):
    x = torch.randn(20)
    y = activation_dropout_fn(x, "silu", 0.5, training=False, backend=backend)
    torch.testing.assert_close(y, F.silu(x), atol=1e-6, rtol=1e-6)
    assert activation_dropout_fn(torch.empty(0, 3), "gelu", 0.5, backend=backend).shape == (0, 3)


def test_float64_is_computed_by_the_definition():
    x = torch.randn(20, dtype=torch.float64)
    assert torch.equal(activation_dropout_fn(x, "gelu", 0.0), F.gelu(x))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("tanh", 0.1), {}, "'tanh'.*'gelu', 'silu'"),
        (("gelu", 1.0), {}, "p is 1.0"),
        (("gelu", -0.1), {}, "p is -0.1"),
        (("gelu", 0.1), {"backend": "cuda"}, "unknown activation_dropout backend 'cuda'"),
    ],
)
def test_errors_say_what_is_known(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        activation_dropout_fn(torch.randn(3), *arguments, **options)
