"""The gated delta rule on a CPU, beside the fallback that transformers runs there.

Both get the same tensors, in turns, in one process: other work on the machine then slows both alike. The median counts.
"""

from __future__ import annotations

import json as jsonlib
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
from torch import Tensor

from ..card import commit
from ..estimates import duration
from ..ops import gated_delta_rule
from ..telling import say, tell

# B, T, H, D
SHAPES = ((1, 2048, 9, 64), (1, 4096, 16, 128))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Operator = Callable[..., tuple[Tensor, Any]]
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
            short = [(batch, -(-length // PART), heads, size) for batch, length, heads, size in shapes]
            rows = [row for name in dtypes for shape in short for row in time_shape(shape, name, 1)]
        say_plan(rows, repeats)
        return {}
    with threads_of_torch(threads):
        rows = [row for name in dtypes for shape in shapes for row in time_shape(shape, name, repeats)]
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


def time_shape(shape: tuple[int, int, int, int], dtype: str, repeats: int) -> list[dict[str, Any]]:
    """One row per thing that is timed."""
    from transformers.models.qwen3_next import modeling_qwen3_next as theirs

    chunked, recurrent = theirs.torch_chunk_gated_delta_rule, theirs.torch_recurrent_gated_delta_rule
    pairs = {
        "forward": (forward(gated_delta_rule, shape, dtype), forward(chunked, shape, dtype)),
        "forward + backward": (backward(gated_delta_rule, shape, dtype), backward(chunked, shape, dtype)),
        "decode step": (decode(gated_delta_rule, shape, dtype), decode(recurrent, shape, dtype)),
    }
    rows = []
    for what, (ours, stock) in pairs.items():
        times = in_turns(ours, stock, repeats if what != "decode step" else 20 * repeats)
        rows.append({"what": what, "shape": list(shape), "dtype": dtype, **times})
    return rows


def inputs(shape: tuple[int, int, int, int], dtype: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator).to(DTYPES[dtype]) for _ in range(3))
    beta, g = (torch.rand(shape[:3], generator=generator) for _ in range(2))
    return {"query": q, "key": k, "value": v, "g": -0.1 * g, "beta": beta.to(DTYPES[dtype])}


def forward(operator: Operator, shape: tuple[int, int, int, int], dtype: str) -> Callable[[], None]:
    tensors = list(inputs(shape, dtype).values())

    def run() -> None:
        with torch.no_grad():
            operator(*tensors, use_qk_l2norm_in_kernel=True)

    return run


def backward(operator: Operator, shape: tuple[int, int, int, int], dtype: str) -> Callable[[], None]:
    leaves = [x.requires_grad_() for x in inputs(shape, dtype).values()]
    d_out = torch.randn(shape).to(DTYPES[dtype])

    def run() -> None:
        out, _ = operator(*leaves, use_qk_l2norm_in_kernel=True)
        torch.autograd.grad(out, leaves, d_out)

    return run


def decode(operator: Operator, shape: tuple[int, int, int, int], dtype: str) -> Callable[[], None]:
    batch, _, heads, size = shape
    tensors = list(inputs((batch, 1, heads, size), dtype).values())
    state = torch.zeros(batch, heads, size, size)

    def run() -> None:
        with torch.no_grad():
            operator(*tensors, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True)

    return run


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


HEADER = ("B, T, H, D", "dtype", "what", "hf_fwp ms", "transformers ms", "times faster")


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """One row of the table, in the order of HEADER."""
    numbers = (f"{row['ms']:.2f}", f"{row['transformers_ms']:.2f}", f"{row['ratio']:.2f}")
    return str(row["shape"])[1:-1], row["dtype"], row["what"], *numbers


def table(result: dict[str, Any]) -> rich.table.Table:
    about = result["machine"]
    title = f"gated delta rule on {about['cpu']}, {about['threads']} threads, torch {about['torch']}"
    found = rich.table.Table(title=title)
    for column in HEADER:
        found.add_column(column)
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
            f"Gated delta rule beside `torch_chunk_gated_delta_rule` and `torch_recurrent_gated_delta_rule` of "
            f"transformers {about['transformers']}, in turns in one process, median of {result['repeats']}; "
            f"{about['date']}, {about['cpu']}, {about['threads']} threads, torch {about['torch']}, commit "
            f"`{about['commit']}`; printed by `hf-fwp bench cpu`.",
        ]
    )
