"""Several processes that convert together, as `accelerate launch` or torchrun start them.

    meet(device)          join the others, if there are any
    own_rows(ids_BT)      this process's share of a step, whose sums are `summed` over all of them
    first_says(what)      where they could differ, what the first one has found counts for all
    is_first(), wait()    the first one writes files, the others wait until it has

Alone, a process is the first one, and everything is its own.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

Anything = TypeVar("Anything")


def meet(device: torch.device | str | None) -> None:
    """Join the other processes that were launched with this one, if that has not happened yet."""
    if dist.is_available() and dist.is_torchelastic_launched() and not dist.is_initialized():
        PartialState(cpu=torch.device(device or "cpu").type == "cpu")  # gives every process a GPU of its own


def processes() -> int:
    """How many there are that work together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the process that writes files and shows progress."""
    return processes() == 1 or dist.get_rank() == 0


def wait() -> None:
    """Until all processes are here."""
    if processes() > 1:
        dist.barrier()


def summed(part: Tensor) -> Tensor:
    """In place, the sum over all processes."""
    if processes() > 1:
        dist.all_reduce(part)
    return part


def first_says(what: Anything) -> Anything:
    """What the first process has; tensors are not copied to other devices."""
    if processes() == 1:
        return what
    said = [what]
    dist.broadcast_object_list(said, src=0)
    return said[0]


def copy_first(parts: dict[str, Tensor]) -> None:
    """In place, the numbers of the first process in tensors that all have."""
    if processes() > 1:
        for part in parts.values():
            dist.broadcast(part, src=0)


def own_rows(ids_BT: Tensor) -> Tensor:
    """The sequences of a batch that fall to this process; there is at least one for each."""
    if processes() == 1:
        return ids_BT
    if len(ids_BT) < processes():
        raise ValueError(f"{processes()} processes cannot share a step of {len(ids_BT)} sequences; raise batch_size")
    return ids_BT.tensor_split(processes())[dist.get_rank()]
