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


# More than fits into mallopt's int; reserved, but never written to.
GIGABYTES = """
import ctypes, re, sys
from training.launch.allocator import keep_freed_memory

def heap_bytes():
    with open("/proc/self/maps") as lines:
        first, last = re.search(r"(\\w+)-(\\w+) .*\\[heap\\]", lines.read()).groups()
    return int(last, 16) - int(first, 16)

assert keep_freed_memory()
libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
blocks = [libc.malloc(900 * 2**20) for _ in range(3)]
before = heap_bytes()
if before < 2.5e9:
    sys.exit(3)
for block in blocks:
    libc.free(block)
sys.exit(0 if heap_bytes() == before else 1)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_tensors_freed_are_not_cleared_by_the_system_again():
    subprocess.run([sys.executable, "-c", SCRIPT], check=True)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_gigabytes_are_not_given_back():
    status = subprocess.run([sys.executable, "-c", GIGABYTES]).returncode
    if status == 3:
        pytest.skip("the heap cannot grow by three gigabytes here")
    assert status == 0
