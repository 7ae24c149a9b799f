"""Runs that are going to be killed: a conversion and a training, each of which continues what it finds on the disk.

Importable by a server that forks: a child starts at once, with everything imported and no thread of its parent.
"""

import functools
import importlib
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from tiny import TEXTS
from tiny_fwp import tiny_model
from transformers import Trainer, TrainingArguments

from hf_fwp.conversion.distil import newest_checkpoint
from hf_fwp.conversion.recipes import RECIPES, Recipe

verb = importlib.import_module("hf_fwp.conversion.convert")
importlib.import_module("hf_fwp.conversion.trainer")
calibration = importlib.import_module("hf_fwp.conversion.calibrate")

LENGTH = 16
STEPS = 8


FEW = {"tokens": 2 * LENGTH, "baseline_tokens": 0, "residual_tokens": 0, "lengths": (), "prompts": (), "needles": 0}
SMALL = Recipe(
    "quick",
    "small",
    sequence_length=LENGTH,
    solve_tokens=7 * LENGTH,
    align_tokens=STEPS * LENGTH,
    align={"save_every": 1, "batch_size": 1},
    distil_tokens=STEPS * LENGTH,
    distil={"save_every": 1, "batch_size": 1},
)


def convert(teacher: Path, output: Path) -> None:
    """All stages on few tokens, with a saved step after every gradient step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verb, "REPORT_TOKENS", 2 * LENGTH)
        patch.setattr(verb, "_MEASURES", FEW)
        patch.setattr(calibration, "ROUNDS", (({"rotate": (False, True)},),) * 2)
        patch.setitem(RECIPES, "quick", SMALL)
        verb.convert(teacher, keep=[1], recipe="quick", data=TEXTS, output=output, resume=True)


def train(output: Path) -> None:
    """A plain Trainer that saves after every step; the finished model is renamed into place."""
    ids = torch.randint(1, 60, (STEPS, 12), generator=torch.Generator().manual_seed(0))
    work = output.with_name(output.name + ".steps")
    args = TrainingArguments(
        output_dir=str(work),
        max_steps=STEPS,
        per_device_train_batch_size=1,
        save_steps=1,
        save_total_limit=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(tiny_model(dtype=torch.float32), args, train_dataset=[{"input_ids": x, "labels": x} for x in ids])
    trainer.train(resume_from_checkpoint=newest_checkpoint(work))
    trainer.save_model(str(output.with_name("unfinished")))
    output.with_name("unfinished").rename(output)


@functools.cache
def server() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["interrupted"])
    # Python before 3.13 forgets to tell it where to import from (python/cpython#117378)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        forkserver.ensure_running()
    return context


def names_in(folder: Path) -> set[str]:
    return {os.path.join(place, name) for place, _, files in os.walk(folder) for name in files}


def run_with_kills(run: Callable[..., None], *args: Path, names: int, kills: int, seed: int) -> int:
    """Run until it ends by itself, killed up to `kills` times the moment that a random new file appears.

    `names` is about how many files a whole run makes. The last argument is the output; returns the kills that happened.
    """
    draw, folder, killed = random.Random(seed), args[-1].parent, 0
    while True:
        child = server().Process(target=run, args=args)
        seen, start, spared = set(), names_in(folder), draw.randrange(1, max(2, names // max(1, kills)))
        child.start()
        while child.is_alive():
            seen |= names_in(folder) - start
            if killed < kills and len(seen) >= spared:
                child.kill()
                killed += 1
                break
            time.sleep(0.0005)
        child.join()
        if child.exitcode == 0:
            return killed
        assert child.exitcode == -9, f"the run failed by itself with exit status {child.exitcode}"
