"""Bytes between a GPU and its memory, counted by the hardware, in a process of its own.

The counters need rights that a machine may not give, and a profiler without them can end the process: where nothing is
counted the bytes are None and the reason is printed. Run as `python -m hf_fwp.bench.traffic BENCH CALLS`, these in
JSON.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._C._profiler import _ExperimentalConfig

from .device import Row

COUNTERS = ("dram__bytes_read.sum", "dram__bytes_write.sum")
LIMIT_S = 150
CALL = ("operator", "shape", "dtype", "what", "implementation")
SLOW = ("hf_fwp, backend torch", "transformers")


def with_bytes(rows: Sequence[Row], bench: str) -> list[Row]:
    """The rows with the bytes that the hardware counts; not of the slow fallbacks, which would take minutes."""
    chosen = [row for row in rows if row["implementation"] not in SLOW and row["ms"] is not None]
    counts = counted_bytes(bench, [[row[name] for name in CALL] for row in chosen])
    found = {id(row): count for row, count in zip(chosen, counts, strict=True)}
    return [row | {"bytes": found.get(id(row))} for row in rows]


def counted_bytes(bench: str, calls: Sequence[Sequence[Any]]) -> list[int | None]:
    """Bytes read and written by each CALL of the module hf_fwp.bench.`bench`."""
    command = [sys.executable, "-m", "hf_fwp.bench.traffic", bench, json.dumps(list(calls))]
    with tempfile.TemporaryFile("w+") as found, tempfile.TemporaryFile("w+") as told:
        try:
            subprocess.run(command, stdout=found, stderr=told, timeout=LIMIT_S, check=True)
        except subprocess.SubprocessError as fault:
            told.seek(0)
            reason = [*told.read().strip().splitlines(), str(fault)[-200:]][-2:]
            sys.stderr.write(f"not every byte was counted: {'; '.join(reason)}\n")
        found.seek(0)
        counts = [json.loads(line) for line in found if line.strip() == "null" or line.strip().isdigit()]
    return counts + [None] * (len(calls) - len(counts))


def bytes_of(run: Callable[[], Any]) -> int | None:
    """Bytes of one call, after one that compiles it; None if the profiler gives no counters."""
    run()
    torch.cuda.synchronize()
    config = _ExperimentalConfig(profiler_metrics=list(COUNTERS), profiler_measure_per_kernel=False)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, experimental_config=config) as found:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        found.export_chrome_trace(str(trace))
        return bytes_in(json.loads(trace.read_text()))


def bytes_in(trace: dict[str, Any]) -> int | None:
    """The sum of the counters over the events of a trace."""
    counts = [event["args"] for event in trace["traceEvents"] if COUNTERS[0] in event.get("args", {})]
    return sum(int(args.get(name, 0)) for args in counts for name in COUNTERS) if counts else None


def main(bench: str, calls: str) -> None:
    """A line for every call as soon as it is counted: what comes before an early end is not lost."""
    runs = importlib.import_module(f"hf_fwp.bench.{bench}").runs
    for operator, shape, dtype, what, implementation in json.loads(calls):
        run = dict(runs(operator, tuple(shape), dtype, what))[implementation]
        try:
            found = bytes_of(run)
        except RuntimeError:  # of the device, or of the memory
            found = None
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
