"""The gated delta rule on a CPU, its decay one per head or one per channel, beside what transformers runs there.

Both get the same tensors, in turns, in one process: other work on the machine then slows both alike. The median counts.
"""

from __future__ import annotations

import json as jsonlib
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import rich.table
import torch
import transformers

from ..card import commit
from ..estimates import duration
from ..telling import say, tell
from . import decode
from .decode import token
from .kernels import CHUNK, Shape, backward, forward, inputs, ours, transformers_fallback

# B, T, H, D
SHAPES: tuple[Shape, ...] = ((1, 2048, 9, 64), (1, 4096, 16, 128))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LARGEST = 2**30  # bytes
PART = 8  # of a sequence, a dry run times one


def bench_cpu(
    *,
    json: str | Path | None = None,
    shapes: Sequence[tuple[int, int, int, int]] = SHAPES,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    repeats: int = 11,
    threads: int = 2,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Time forward, forward + backward and one decode step; print a table, and write it to `json` when given.

    dry_run: print what would be timed and how long that takes, found with sequences of an eighth, and return nothing.
    """
    unknown = [name for name in dtypes if name not in DTYPES]
    if unknown:
        raise ValueError(f"unknown dtype {unknown[0]!r}; choose from {', '.join(DTYPES)}")
    if repeats < 1 or threads < 1:
        raise ValueError(f"repeats is {repeats} and threads {threads}; both must be at least 1")
    if dry_run:
        with threads_of_torch(threads):
            short = [
                (op, (batch, -(-length // PART), heads, size)) for op, (batch, length, heads, size) in cases(shapes)
            ]
            rows = [row for name in dtypes for case in short for row in time_case(*case, name, 1)]
        say_plan(rows, repeats)
        return {}
    with threads_of_torch(threads):
        rows = [row for name in dtypes for case in cases(shapes) for row in time_case(*case, name, repeats)]
    result = {"machine": machine(threads), "repeats": repeats, "rows": rows}
    tell(table(result))
    if json is not None:
        Path(json).write_text(jsonlib.dumps(result, indent=2) + "\n")
    return result


def say_plan(rows: Sequence[Mapping[str, Any]], repeats: int) -> None:
    """How many things are timed beside those of transformers, and how long it takes by the times of a PART of each."""
    seconds = PART * (repeats + 1) * sum(row["ms"] + row["transformers_ms"] for row in rows) / 1e3
    say(f"{len(rows)} things, ours beside transformers', {repeats} times each: {duration(seconds)}")


@contextmanager
def threads_of_torch(count: int) -> Iterator[None]:
    """So many threads, and afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cases(shapes: Sequence[Shape]) -> list[tuple[str, Shape]]:
    """Operators and shapes. With a decay per channel transformers holds [C, C, K] of every chunk and head, several
    times: where one of them is too large, or transformers does not know the operator yet, that is left out."""
    known = transformers_fallback("kimi_delta") is not None
    small = [shape for shape in shapes if known and 4 * CHUNK * math.prod(shape) <= LARGEST]
    return [("gated_delta_rule", shape) for shape in shapes] + [("kimi_delta", shape) for shape in small]


def time_case(operator: str, shape: Shape, dtype: str, repeats: int) -> list[dict[str, Any]]:
    """One row per thing that is timed."""
    tensors = inputs(shape, dtype, "cpu", operator)
    step = token((shape[0], *shape[2:]), dtype, "cpu", operator)
    chunked = (ours(operator), transformers_fallback(operator))
    one = (decode.ours(operator), decode.transformers_fallback(operator))
    makers: dict[str, tuple[Callable[[Any], Callable[[], Any]], tuple[Any, Any]]] = {
        "forward": (lambda compute: forward(compute, operator, tensors), chunked),
        "forward + backward": (lambda compute: backward(compute, operator, tensors), chunked),
        "decode step": (lambda compute: decode.without_gradient(compute, step), one),
    }
    rows = []
    for what, (make, pair) in makers.items():
        mine, theirs = (make(compute) for compute in pair)
        times = in_turns(mine, theirs, repeats if what != "decode step" else 20 * repeats)
        rows.append({"operator": operator, "what": what, "shape": list(shape), "dtype": dtype, **times})
    return rows


def in_turns(ours: Callable[[], None], stock: Callable[[], None], repeats: int) -> dict[str, Any]:
    """Median milliseconds of both, after one unmeasured call of each, their ratio, and the quartiles of ours."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + 1):
        for run, found in zip((ours, stock), times, strict=True):
            start = time.perf_counter()
            run()
            if turn:
                found.append(1e3 * (time.perf_counter() - start))
    lower, ms, upper = np.quantile(times[0], [0.25, 0.5, 0.75]).tolist()
    stock_ms = statistics.median(times[1])
    return {"ms": ms, "ms_quartiles": [lower, upper], "transformers_ms": stock_ms, "ratio": stock_ms / ms}


def machine(threads: int) -> dict[str, Any]:
    return {
        "date": date.today().isoformat(),
        "commit": commit(),
        "cpu": cpu_name(),
        "threads": threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def cpu_name() -> str:
    names = Path("/proc/cpuinfo")
    lines = names.read_text().splitlines() if names.exists() else []
    model = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return model[0] if model else platform.processor() or platform.machine()


DECAYS = {"gated_delta_rule": "head", "kimi_delta": "channel"}
HEADER = ("decay per", "B, T, H, D", "dtype", "what", "hf_fwp ms", "transformers ms", "times faster")


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """One row of the table, in the order of HEADER."""
    numbers = (f"{row['ms']:.2f}", f"{row['transformers_ms']:.2f}", f"{row['ratio']:.2f}")
    return DECAYS[row["operator"]], str(row["shape"])[1:-1], row["dtype"], row["what"], *numbers


def table(result: dict[str, Any]) -> rich.table.Table:
    about = result["machine"]
    title = f"gated delta rule on {about['cpu']}, {about['threads']} threads, torch {about['torch']}"
    found = rich.table.Table(title=title)
    for column in HEADER:
        found.add_column(column, no_wrap=column == "what")
    for row in result["rows"]:
        found.add_row(*cells(row))
    return found


def markdown(result: dict[str, Any]) -> str:
    """The table as the README quotes it, with what it was measured on below."""
    about = result["machine"]
    lines = [HEADER, tuple("---" for _ in HEADER), *(cells(row) for row in result["rows"])]
    return "\n".join(
        [
            *(f"| {' | '.join(line)} |" for line in lines),
            "",
            "Gated delta rule beside `torch_chunk_gated_delta_rule` and `torch_recurrent_gated_delta_rule`, with a "
            "decay per channel beside `chunk_kimi_delta_attention` and `recurrent_kimi_delta_attention`, of "
            f"transformers {about['transformers']}, in turns in one process, median of {result['repeats']}; "
            f"{about['date']}, {about['cpu']}, {about['threads']} threads, torch {about['torch']}, commit "
            f"`{about['commit']}`; printed by `hf-fwp bench cpu`.",
        ]
    )
