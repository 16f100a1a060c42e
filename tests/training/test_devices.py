"""Where a run computes."""

import pytest
import torch

from common.errors import UserError
from training.launch.devices import (
    check_device,
    check_forced_backend,
    check_precision,
    computes_bf16,
    distributed_backend_for,
    explained_memory,
    gpu_use_percent,
    memory_gib,
    own_device,
    peak_memory_gib,
)


@pytest.mark.parametrize(
    ("cuda", "mps", "local_rank", "expected"),
    [
        (True, True, None, "cuda:0"),
        (True, False, "3", "cuda:3"),
        (False, True, None, "mps"),
        (False, True, "0", "cpu"),
        (False, False, None, "cpu"),
        (False, False, "1", "cpu"),
    ],
)
def test_cuda_before_mps_before_cpu(monkeypatch, cuda, mps, local_rank, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert own_device(None) == expected


def test_processes_of_torchrun_do_not_share_a_gpu(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert own_device("cuda") == "cuda:2"
    assert own_device("cpu") == own_device("cpu:0") == "cpu"
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES"):
        own_device("cuda:1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert own_device("cuda:1") == "cuda:1"


@pytest.mark.parametrize(
    ("device", "backend"),
    [("cpu", "gloo"), ("mps", "gloo"), ("cuda", "nccl"), ("cuda:1", "nccl")],
)
def test_processes_speak_nccl_between_gpus_alone(device, backend):
    assert distributed_backend_for(device) == backend


def test_what_is_here_is_accepted():
    check_device("cpu")
    check_device(own_device(None))


@pytest.mark.parametrize("device", ["gpu", "cuda:9", "cpu:1", "cuda:x", "", "mps:7"])
def test_a_device_that_is_not_here_lists_the_usable_ones(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match=r"Usable: .*cpu"):
        check_device(device)


def test_gpus_are_counted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_device("cuda")
    check_device("cuda:1")
    with pytest.raises(UserError, match="Usable: cpu, cuda"):
        check_device("cuda:2")


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_fp16_without_cuda_is_one_error_that_names_what_works(device):
    with pytest.raises(UserError, match="Use --precision bf16 or fp32"):
        check_precision(device, "fp16")
    check_precision(device, "bf16")
    check_precision(device, "fp32")


def test_fp16_is_for_cuda():
    check_precision("cuda:0", "fp16")


def test_peak_memory_of_this_process_is_between_the_interpreter_and_the_machine():
    assert 0.01 < peak_memory_gib("cpu") < 10_000


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"
        ),
        MemoryError("4 GiB"),
    ],
)
def test_a_lack_of_memory_names_the_batch_and_the_keys_to_lower(error):
    with (
        pytest.raises(
            UserError, match=r"batch of 900 s: .* Lower max_batch_length_train or"
        ) as told,
        explained_memory(("max_batch_length_train", "batch_size"), lambda batch: f"{batch} s", 900),
    ):
        raise error
    assert "--gradient_checkpointing True" in str(told.value)
    assert "\n" not in str(told.value)


def test_other_faults_stay_what_they_are():
    with (
        pytest.raises(RuntimeError, match="shapes"),
        explained_memory(("batch_size",), str, 1),
    ):
        raise RuntimeError("shapes do not fit")


def test_a_cpu_has_no_memory_of_its_own_and_no_use():
    assert memory_gib("cpu") is None
    assert gpu_use_percent("cpu") is None


@pytest.mark.parametrize(
    ("forced", "message"),
    [
        ("fast", "MAMBA_ASR_SCAN=fast: it must be one of auto, "),
        ("mamba_ssm", "MAMBA_ASR_SCAN=mamba_ssm cannot be used here: .* ops.doctor"),
    ],
)
def test_a_backend_that_is_forced_and_not_there_is_named_at_the_start(monkeypatch, forced, message):
    from ops.selective_scan import mamba_ssm

    monkeypatch.setattr(mamba_ssm, "unavailable", lambda: "it is not installed")
    monkeypatch.setenv("MAMBA_ASR_SCAN", forced)
    with pytest.raises(UserError, match=message):
        check_forced_backend()
    monkeypatch.setenv("MAMBA_ASR_SCAN", "torch")
    check_forced_backend()
    with pytest.raises(
        UserError, match=message.replace("MAMBA_ASR_SCAN=", "mamba_config: backend: ")
    ):
        check_forced_backend({"d_state": 4, "backend": forced})
    check_forced_backend({"d_state": 4, "backend": "torch"})


@pytest.mark.parametrize(
    ("device", "machine", "can", "expected"),
    [
        ("cpu", "x86_64", {"avx512_f": True, "avx512_bf16": False}, False),
        ("cpu", "x86_64", {"avx512_bf16": True}, True),
        ("cpu", "AMD64", {"avx512_bf16": False, "amx_bf16": True}, True),
        ("cpu", "arm64", {}, True),
        ("cuda:0", "x86_64", {}, True),
    ],
)
def test_a_cpu_without_bf16_instructions_is_known(monkeypatch, device, machine, can, expected):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can, raising=False)
    assert computes_bf16(device) is expected
