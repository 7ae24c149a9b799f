"""Train a model on a synthetic task, count its right answers, and print them beside published ones."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import get_cosine_schedule_with_warmup

from .tasks import IGNORED, Tokens

Cell = tuple[str, str]
WIDTH = 120  # columns of a printed table


def fit(
    model: nn.Module,
    draw: Callable[[], Tokens],
    *,
    steps: int,
    learning_rate: float = 1e-3,
    warmup: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.999),
    done: Callable[[], bool] | None = None,
    every: int = 100,
) -> int:
    """Adam on the cross entropy of fresh batches, the rate rising over a `warmup` share of the steps, then a cosine.

    `model(tokens).logits` [N, T, labels] is compared with the labels of the same tokens. Training stops early when
    `done()`, asked every `every` steps, is true. Returns the number of steps made.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, betas=betas)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(warmup * steps), steps)
    model.train()
    for step in range(1, steps + 1):
        tokens, labels = draw()
        loss = F.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if done is not None and step % every == 0 and done():
            return step
    return steps


@torch.no_grad()
def right_answers(model: nn.Module, task: Tokens, *, batch: int = 64) -> Tensor:
    """[N, T]: 1 where the model's first choice is the label, 0 where it is not, NaN where nothing is asked."""
    training = model.training
    model.eval()
    rows = []
    for tokens, labels in zip(*(part.split(batch) for part in task), strict=True):
        right = (model(tokens).logits.argmax(-1) == labels).float()
        rows.append(right.masked_fill(labels == IGNORED, torch.nan))
    model.train(training)
    return torch.cat(rows)


def accuracy(right: Tensor, *, chance: float = 0.0) -> float:
    """The share of right answers, scaled so that `chance` is 0: (accuracy - chance) / (1 - chance)."""
    return (right.nanmean().item() - chance) / (1 - chance)


def sequence_accuracy(right: Tensor) -> float:
    """The share of sequences without a wrong answer."""
    return (right != 0).all(1).float().mean().item()


def print_beside(
    title: str,
    measured: Mapping[Cell, Sequence[float]],
    published: Mapping[Cell, float | str],
    *,
    source: str,
    digits: int = 3,
) -> None:
    """One table: mean ± standard deviation of the measured (one value per seed), in brackets the published.

    Cells are keyed by (row, column), in the order of their first appearance; `source`: where the published are from.
    """
    rows, columns = (list(dict.fromkeys(cell[side] for cell in measured)) for side in (0, 1))
    table = Table("", *columns, box=MARKDOWN)
    for row in rows:
        table.add_row(row, *(_cell((row, column), measured, published, digits) for column in columns))
    seeds = max(len(values) for values in measured.values())
    shown = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    print(f"{title}: {shown} (published: {source})")
    Console(width=WIDTH).print(table)


def _cell(cell: Cell, measured: Mapping[Cell, Sequence[float]], published: Mapping, digits: int) -> str:
    if cell not in measured:
        return ""
    values = measured[cell]
    spread = f" ± {statistics.pstdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread} ({published.get(cell, '-')})"
