"""Compiles the Triton kernels for a GPU that need not be there; `test_triton` runs this file.

The launching code says what to compile and Triton itself what to specialise it to: only the launch
is left out. All kernels are compiled to machine code but for the backward of the scan, which ends
with Triton's own intermediate language: the rest takes a minute.

Usage: compiled_triton.py CAPABILITY (80 for Ampere, 90 for Hopper)
"""

import itertools
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from triton.runtime import JITFunction

sys.path.insert(0, str(Path(__file__).parents[2]))

import ops.causal_conv1d.triton as convolution
from benchmarks.absent_gpu import ABSENT_GPU, KERNELS, Unlaunched, absent_gpu
from ops import triton_launcher
from ops.causal_conv1d.arguments import ConvArguments
from ops.selective_scan import triton as scan
from ops.selective_scan.arguments import ScanArguments, Way
from tests.gpu import test_kernels, test_networks
from tests.modules.networks import padded_batch, small_network
from tests.ops import scans, test_causal_conv1d

BATCH, DIM, STATES = 2, 64, 16


def call_scan(time: int, both_ways: bool, dtype: torch.dtype, bare: bool = False) -> None:
    """Forward and backward; ``bare`` without anything that may be absent, frames last."""

    def sequence(channels):
        if bare:
            return torch.empty(BATCH, channels, time, dtype=dtype)
        return torch.empty(BATCH, time, channels, dtype=dtype).transpose(1, 2)

    def way(reverse):
        projections = [sequence(STATES).unsqueeze(1) for _ in range(2)]
        D, bias = (None if bare else torch.empty(DIM) for _ in range(2))
        A = torch.empty(DIM, STATES)
        initial = None if bare or reverse else torch.empty(BATCH, DIM, STATES)
        return Way(sequence(DIM), sequence(DIM), A, *projections, D, bias, initial, reverse)

    ways = (way(False), way(True)) if both_ways else (way(bare),)
    z, lengths = (None, None) if bare else (sequence(DIM), torch.full((BATCH,), time))
    arguments = ScanArguments(ways, z, True, lengths)
    y, last_states, saved = scan.forward(arguments, True)
    grad_states = [None if bare else last_states[0].clone(), None][: len(ways)]
    scan.backward(y, grad_states, saved, arguments)


def call_convolution(time: int, dtype: torch.dtype) -> None:
    x = torch.empty(BATCH, time, DIM, dtype=dtype).transpose(1, 2)
    lengths = torch.full((BATCH,), time)
    state = torch.empty(BATCH, DIM, 3)
    arguments = ConvArguments(
        x, torch.empty(DIM, 4), torch.empty(DIM), "silu", lengths, True, state, 16
    )
    y, last_state = convolution.conv_forward(arguments)
    convolution.conv_backward(y, last_state, arguments)


def call_as_tests_of_the_gpu_do() -> None:
    """Calls of the kernels, for each precision and direction, and a network's in batches and alone.

    They take their tensors for those of a GPU; what comes out is uninitialised memory.
    """
    with (
        patch.object(scans, "device_of", lambda _: "cpu"),
        patch.object(test_causal_conv1d, "device_of", lambda _: "cpu"),
    ):
        for (dtype, reset_every, _), reverse, time in itertools.product(
            test_kernels.PRECISIONS, (False, True), test_kernels.TIMES
        ):
            inputs, options = test_kernels.scan_call(time, reverse, dtype, reset_every)
            scans.run("triton", inputs, **options)
            inputs, options = test_kernels.convolution_call(time, reverse, dtype, reset_every)
            test_causal_conv1d.run("triton", inputs, **options)
        network = small_network("conmamba", mamba_config={"d_state": 4, "backend": "triton"})
        for lengths in (test_networks.LENGTHS, *([length] for length in test_networks.LENGTHS)):
            test_networks.encode(network, *padded_batch(lengths), torch.device("cpu"))


def compile_wholly(kernel: Unlaunched) -> None:
    for compiled in kernel.compile_wholly():
        assert compiled.asm["cubin"]
        print(kernel.name, "shared memory", compiled.metadata.shared)


def compile_partly(kernel: Unlaunched) -> None:
    for module in kernel.compile_partly():
        print(kernel.name, "intermediate", len(str(module)))


def check(kernels: dict[str, Unlaunched]) -> None:
    forward, backward, ends, pack, *convolutions = list(kernels.values())[:6]
    around = list(kernels.values())[6:]
    # A step of training never has the length of the one before: one compilation must serve all,
    # those of one piece and of several.
    for time in (1, 7, 64, 400):
        call_scan(time, True, torch.bfloat16)
        call_convolution(time, torch.bfloat16)
    for kernel in (forward, backward, ends, pack, *convolutions):
        # What the frames of a piece leave of the state, and of its gradient.
        wanted = 2 if kernel is ends else 1
        assert len(kernel.variants) == wanted, (kernel.name, len(kernel.variants))
    for kernel in (forward, ends, pack, *convolutions):
        compile_wholly(kernel)
    compile_partly(backward)

    # Other calls: one way and few channels, and two of which nothing may be absent.
    forward.variants.clear()
    backward.variants.clear()
    call_scan(7, True, torch.float32, bare=True)
    call_scan(7, False, torch.float32)
    for kernel in (forward, backward):
        assert len(kernel.variants) == 2
        compile_partly(kernel)

    # Tests of a GPU wait for the compiler: a call of each precision and that of the network.
    for kernel in kernels.values():
        kernel.forget()
    call_as_tests_of_the_gpu_do()
    counts = {name: len(kernel.variants) for name, kernel in kernels.items()}
    assert list(counts.values()) == [3, 3, 4, 3, 3, 3, 1, 1, 1], counts
    for kernel in around:
        compile_wholly(kernel)


def check_second_launches() -> None:
    """A kernel that is found again is launched with what Triton itself would launch it with."""
    launched = []

    class Compiled:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *arguments: launched.append((self.name, grid, plain(arguments), "again"))

    def run(kernel, *arguments, grid, warmup, **options):
        binder = kernel.device_caches[ABSENT_GPU][4]
        bound, _, _ = binder(*arguments, debug=False, instrumentation_mode="", **options)
        launched.append((kernel.__name__, grid, plain(tuple(bound.values())), "first"))
        return Compiled(kernel.__name__)

    def plain(arguments):
        return [
            (x.shape, x.stride(), x.dtype)
            if isinstance(x, torch.Tensor)
            else plain(x)
            if isinstance(x, tuple)
            else x
            for x in arguments
        ]

    with patch.object(JITFunction, "run", run):
        call_scan(400, True, torch.bfloat16)
        call_convolution(400, torch.bfloat16)
        first = list(launched)
        launched.clear()
        call_scan(400, True, torch.bfloat16)
        call_convolution(400, torch.bfloat16)
    assert {kind for *_, kind in launched} == {"again"}
    assert [x[:3] for x in launched] == [x[:3] for x in first]
    print("second launches", len(launched))
    triton_launcher.forget()


def main(capability: int) -> None:
    assert sum(map(len, KERNELS.values())) == 9
    with absent_gpu(capability) as kernels:
        check_second_launches()
        check(kernels)


if __name__ == "__main__":
    main(int(sys.argv[1]))
