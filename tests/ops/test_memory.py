"""What the operations keep and hold: little, and nothing of size (batch, dim, time, state)."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modules.mamba import Mamba
from tests.ops.scans import FAST

on_cpu = pytest.mark.parametrize(
    "backend", [name for name in FAST if name not in ("triton", "mamba_ssm")]
)

PEAK = """
import resource, sys, torch
from ops.selective_scan import selective_scan_fn

torch.set_num_threads(2)

def megabytes():
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit

def scan(time, dim=64, state=128):
    u = torch.randn(1, time, dim).transpose(1, 2).requires_grad_()
    B = torch.randn(1, time, state).transpose(1, 2)
    A = -torch.rand(dim, state)
    y = selective_scan_fn(
        u, u, A, B, B, z=u, delta_softplus=True, reverse=True, backend=sys.argv[1]
    )
    y.backward(y.detach())

scan(256)
before = megabytes()
scan(int(sys.argv[2]))
print(megabytes() - before)
"""


@on_cpu
def test_nothing_of_the_size_of_all_states_is_ever_held(backend):
    time = 8192
    states = time * 64 * 128 * 4 / 2**20
    result = subprocess.run(
        [sys.executable, "-c", PEAK, backend, str(time)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    # Inputs, outputs and gradients are 128 times smaller each than the 256 MB of all states.
    assert float(result.stdout) < states / 2


def bytes_kept(function, *, of):
    """Storage that autograd keeps for a call, but for the tensors ``of``, each storage once."""
    exempt = {x.untyped_storage().data_ptr() for x in of}
    kept = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in exempt:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        # The result is held, lest its memory serve twice and be counted once.
        result = function()
    assert result.requires_grad
    return sum(kept.values())


@on_cpu
@pytest.mark.parametrize("d_model", [144, 256])
@pytest.mark.parametrize("time", [250, 400])
def test_a_bidirectional_layer_keeps_at_most_eight_times_its_input(backend, d_model, time):
    torch.manual_seed(0)
    mixer = Mamba(d_model, bidirectional=True, backend=backend)
    x_BTD = torch.randn(2, time, d_model, requires_grad=True)
    lengths = torch.tensor([time, time - 50])
    kept = bytes_kept(lambda: mixer(x_BTD, lengths), of=[x_BTD, *mixer.parameters()])
    assert 0 < kept <= 8 * x_BTD.nbytes


@on_cpu
def test_without_gradients_nothing_is_kept(backend):
    mixer = Mamba(32, bidirectional=True, backend=backend)
    x_BTD = torch.randn(2, 30, 32)
    with torch.no_grad():
        assert mixer(x_BTD).grad_fn is None
    for parameter in mixer.parameters():
        parameter.requires_grad_(False)
    assert mixer(x_BTD).grad_fn is None


@on_cpu
def test_gradients_lie_in_memory_as_their_inputs_do(backend):
    """Channels last in, channels last out: no transposition anywhere in a mixer."""
    mixer = Mamba(32, bidirectional=True, backend=backend)
    seen = []
    mixer.in_proj.register_full_backward_hook(lambda module, _, grads: seen.append(grads[0]))
    mixer(torch.randn(2, 30, 32, requires_grad=True)).sum().backward()
    (grad_xz_BTF,) = seen
    assert grad_xz_BTF.is_contiguous()
