"""Leave the window beside fast weights out now and then while a student learns, so that it cannot do without them.

    rate(step) = start + (end - start) step / (steps - 1)

In a step a sequence goes through a mixer without its window with this probability (hf_fwp/window.py); published hybrids
were found to bypass their linear branch. A mixer without a window is left alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers.trainer_callback import TrainerCallback

from hf_fwp.layer import FastWeightLayer

NEVER = (0.0, 0.0)


def rate(schedule: Sequence[float], step: int, *, steps: int) -> float:
    """The probability in `step`, counted from 0: on the line between both numbers of `schedule`."""
    if len(schedule) != 2 or not all(0 <= end <= 1 for end in schedule):
        raise ValueError(
            f"window_dropout is {schedule!r}; give two probabilities from 0 to 1, of the first and of the last step"
        )
    start, end = schedule
    return start + (end - start) * min(1.0, step / max(1, steps - 1))


def set_rate(mixers: Iterable[FastWeightLayer], value: float) -> None:
    """Give the windows of `mixers` this probability."""
    for mixer in mixers:
        if mixer.window is not None:
            mixer.window.dropout = value


@contextmanager
def dropping(mixers: Iterable[FastWeightLayer], value: float, *, seed: int) -> Iterator[None]:
    """Windows are left out with this probability, drawn by `seed`; outside, and in all other draws, as before."""
    mixers = [mixer for mixer in mixers if mixer.window is not None]
    if not mixers or not value:
        yield
        return
    devices = {parameter.device for mixer in mixers for parameter in mixer.parameters()}
    with torch.random.fork_rng([device for device in devices if device.type == "cuda"]):
        torch.manual_seed(seed)
        set_rate(mixers, value)
        try:
            yield
        finally:
            set_rate(mixers, 0.0)


class WindowDropout(TrainerCallback):
    """The same in a Trainer, whose checkpoints hold the state of the generator that draws."""

    def __init__(self, mixers: Iterable[FastWeightLayer], schedule: Sequence[float]) -> None:
        self.mixers, self.schedule = list(mixers), schedule
        rate(schedule, 0, steps=1)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        set_rate(self.mixers, rate(self.schedule, state.global_step, steps=state.max_steps))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        set_rate(self.mixers, 0.0)
