"""Memory: when what is freed goes back to the system, and activations that are computed anew instead of kept.

What is freed goes back as soon as possible while solving, not at all while training: a training step asks for what the
step before has freed, and glibc gives large blocks back to the system and gets fresh pages for them, filled with zeros,
a step later. On two cores that took 2 of the 11.5 s of a distillation step (SmolLM2-135M, 2048 tokens).
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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


def recompute_activations(model: Any, *, on: bool) -> None:
    """Turn on or off that a backward computes the activations of a layer anew, which transformers renamed in 5.23."""
    verb = "enable" if on else "disable"
    name = f"activation_checkpointing_{verb}"
    getattr(model, name if hasattr(model, name) else f"gradient_checkpointing_{verb}")()


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
