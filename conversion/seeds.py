"""Random numbers that depend on a seed alone, and leave those of the caller as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

SEEDS = 2**32  # as many as numpy, which the Trainer seeds too, can be given


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, the global generators start at `seed`; outside, they go on where they were."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


def check_seed(seed: Any) -> None:
    """Refuse what is no seed for all that draw."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < SEEDS:
        raise ValueError(f"seed is {seed!r}; give a whole number from 0 to {SEEDS - 1}")
