"""What the benches on a GPU share: measuring one call, the two floors it is judged by, the table and the picture.

A floor is a time that nothing can beat on this device: the fewest bytes over the bandwidth of a large copy, and the
arithmetic over the rate of a large matrix product. Both ceilings are measured in the same run.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json as jsonlib
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import rich.table
import torch

from ..card import commit as commit_of_checkout
from ..dtypes import DTYPES
from ..files import write_whole
from ..look import FIGURES
from ..telling import say, tell
from .plots import bars

WARMUP_MS, REPEAT_MS = 25, 100  # of every row
OUT_OF_MEMORY = "out of memory"
FAULTS = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError),
    *(OSError, RuntimeError, TypeError, ValueError),
)
Row = dict[str, Any]
Run = Callable[[], Any]


@dataclass(frozen=True)
class Ceilings:
    """What this device reaches: bytes per second (read and written both counted), operations per second."""

    bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True)
class Work:
    """The least that has to be done: every input read once, every output written once, and the operations."""

    bytes: int
    flops: int


def say_plan(rows: int, title: str) -> Row:
    """What would be timed; the answer of a dry run, which holds nothing."""
    here = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU is here: it would be refused"
    seconds = rows * (WARMUP_MS + REPEAT_MS) / 1e3
    say(f"{title}: {rows} rows, at least {seconds:.0f} s and what compiling takes; {here}")
    return {}


def require_gpu() -> None:
    """Raise ValueError where there is nothing to measure."""
    if not torch.cuda.is_available():
        raise ValueError(
            "this bench needs an NVIDIA or AMD GPU that PyTorch can use (torch.cuda.is_available() is False); "
            "run it on a machine with one, or use hf-fwp bench cpu"
        )


def check_request(dtypes: Sequence[str], plot: str | Path | None) -> None:
    """Raise ValueError for what would fail after minutes of measuring."""
    check_dtypes(dtypes)
    if plot is not None and find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install matplotlib, or leave --plot out")
    require_gpu()


def check_dtypes(dtypes: Sequence[str]) -> None:
    unknown = [name for name in dtypes if name not in DTYPES]
    if unknown:
        raise ValueError(f"unknown dtype {unknown[0]!r}; choose from {', '.join(DTYPES)}")


def median_ms(run: Run) -> float:
    """By events of the device, with the cache cleared before every run."""
    return quartiles_ms(run)[1]


def quartiles_ms(run: Run) -> list[float]:
    """The lower quartile, the median and the upper one."""
    from triton.testing import do_bench

    found: Any = do_bench(run, warmup=WARMUP_MS, rep=REPEAT_MS, quantiles=[0.25, 0.5, 0.75])
    return [float(ms) for ms in found]


def ceilings(dtype: str) -> Ceilings:
    """A copy of 1 GiB, and a product of two 8192 x 8192 matrices of random numbers."""
    numbers, size = 2**28, 8192
    source, target = (torch.randn(numbers, device="cuda") for _ in range(2))
    copied_ms = median_ms(lambda: target.copy_(source))
    a, b = (torch.randn(size, size, device="cuda").to(DTYPES[dtype]) for _ in range(2))
    product_ms = median_ms(lambda: a @ b)
    return Ceilings(2 * 4 * numbers / (1e-3 * copied_ms), 2 * size**3 / (1e-3 * product_ms))


def measure(run: Run) -> Row:
    """Milliseconds of the first call and of the median one, launches, peak memory above what was there before.

    A call that fails leaves a note instead: the other rows are worth having."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    try:
        run()
        torch.cuda.synchronize()
    except torch.cuda.OutOfMemoryError:
        return {"ms": None, "note": OUT_OF_MEMORY}
    except faults() as fault:
        return {"ms": None, "note": told(fault)}
    first_ms = 1e3 * (time.perf_counter() - start)
    peak_mib = (torch.cuda.max_memory_allocated() - before) / 2**20
    lower, ms, upper = quartiles_ms(run)
    times = {"ms": ms, "ms_quartiles": [lower, upper], "first_ms": first_ms}
    return {**times, "launches": launches(run), "peak_mib": peak_mib}


def faults() -> tuple[type[Exception], ...]:
    """What a call or an import of somebody else may raise: what Python has for it, and Triton."""
    triton = sys.modules.get("triton.errors")
    return (*FAULTS, triton.TritonError) if triton else FAULTS


def told(fault: Exception) -> str:
    """An exception in one line."""
    return f"{type(fault).__name__}: {' '.join(str(fault).split())[:120]}"


def peer(module: str, name: str) -> Callable[..., Any] | None:
    """A function of a package that need not be there; what is there but broken is told, and left out."""
    if find_spec(module.partition(".")[0]) is None:
        return None
    try:
        return getattr(importlib.import_module(module), name)
    except faults() as fault:
        say(f"{module}.{name} is left out: {told(fault)}")
        return None


