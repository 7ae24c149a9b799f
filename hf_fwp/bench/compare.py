"""Two results of the same bench side by side: what became slower, or answers worse, by more than the noise of both.

Noise of a time is the larger distance between quartiles, as a share of the median; of a score it is the larger spread
over seeds. At least FLOOR counts as noise, and UNKNOWN where a file does not say.
"""

from __future__ import annotations

import json as jsonlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich.table

from ..telling import tell

Row = Mapping[str, Any]

# What says that two rows are about the same thing.
SIZES = ("tokens", "context", "batch", "shape", "dtype")
IDENTITY = ("operator", "rule", "family", "task", "what", *SIZES, "implementation")
FLOOR, UNKNOWN = 0.05, 0.10
VERDICTS = {-1: "worse", 0: "same", 1: "better"}


@dataclass(frozen=True)
class Measure:
    """A column that is compared: which way is better, and how its noise is found."""

    better: int
    noise: str
    relative: bool


MEASURES = {
    "ms": Measure(-1, "ms_quartiles", True),
    "accuracy": Measure(1, "accuracy_spread", False),
    "prefill": Measure(1, "", True),  # tokens per second, of bench serve
    "decode": Measure(1, "", True),
}


def compare(old: str | Path, new: str | Path, *, json: str | Path | None = None) -> dict[str, Any]:
    """Compare two JSON files of `hf-fwp bench`, print the table, and write it to `json` when given.

    Raises ValueError for a file that no bench wrote, and for two files without a row in common.
    """
    before, after = (read(file) for file in (old, new))
    known = {identity(row): row for row in before["rows"]}
    shared = [row for row in after["rows"] if identity(row) in known]
    rows = [line for row in shared for line in compared(known[identity(row)], row)]
    if not rows:
        raise ValueError(f"{old} and {new} have no row in common; compare two results of the same bench")
    result = {"old": before["machine"], "new": after["machine"], "rows": rows}
    tell(table(result))
    if json is not None:
        Path(json).write_text(jsonlib.dumps(result, indent=2) + "\n")
    return result


def regressions(result: Mapping[str, Any]) -> list[Row]:
    """The rows that became worse."""
    return [row for row in result["rows"] if row["verdict"] == "worse"]


def read(file: str | Path) -> dict[str, Any]:
    """A result as a bench wrote it."""
    try:
        found = jsonlib.loads(Path(file).read_text())
    except (OSError, ValueError) as fault:
        raise ValueError(f"cannot read {file} ({fault}); give a file that hf-fwp bench ... --json wrote") from fault
    if not (isinstance(found, dict) and {"machine", "rows"} <= set(found)):
        raise ValueError(f"{file} is no result of hf-fwp bench; give a file that hf-fwp bench ... --json wrote")
    return found


def identity(row: Row) -> tuple[str, ...]:
    return tuple(str(row.get(name)) for name in IDENTITY)


def compared(old: Row, new: Row) -> list[dict[str, Any]]:
    """A line of the comparison for everything that was measured in both."""
    measured = [name for name in MEASURES if old.get(name) is not None and new.get(name) is not None]
    return [_line(old, new, name) for name in measured]


def _line(old: Row, new: Row, name: str) -> dict[str, Any]:
    measure, first, second = MEASURES[name], float(old[name]), float(new[name])
    change = second / first - 1 if measure.relative else second - first
    noise = max(_noise(row, name) for row in (old, new))
    sign = measure.better * ((change > noise) - (change < -noise))
    about = {key: new[key] for key in IDENTITY if new.get(key) is not None}
    return {**about, "measure": name, "old": first, "new": second, "change": change, "noise": noise} | {
        "verdict": VERDICTS[sign]
    }


def _noise(row: Row, name: str) -> float:
    measure = MEASURES[name]
    found = row.get(measure.noise)
    if found is None:
        return UNKNOWN
    spread = found[1] - found[0] if isinstance(found, (list, tuple)) else found
    return max(FLOOR, spread / row[name] if measure.relative else spread)


def table(result: Mapping[str, Any]) -> rich.table.Table:
    """The rows, and below what differs between the machines."""
    different = [key for key, value in result["new"].items() if result["old"].get(key) != value]
    said = ", ".join(f"{key}: {result['old'].get(key)} → {result['new'].get(key)}" for key in different)
    columns = ("", "measure", "old", "new", "change", "noise", "")
    found = rich.table.Table(*columns, title="old and new", caption=said or None)
    for row in result["rows"]:
        name = " ".join(str(row[key]) for key in IDENTITY if key in row)
        style = {"worse": "bold red", "better": "green"}.get(row["verdict"], "")
        numbers = (f"{row['old']:.4g}", f"{row['new']:.4g}", f"{row['change']:+.1%}", f"{row['noise']:.1%}")
        found.add_row(name, row["measure"], *numbers, row["verdict"], style=style)
    return found
