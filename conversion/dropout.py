"""Leave the window beside fast weights out now and then while a student learns, so that it cannot do without them.

    rate(step) = start + (end - start) step / (steps - 1)

In a step a sequence goes through a mixer without its window with this probability (hf_fwp/window.py); published hybrids
were found to bypass their linear branch. Which ones follows from seed and step alone: they are the same after a resume,
and in several processes. A mixer without a window is left alone.

The family's own dropout, which its config has for a model that is trained from random weights, is no part of this: it
would be noise in what the student is asked to answer, so that a copy of the teacher had a loss (`without_own_dropout`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig as Config
from transformers import PreTrainedModel
from transformers.trainer_callback import TrainerCallback

from hf_fwp.layer import FastWeightLayer

from .processes import own_rows

NEVER = (0.0, 0.0)
NOISE = ("drop", "jitter")  # in the names of what makes a family's forward a random one in training


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


@contextmanager
def without_own_dropout(model: nn.Module) -> Iterator[None]:
    """Inside, no module of the family drops anything; mixers and adapters go on as they are. The model's config, and so
    what is saved, has the family's values all the time."""
    before: list[tuple[nn.Module, dict[str, Any]]] = []
    try:
        for module in modules_of_family(model):
            still: dict[str, Any] = dict.fromkeys(noise_of(module), 0.0)
            config = vars(module).get("config")
            if isinstance(config, Config) and not isinstance(module, PreTrainedModel):
                still["config"] = config_without(config)  # blocks of falcon read theirs
            before.append((module, {name: vars(module)[name] for name in still}))
            vars(module).update(still)
        yield
    finally:
        for module, values in before:
            vars(module).update(values)


def modules_of_family(module: nn.Module) -> Iterator[nn.Module]:
    """The module and those in it, but for mixers, and for what an adapter of peft has around its base_layer."""
    if isinstance(module, FastWeightLayer):
        return
    adapted = getattr(module, "base_layer", None)
    if adapted is None:
        yield module
    for child in module.children() if adapted is None else [adapted]:
        yield from modules_of_family(child)


def noise_of(holder: Any) -> list[str]:
    """The names of the probabilities that a module or a config holds."""
    held = [name for name, value in vars(holder).items() if isinstance(value, float)]
    if isinstance(holder, nn.Dropout):
        return held
    return [name for name in held if any(word in name for word in NOISE)]


def config_without(config: Config) -> Config:
    """A copy in which these are 0."""
    still = copy.copy(config)
    for name in noise_of(config):
        setattr(still, name, 0.0)
    return still
