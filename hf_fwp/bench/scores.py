"""What a rule can learn to do: small models trained on synthetic tasks, and asked beyond what they were trained on.

    parity    odd or even, on strings as long as in training and on longer ones
    mqar      as many pairs recalled as in training
    capacity  the same with more pairs than a head has key channels
    needle    one pair found in a text as long as in training, and in one four times as long

The generators are in tasks.py. Every rule gets the same model around it, the same batches and the same steps; full
softmax attention stands beside them.
"""

from __future__ import annotations

import json as jsonlib
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import rich.table
import torch
from transformers import AutoModelForTokenClassification

from ..card import commit
from ..configuration import FwpConfig
from ..estimates import duration
from ..files import write_whole
from ..rules import RULES
from ..telling import progress_bar, say, tell
from . import tasks
from .cpu import cpu_name
from .learning import fit, right_answers

Make = Callable[[int, torch.Generator], tasks.Tokens]
ATTENTION = "full_attention"
RULES_SHOWN = (ATTENTION, "linear_attention", "delta_net", "gated_delta_net")
TESTS = 128  # sequences
SYMBOLS = 64
FEW = 5  # steps of a training whose time is measured


@dataclass(frozen=True)
class Task:
    """One training, and what the model is asked after it: name -> sequences."""

    vocabulary: int
    train: Make
    asked: Mapping[str, Make]
    config: Mapping[str, Any]
    rate: float = 1e-3
    """Learning rate; at 3e-3 a delta net has not found a needle after 1000 steps, at 1e-3 it begins to after 200."""


def _parity(shortest: int, longest: int) -> Make:
    return lambda count, draw: tasks.parity(count, shortest=shortest, longest=longest, generator=draw)


def _mqar(length: int, pairs: int) -> Make:
    return lambda count, draw: tasks.mqar(count, length, pairs=pairs, generator=draw, vocabulary=2 * SYMBOLS)


def _needle(length: int) -> Make:
    return lambda count, draw: tasks.needle(count, length, generator=draw, symbols=SYMBOLS)


TASKS = {
    "parity": Task(
        3,
        _parity(2, 32),
        {"parity, length 32": _parity(32, 32), "parity, length 128": _parity(128, 128)},
        {"allow_neg_eigval": True},
        rate=3e-3,
    ),
    "recall": Task(
        2 * SYMBOLS,
        _mqar(128, 8),
        {"mqar, 8 pairs": _mqar(128, 8), "capacity, 24 pairs": _mqar(128, 24)},
        {},
    ),
    "needle": Task(
        3 * SYMBOLS,
        _needle(64),
        {"needle, length 64": _needle(64), "needle, length 256": _needle(256)},
        {},
    ),
}
QUESTIONS = tuple(name for task in TASKS.values() for name in task.asked)


