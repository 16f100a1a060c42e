"""What runs here runs on the CPU everywhere, and on a GPU where there is one (``pytest -m gpu``).

Each test is written for a device and compared with the CPU, so that a machine without a GPU tests
the test. Triton compiles a kernel for each combination of types, of absent arguments and of strides
that 16 divides: shapes are such that one compilation of a kernel serves all tests of a precision.
"""

import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seeded_and_exact(one_thread):
    """No tensor cores for float32: their ten bits of mantissa are more than rounding."""
    torch.manual_seed(0)
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    # SpeechBrain allows them for the whole process.
    allowed = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = False
    yield
    products.allow_tf32, convolutions.allow_tf32 = allowed
