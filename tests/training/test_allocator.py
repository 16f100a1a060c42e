import platform
import subprocess
import sys

import pytest

# In a process of its own: the setting cannot be taken back.
SCRIPT = """
import resource, sys, torch
from training.launch.allocator import keep_freed_memory

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.empty(9 * 2**20).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

default = page_faults()
assert keep_freed_memory()
for _ in range(3):  # until the heap holds room for an aligned block
    page_faults()
sys.exit(0 if page_faults() < default / 10 else 1)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_tensors_freed_are_not_cleared_by_the_system_again():
    subprocess.run([sys.executable, "-c", SCRIPT], check=True)
