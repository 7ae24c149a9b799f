"""Leave the window beside fast weights out now and then while a student learns, so that it cannot do without them.

    rate(step) = start + (end - start) step / (steps - 1)

In a step a sequence goes through a mixer without its window with this probability (hf_fwp/window.py); published hybrids
were found to bypass their linear branch. Which ones follows from seed and step alone: they are the same after a resume,
and in several processes. A mixer without a window is left alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_callback import TrainerCallback

from hf_fwp.layer import FastWeightLayer

from .processes import own_rows

NEVER = (0.0, 0.0)


def rate(schedule: Sequence[float], step: int, *, steps: int) -> float:
    """The probability in `step`, counted from 0: on the line between both numbers of `schedule`."""
    if len(schedule) != 2 or not all(0 <= end <= 1 for end in schedule):
        raise ValueError(
            f"window_dropout is {schedule!r}; give two probabilities from 0 to 1, of the first and of the last step"
        )
    start, end = schedule
    return start + (end - start) * min(1.0, step / max(1, steps - 1))


def drawn(probability: float, *, mixers: int, sequences: int, seed: int) -> Tensor:
    """[mixers, sequences]: which sequences of a step go through which mixer without its window. Of several processes
    each gets the columns of its own sequences."""
    generator = torch.Generator().manual_seed(seed)
    return own_rows((torch.rand(mixers, sequences, generator=generator) < probability).T).T


def leave_out(mixers: Sequence[FastWeightLayer], dropped_MB: Tensor | None) -> None:
    """From now on these sequences go without the windows of `mixers`; None: none does."""
    for number, mixer in enumerate(mixers):
        if mixer.window is not None:
            mixer.window.dropped_B = None if dropped_MB is None else dropped_MB[number]


@contextmanager
def leaving_out(mixers: Sequence[FastWeightLayer], dropped_MB: Tensor) -> Iterator[None]:
    """The same inside; outside, all have their windows."""
    leave_out(mixers, dropped_MB)
    try:
        yield
    finally:
        leave_out(mixers, None)


class WindowDropout(TrainerCallback):
    """The same in every step of a Trainer, over all the `sequences` that its processes read in one."""

    def __init__(
        self, mixers: Sequence[FastWeightLayer], schedule: Sequence[float], *, sequences: int, seed: int
    ) -> None:
        self.mixers, self.schedule, self.sequences, self.seed = mixers, schedule, sequences, seed
        rate(schedule, 0, steps=1)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        probability = rate(self.schedule, state.global_step, steps=state.max_steps)
        seed = self.seed + state.global_step
        leave_out(self.mixers, drawn(probability, mixers=len(self.mixers), sequences=self.sequences, seed=seed))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        leave_out(self.mixers, None)
