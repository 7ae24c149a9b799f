"""`hf-fwp bench kernels --tune`: other rows for the tables of launches of hf_fwp.kernels, timed here.

One kernel after another, with the best so far for the others: they run one after another, so their times add up.
Nothing is changed on disk; the row that is printed is for a person to put into the table.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any

import torch

from ..telling import tell
from . import device
from .device import Row, Run

# operator: the kernels whose table its launches are in
TABLES = {"gated_delta_rule": "linear_class", "kimi_delta": "channel_decay"}
# every candidate is compiled, which takes seconds
COLUMNS = (16, 32, 64)
WARPS = (1, 4, 8)
STAGES = (1, 2)


def best_launches(shapes: Sequence[tuple[int, int, int, int]], dtypes: Sequence[str]) -> list[Row]:
    """The best row for every key of the table, at the first shape that has it; printed as the table would have it."""
    from .kernels import backward, inputs, ours

    try:
        tables = {operator: importlib.import_module(f"hf_fwp.kernels.{name}") for operator, name in TABLES.items()}
    except ModuleNotFoundError as missing:
        raise ValueError(f"--tune has no kernels to tune: {missing}; leave --tune out") from missing
    found, here = [], torch.cuda.get_device_name()
    for operator, kernels in tables.items():
        problems = {}
        for dtype, shape in itertools.product(dtypes, shapes):
            problems.setdefault((device.DTYPES[dtype].itemsize, max(64, kernels.padded(shape[3]))), (dtype, shape))
        for key, (dtype, shape) in problems.items():
            run = backward(ours(operator, "triton"), operator, inputs(shape, dtype, "cuda", operator))
            row, ms, before_ms = descend(kernels.TABLE, key, run, timed)
            place = {"device": here, "table": TABLES[operator], "key": list(key), "shape": list(shape), "dtype": dtype}
            found.append(place | {"row": repr(row), "ms": ms, "ms_before": before_ms})
            tell(f"{TABLES[operator]} {key}: {row!r},  # {ms:.4g} ms, {before_ms:.4g} before; {here}, {shape}")
    return found


def descend(
    table: MutableMapping[Any, Any], key: Any, run: Run, time: Callable[[Run], float | None]
) -> tuple[Any, float, float]:
    """(best row, its ms, ms of the row that is there): every kernel of the row in turn; the table is left as it was."""
    original = table[key]
    before_ms = time(run)
    if before_ms is None:
        raise ValueError(f"the row {key} of the table does not run on this device; nothing to compare with")
    best, best_ms = original, before_ms
    try:
        for name in original._fields:
            for launch in candidates(getattr(best, name)):
                table[key] = best._replace(**{name: launch})
                ms = time(run)
                if ms is not None and ms < best_ms:
                    best, best_ms = table[key], ms
    finally:
        table[key] = original
    return best, best_ms, before_ms


def candidates(launch: Any) -> Iterator[Any]:
    """Every other launch of one kernel; none of what is no launch, the length of a chunk."""
    if isinstance(launch, int):
        return
    for columns, warps, stages in itertools.product(COLUMNS, WARPS, STAGES):
        other = launch._replace(columns=columns, num_warps=warps, num_stages=stages)
        if other != launch:
            yield other


def timed(run: Run) -> float | None:
    """Median ms, or None where the compiler or the device has no room for it."""
    from triton.errors import TritonError

    try:
        return device.median_ms(run)
    except TritonError:
        return None
