"""Memory: when what is freed goes back to the system, activations that are computed anew instead of kept, and tensors
that lie in files.

What is freed goes back as soon as possible while solving, not at all while training: a training step asks for what the
step before has freed, and glibc gives large blocks back to the system and gets fresh pages for them, filled with zeros,
a step later. On two cores that took 2 of the 11.5 s of a distillation step (SmolLM2-135M, 2048 tokens).
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import platform
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
NEVER = -1
LARGEST = 32 << 20  # the most that glibc takes; it moves there by itself as large blocks are freed


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Inside, freed memory stays with the process; afterwards it is given back. Only where the C library is glibc."""
    libc = _glibc()
    if libc is not None:
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST)
        libc.mallopt(M_TRIM_THRESHOLD, NEVER)
    try:
        yield
    finally:
        if libc is not None:
            libc.mallopt(M_TRIM_THRESHOLD, 2 * LARGEST)
        give_back_freed_memory()


def give_back_freed_memory() -> None:
    """Let the system have what is free between blocks still in use: the peak is then the sum of what is in use."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def mapped(folder: Path, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros in a file of `folder` that is gone when the tensor is. OSError where the disk has no room for it."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate") and math.prod(shape):
            # without room of its own a page that finds the disk full kills the process
            os.posix_fallocate(file.fileno(), 0, math.prod(shape) * dtype.itemsize)
        return torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=dtype).view(*shape)


def forget(tensor: Tensor) -> None:
    """Give back the memory of a mapped tensor, whose numbers are read from its file when they are next asked for."""
    libc = _glibc()
    if libc is not None:
        libc.madvise(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes), mmap.MADV_DONTNEED)


def recompute_activations(model: Any, *, on: bool) -> None:
    """Turn on or off that a backward computes the activations of a layer anew, which transformers renamed in 5.23."""
    verb = "enable" if on else "disable"
    name = f"activation_checkpointing_{verb}"
    getattr(model, name if hasattr(model, name) else f"gradient_checkpointing_{verb}")()


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