def bench_tasks(
    *,
    rules: Sequence[str] = RULES_SHOWN,
    steps: int = 1000,
    seeds: int = 1,
    json: str | Path | None = None,
    plot: str | Path | None = None,
    progress: bool = True,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Train a model of every rule on every task and print the shares of right answers.

    dry_run: print the trainings and how long they take, by two of each of a few steps; return nothing.

    With `json` every score is written as soon as it is known; a run that finds the file, made with the same settings,
    goes on from it. Raises ValueError for an unknown rule, steps or seeds below 1, a file of other settings.
    """
    unknown = [rule for rule in rules if rule not in (*RULES, ATTENTION)]
    if unknown:
        raise ValueError(f"unknown rule {unknown[0]!r}; choose from {ATTENTION}, {', '.join(RULES)}")
    if steps < 1 or seeds < 1:
        raise ValueError(f"steps is {steps} and seeds {seeds}; both must be at least 1")
    settings = {"steps": steps, "seeds": seeds}
    result = _started(json, settings)
    left = [(rule, name) for rule in rules for name in TASKS if not _known(result["rows"], rule, name)]
    if dry_run:
        seconds = seeds * sum(_seconds(rule, name, steps) for rule, name in left)
        say(f"{seeds * len(left)} trainings of {steps} steps: {duration(seconds)}")
        return {}
    for rule, name in progress_bar(left, desc="trainings", progress=progress):
        scores = [scored(rule, name, steps=steps, seed=seed) for seed in range(seeds)]
        result["rows"] += [_row(rule, asked, [found[asked] for found in scores]) for asked in TASKS[name].asked]
        if json is not None:
            write_whole(Path(json), jsonlib.dumps(result, indent=2) + "\n")
    tell(table(result))
    if plot is not None:
        draw(result, Path(plot))
    return result


def _seconds(rule: str, name: str, steps: int) -> float:
    """Of one training and its questions, by a training of FEW steps and one of a single step."""
    times = []
    for count in (1, FEW):
        started = time.perf_counter()
        scored(rule, name, steps=count, seed=0)
        times.append(time.perf_counter() - started)
    return times[0] + max(0.0, times[1] - times[0]) * (steps - 1) / (FEW - 1)


def scored(rule: str, name: str, *, steps: int, seed: int, batch: int = 32) -> dict[str, float]:
    """The shares of right answers of one model, by question."""
    task = TASKS[name]
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    options = {} if rule == ATTENTION or "beta" not in RULES[rule].inputs else task.config
    config = FwpConfig(
        rule=rule,
        vocab_size=task.vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        position_embedding="rope" if rule == ATTENTION else "none",
        use_cache=False,
        **options,
    )
    config.num_labels = task.vocabulary
    model = AutoModelForTokenClassification.from_config(config)
    fit(model, lambda: task.train(batch, generator), steps=steps, learning_rate=task.rate)
    test = torch.Generator().manual_seed(10_000 + seed)
    return {asked: right_answers(model, make(TESTS, test)).nanmean().item() for asked, make in task.asked.items()}


def _row(rule: str, asked: str, scores: Sequence[float]) -> dict[str, Any]:
    mean, spread = statistics.mean(scores), statistics.pstdev(scores)
    return {"rule": rule, "task": asked, "accuracy": mean, "accuracy_spread": spread}


def _started(json: str | Path | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the file holds already, or an empty result."""
    if json is not None and Path(json).exists():
        found = jsonlib.loads(Path(json).read_text())
        if found.get("settings") != dict(settings):
            raise ValueError(f"{json} was made with {found.get('settings')}, not {dict(settings)}; give another file")
        return found
    machine = {"date": date.today().isoformat(), "commit": commit(), "device": cpu_name(), "torch": torch.__version__}
    return {"machine": machine | {"python": platform.python_version()}, "settings": dict(settings), "rows": []}


def _known(rows: Sequence[Mapping[str, Any]], rule: str, name: str) -> bool:
    return {(rule, asked) for asked in TASKS[name].asked} <= {(row["rule"], row["task"]) for row in rows}


def table(result: Mapping[str, Any]) -> rich.table.Table:
    """Rules as rows, questions as columns."""
    scores = {(row["rule"], row["task"]): row for row in result["rows"]}
    about = result["machine"]
    title = f"right answers after {result['settings']['steps']} steps, {about['device']}, torch {about['torch']}"
    found = rich.table.Table("", *QUESTIONS, title=title)
    for rule in dict.fromkeys(row["rule"] for row in result["rows"]):
        found.add_row(rule, *(_cell(scores.get((rule, asked))) for asked in QUESTIONS))
    return found


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    return f"{row['accuracy']:.3f}" + (f" ± {row['accuracy_spread']:.3f}" if row["accuracy_spread"] else "")


def draw(result: Mapping[str, Any], file: Path) -> None:
    """The scores as bars, one group for each question; the format is the file's ending."""
    from matplotlib import rc_context

    from ..look import FIGURES
    from .plots import bars

    series: dict[str, dict[str, float]] = {}
    for row in result["rows"]:
        series.setdefault(row["rule"], {})[row["task"]] = row["accuracy"]
    with rc_context(FIGURES):
        bars(series, axis="right answers").savefig(file)
