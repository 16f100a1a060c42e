"""Compiles the Triton kernels for a GPU that need not be there; `test_triton` runs this file.

The launching code itself says what to compile: kernels are replaced by something that takes down
what they are called with. All are compiled to machine code but for the backward of the scan, which
ends with Triton's own intermediate language: the rest takes a minute.

Usage: compiled_triton.py CAPABILITY (80 for Ampere, 90 for Hopper)
"""

import sys
from pathlib import Path

import torch
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

sys.path.insert(0, str(Path(__file__).parents[2]))

import ops.causal_conv1d.triton as convolution
from ops.causal_conv1d import triton_kernels
from ops.selective_scan import triton as scan
from ops.selective_scan import triton_launch
from ops.selective_scan.arguments import Way

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
}


class Recorder:
    """Stands for a kernel: keeps the arguments of its last launch."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, _grid):
        return self._launch

    def _launch(self, *arguments, num_warps=4, **constants):
        self.num_warps = num_warps
        self.arguments = {
            **dict(zip(self.kernel.arg_names, arguments, strict=False)),
            **constants,
        }

    def source(self) -> ASTSource:
        """What Triton would specialise the kernel to for these arguments."""
        constants, attributes = {}, {}

        def describe(value, path, constant=False):
            if constant or value is None or (type(value) is int and value == 1):
                constants[path] = value
                return "constexpr"
            if isinstance(value, tuple):
                fields = [describe(x, (*path, i)) for i, x in enumerate(value)]
                return type(value)(*fields) if hasattr(value, "_fields") else tuple(fields)
            tensor = isinstance(value, torch.Tensor)
            if (value.data_ptr() if tensor else value) % 16 == 0:
                attributes[path] = [["tt.divisibility", 16]]
            return TYPES[value.dtype] if tensor else "i32"

        signature = {
            name: describe(self.arguments[name], (i,), self.kernel.params[i].is_constexpr)
            for i, name in enumerate(self.kernel.arg_names)
        }
        return ASTSource(
            fn=self.kernel, signature=signature, constexprs=constants, attrs=attributes
        )


def record(module, *names):
    recorders = [Recorder(getattr(module, name)) for name in names]
    for name, recorder in zip(names, recorders, strict=True):
        setattr(module, name, recorder)
    return recorders


def record_scan(dtype, both_ways):
    forward, backward, pack = record(
        triton_launch,
        "selective_scan_forward_kernel",
        "selective_scan_backward_kernel",
        "pack_projection_kernel",
    )
    batch, time, dim, states = 2, 64, 64, 16

    def sequence(channels):
        return torch.empty(batch, time, channels, dtype=dtype).transpose(1, 2)

    def way(reverse):
        projections = [sequence(states).unsqueeze(1) for _ in range(2)]
        parameters = [torch.empty(dim), torch.empty(dim)]
        A = torch.empty(dim, states)
        return Way(sequence(dim), sequence(dim), A, *projections, *parameters, reverse, None, None)

    ways = [way(False), way(True)] if both_ways else [way(False)]
    z, lengths = sequence(dim), torch.full((batch,), time)
    # Plenty of channels for the GPU: the case that has to be fast.
    triton_launch._num_multiprocessors = lambda _: 0
    y, last_states, saved = scan.forward(ways, z, True, lengths, True)
    scan.backward(y, [state.clone() for state in last_states], saved, ways, z, True, lengths)
    return forward, backward, pack


def record_convolution(dtype):
    forward, backward = record(
        triton_kernels, "causal_conv1d_forward_kernel", "causal_conv1d_backward_kernel"
    )
    x = torch.empty(2, 64, 64, dtype=dtype).transpose(1, 2)
    call = (x, torch.empty(64, 4), torch.empty(64), "silu", torch.full((2,), 64))
    state = torch.empty(2, 64, 3)
    y, last_state = convolution.conv_forward(*call, True, state, 16)
    convolution.conv_backward(y, last_state, *call, True, state, 16)
    return forward, backward


def compile_wholly(recorder, target):
    options = {"num_warps": recorder.num_warps}
    compiled = triton.compile(recorder.source(), target=target, options=options)
    assert compiled.asm["cubin"]
    print(recorder.kernel.__name__, "shared memory", compiled.metadata.shared)


def compile_partly(recorder, target):
    backend = make_backend(target)
    options = backend.parse_options({"num_warps": recorder.num_warps})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    module = recorder.source().make_ir(
        target,
        options,
        backend.get_codegen_implementation(options),
        backend.get_module_map(),
        context,
    )
    print(recorder.kernel.__name__, "intermediate", len(str(module)))


def main(capability: int) -> None:
    target = GPUTarget("cuda", capability, 32)
    forward, backward, pack = record_scan(torch.bfloat16, both_ways=False)
    compile_wholly(forward, target)
    compile_wholly(pack, target)
    compile_partly(backward, target)
    for recorder in record_convolution(torch.bfloat16):
        compile_wholly(recorder, target)


if __name__ == "__main__":
    main(int(sys.argv[1]))