def refuse_failed(rows: Sequence[Row], ours: Sequence[str]) -> None:
    """Raise RuntimeError where an implementation of ours failed; for the end, when everything is written. One that only
    could not be captured has a time outside a graph."""
    lost = [row for row in rows if row["ms"] is None and row.get("eager_ms") is None and row["note"] != OUT_OF_MEMORY]
    failed = [row for row in lost if row["implementation"] in ours]
    if failed:
        said = "; ".join(f"{row['operator']} {row['shape']} {row['what']}: {row['note']}" for row in failed)
        raise RuntimeError(f"{len(failed)} of our rows could not be measured: {said}")


def launches(run: Run) -> int:
    """Kernels of one call, counted by the profiler; copies and fills by the driver are not kernels."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as found:
        run()
        torch.cuda.synchronize()
    events = found.events() or ()
    on_device = [e.name for e in events if str(e.device_type).endswith("CUDA")]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in on_device)


def judged(row: Row, work: Work, limits: Ceilings) -> Row:
    """The row with its floors, its shares of them and its useful GB/s."""
    bandwidth_ms = 1e3 * work.bytes / limits.bytes_per_s
    arithmetic_ms = 1e3 * work.flops / limits.flops_per_s
    found = row | {"bandwidth_floor_ms": bandwidth_ms, "arithmetic_floor_ms": arithmetic_ms}
    if row["ms"] is None:
        return found
    return found | {
        "gb_s": work.bytes / row["ms"] / 1e6,
        "share_of_bandwidth_floor": bandwidth_ms / row["ms"],
        "share_of_arithmetic_floor": arithmetic_ms / row["ms"],
    }


def with_ratios(rows: Sequence[Row], ours: str, same: Sequence[str]) -> list[Row]:
    """Every row with how many times our time it takes; rows are compared that are alike in the columns `same`."""
    times = {tuple(map(str, (row[name] for name in same))): row["ms"] for row in rows if row["implementation"] == ours}
    found = []
    for row in rows:
        base = times.get(tuple(map(str, (row[name] for name in same))))
        found.append(row | {"ratio": row["ms"] / base if base and row["ms"] is not None else None})
    return found


def about(commit: str | None) -> Row:
    """What the numbers depend on."""
    peers = {"fla-core": "fla", "triton": "triton", "transformers": "transformers"}
    versions = {name: version(name) for name, module in peers.items() if find_spec(module)}
    return {
        "date": date.today().isoformat(),
        "commit": commit or commit_of_checkout(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        **versions,
    }


def version(package: str) -> str:
    """What its installer left; a folder on the path has no more than its code."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


COLUMNS = {
    "operator": "operator",
    "shape": "shape",
    "dtype": "dtype",
    "what": "what",
    "implementation": "implementation",
    "ms": "ms",
    "eager_ms": "ms outside a graph",
    "first_ms": "ms of the first call",
    "launches": "launches",
    "bytes": "bytes moved",
    "gb_s": "useful GB/s",
    "share_of_bandwidth_floor": "share of the bandwidth floor",
    "share_of_arithmetic_floor": "share of the arithmetic floor",
    "peak_mib": "peak MiB",
    "ratio": "times ours",
}


def cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(result: Row, title: str) -> rich.table.Table:
    """Columns that have no value in any row are left out."""
    used = [name for name in COLUMNS if any(row.get(name) is not None for row in result["rows"])]
    machine = result["machine"]
    found = rich.table.Table(title=f"{title} on {machine['device']}, torch {machine['torch']}")
    for name in used:
        found.add_column(COLUMNS[name])
    for row in result["rows"]:
        found.add_row(
            *(row.get("note") or "-" if name == "ms" and row["ms"] is None else cell(row.get(name)) for name in used)
        )
    return found


def write(result: Row, *, json: str | Path | None, plot: str | Path | None, title: str) -> None:
    """Print the table; write the JSON and the picture where asked."""
    tell(table(result, title))
    if json is not None:
        write_whole(Path(json), jsonlib.dumps(result, indent=2) + "\n")
    if plot is not None:
        draw(result, Path(plot), title)


def draw(result: Row, file: Path, title: str) -> None:
    """Milliseconds as bars, one group for everything that is comparable; the format is the file's ending."""
    from matplotlib import rc_context

    series: dict[str, dict[str, float]] = {}
    for row in result["rows"]:
        if row["ms"] is not None:
            group = " ".join(cell(row[name]) for name in ("operator", "shape", "dtype", "what"))
            series.setdefault(row["implementation"], {})[group] = row["ms"]
    with rc_context(FIGURES):
        bars(series, axis="ms, less is better", title=f"{title} on {result['machine']['device']}").savefig(file)


def main(commit: str | None) -> None:
    """`make gpu` begins with this: what the results will depend on, or one line that says that there is no GPU."""
    try:
        require_gpu()
    except ValueError as fault:
        sys.exit(str(fault))
    sys.stdout.write(jsonlib.dumps(about(commit), indent=2) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:] or [None])
