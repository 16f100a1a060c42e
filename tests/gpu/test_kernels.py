"""The kernels of a GPU compute what the plain loops say: outputs, states and all gradients."""

import pytest
import torch

from tests.ops import scans, test_causal_conv1d
from tests.ops.scans import assert_close

BACKENDS = {"cpu": "auto", "cuda": "triton"}
# Neither 1 nor a multiple of 16, which strides would tell the compiler; one piece and several.
CHANNELS, TIMES = 64, [7, 17, 65, 201]
# Float32 in blocks and bfloat16 without: two kernels, not four. A result in bfloat16 may round to
# the neighbour.
PRECISIONS = [(torch.float32, 5, 1e-5), (torch.bfloat16, None, 2**-8)]

every_precision = pytest.mark.parametrize(("dtype", "reset_every", "tolerance"), PRECISIONS)


def scan_call(time, reverse, dtype, reset_every):
    """Inputs of a scan, frame after frame as a network has them, and its options."""
    inputs = scans.random_inputs(time, dim=CHANNELS, state=16, channels_last=True, dtype=dtype)
    lengths = torch.tensor([time, 0, (time + 1) // 2])
    return inputs, {"lengths": lengths, "reverse": reverse, "reset_every": reset_every}


def convolution_call(time, reverse, dtype, reset_every):
    inputs = test_causal_conv1d.random_inputs(time, batch=3, dim=CHANNELS)
    inputs["x"] = inputs["x"].transpose(1, 2).contiguous().transpose(1, 2).to(dtype)
    lengths = torch.tensor([time, 0, (time + 1) // 2])
    return inputs, {"lengths": lengths, "reverse": reverse, "reset_every": reset_every}


def poisoned(inputs, names, lengths):
    """NaN in all frames that do not count."""
    inputs = dict(inputs)
    for name in names:
        x = inputs[name] = inputs[name].clone()
        for row, length in zip(x, lengths.tolist(), strict=True):
            row[..., length:] = float("nan")
    return inputs


@every_precision
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("time", TIMES)
def test_scan(device, time, reverse, dtype, reset_every, tolerance):
    inputs, options = scan_call(time, reverse, dtype, reset_every)
    wanted = scans.run("reference", inputs, **options)
    inputs = poisoned(inputs, ("u", "delta", "B", "C", "z"), options["lengths"])
    assert_close(scans.run(BACKENDS[device.type], inputs, **options), wanted, tolerance)


@every_precision
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("time", TIMES)
def test_convolution(device, time, reverse, dtype, reset_every, tolerance):
    inputs, options = convolution_call(time, reverse, dtype, reset_every)
    wanted = test_causal_conv1d.run("reference", inputs, **options)
    inputs = poisoned(inputs, ("x",), options["lengths"])
    found = test_causal_conv1d.run(BACKENDS[device.type], inputs, **options)
    assert_close(found, wanted, tolerance)
