"""Results of many megabytes are marked for large pages, everything else is left alone."""

import re
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from ops.large_pages import ask_for_large_pages
from ops.native import empty_like

SMAPS = Path("/proc/self/smaps")
LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
needs_linux = pytest.mark.skipif(
    sys.platform != "linux" or not LARGE_PAGES.is_file(), reason="transparent huge pages of Linux"
)


def is_marked(address: int) -> bool:
    """Whether the mapping that holds an address has the flag of madvise(MADV_HUGEPAGE)."""
    inside = False
    for line in SMAPS.read_text(encoding="ascii", errors="replace").splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            first, last = (int(number, 16) for number in found.groups())
            inside = first <= address < last
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError(f"no mapping holds {address:#x}")


@needs_linux
@pytest.mark.parametrize("layout", ["frames last", "channels last"])
def test_a_large_result_is_marked_and_holds_what_is_written(layout):
    x = torch.empty(8, 512, 4000) if layout == "frames last" else torch.empty(8, 4000, 512).mT
    y = empty_like(x)
    assert y.stride() == x.stride()
    assert is_marked(y.data_ptr() + y.numel() * 2)
    y.copy_(torch.arange(4000.0).expand_as(y))
    assert torch.equal(y[3, 7], torch.arange(4000.0))


@needs_linux
def test_a_small_one_is_not():
    # Too large for the C library's heap, where marked memory may be used again.
    memory = torch.empty(1 << 26)
    ask_for_large_pages(memory[: 1 << 18])
    assert not is_marked(memory.data_ptr() + 4096)
    ask_for_large_pages(memory)
    assert is_marked(memory.data_ptr() + 4096)


def test_tensors_without_memory_pass():
    assert ask_for_large_pages(torch.empty(1 << 22, device="meta")).device.type == "meta"
    with FakeTensorMode():
        assert ask_for_large_pages(torch.empty(1 << 22)).shape == (1 << 22,)
