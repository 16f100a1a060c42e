"""Weights as they are stored: how far they may be off, and how much they take."""

import pytest
import torch

from common.errors import UserError
from inference.bundle import write_bundle
from inference.weights import pack, unpack
from tests.inference.runs import make_run


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return {
        "matrix": torch.randn(40, 64) * torch.logspace(-6, 3, 40)[:, None],
        "zeros": torch.zeros(3, 50),
        "image": torch.randn(8, 16, 3, 3),
        "short rows": torch.randn(300, 16),
        "vector": torch.randn(64),
        "integers": torch.arange(5),
        "normalize.glob_mean": torch.randn(80) * 1e6,
        "half": torch.randn(5, 40).bfloat16(),
    }


def test_fp32_is_exact(tensors):
    stored = unpack(pack(tensors, "fp32"))
    torch.testing.assert_close(
        stored,
        {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()},
        rtol=0,
        atol=0,
    )


def test_fp16_rounds_weights_and_leaves_statistics(tensors):
    stored = unpack(pack(tensors, "fp16"))
    torch.testing.assert_close(stored["matrix"], tensors["matrix"].half().float(), rtol=0, atol=0)
    for name in ("normalize.glob_mean", "integers"):
        torch.testing.assert_close(stored[name], tensors[name], rtol=0, atol=0)


def test_fp16_refuses_what_it_cannot_hold():
    with pytest.raises(UserError, match=r"layer\.weight has weights beyond float16"):
        pack({"layer.weight": torch.tensor([1e5])}, "fp16")


def test_int8_is_off_by_half_a_step_at_most(tensors):
    packed = pack(tensors, "int8")
    stored = unpack(packed)
    assert stored.keys() == tensors.keys()
    for name in ("matrix", "zeros", "image", "half"):
        assert packed[name].dtype == torch.int8
        rows_RC = tensors[name].float().flatten(1)
        step_R1 = rows_RC.abs().amax(1, keepdim=True) / 127
        error_RC = (stored[name].flatten(1) - rows_RC).abs()
        # The division that finds the step rounds, too.
        assert (error_RC <= step_R1 / 2 * (1 + 1e-5)).all()
    for name in ("short rows", "vector", "integers", "normalize.glob_mean"):
        torch.testing.assert_close(stored[name], tensors[name], rtol=0, atol=0)


def test_fp16_is_a_half_and_int8_about_a_quarter(tmp_path):
    run = make_run(
        tmp_path / "run", "CTC/conmamba_small", d_model=144, num_encoder_layers=4, d_ffn=1024
    )
    bytes_of = {
        precision: (write_bundle(run, tmp_path / precision, precision) / "model.safetensors")
        .stat()
        .st_size
        for precision in ("fp32", "fp16", "int8")
    }
    assert bytes_of["fp16"] < 0.51 * bytes_of["fp32"]
    assert bytes_of["int8"] < 0.29 * bytes_of["fp32"]
