"""Freed memory stays while a stage trains, and goes back to the system afterwards."""

import platform
from pathlib import Path

import pytest
import torch

from hf_fwp.conversion.memory import freed_memory_kept

MIB = 2**20


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0]) * 1024


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told what to do with freed memory")
def test_freed_memory_is_kept_inside_and_given_back_afterwards():
    with freed_memory_kept():
        blocks = [torch.ones(MIB // 4) for _ in range(256)]
        held = resident()
        del blocks
        assert resident() > held - 32 * MIB
    assert resident() < held - 192 * MIB
