"""Freed memory stays while a stage trains, and goes back to the system afterwards; mapped tensors lie in files."""

import errno
import os
import platform
from pathlib import Path

import pytest
import torch

from hf_fwp.conversion.memory import forget, freed_memory_kept, mapped

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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told what to do with mapped memory")
def test_a_mapped_tensor_leaves_the_memory_and_keeps_its_numbers(tmp_path):
    numbers = torch.arange(16 * MIB, dtype=torch.float32)
    tensor = mapped(tmp_path / "new", (16, MIB), torch.float32).copy_(numbers.view(16, MIB))
    held = resident()
    forget(tensor)
    assert resident() < held - 60 * MIB
    assert torch.equal(tensor.flatten(), numbers)
    assert not list((tmp_path / "new").iterdir())


def test_a_disk_without_room_is_told_before_anything_is_written_to_it(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        mapped(tmp_path, (4,), torch.float32)
    assert not list(tmp_path.iterdir())
