"""Results of benches as one HTML file that needs no other file and no network: `hf-fwp bench page FILES`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..card import bytes_shown, number
from ..files import write_whole
from ..look import FIGURES, PAGE, image
from .compare import IDENTITY, Row, read
from .device import COLUMNS as MEASURED
from .plots import Series, bars

NEEDS = ("jinja2", "matplotlib")
OURS = "hf_fwp"
# Columns of a table, in order; one without a value in any row is left out.
COLUMNS = {name: name for name in IDENTITY} | {"ms": "ms", "transformers_ms": "ms, transformers"} | MEASURED
COLUMNS |= {
    "prefill": "prefill tokens/s",
    "teacher_prefill": "prefill tokens/s, teacher",
    "decode": "decode tokens/s",
    "teacher_decode": "decode tokens/s, teacher",
    "cache_bytes": "cache",
    "teacher_cache_bytes": "cache, teacher",
    "accuracy": "right answers",
    "accuracy_spread": "± over seeds",
}
TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Benchmarks of hf_fwp</title>
<style>{{ style|safe }} .facts td { text-align: left; overflow-wrap: anywhere; } .facts td:first-child { width: 24%; }
  .rows { font-size: 14px; } .rows td { white-space: nowrap; }</style>
</head>
<body><main>
<h1>Benchmarks of hf_fwp</h1>
<p class="quiet">Each result names the machine and the commit that it is of; only rows of one result are comparable.</p>
{% for result in results %}
<h2 id="{{ result.name }}">{{ result.name }}</h2>
<p class="quiet">{{ result.subtitle }}</p>
<div class="card">
{% for plot in result.plots %}<img alt="{{ plot.axis }}" src="{{ plot.image }}">{% endfor %}
<div class="scroll"><table class="rows"><tr>{% for label in result.labels %}<th>{{ label }}</th>{% endfor %}</tr>
{% for row in result.rows %}<tr{% if row.ours %} class="ours"{% endif %}>
{% for cell in row.cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
<details><summary>How it was measured</summary><table class="facts">
{% for name, value in result.facts %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}</table></details></div>
{% endfor %}
</main></body></html>
"""


def bench_page(files: Sequence[str | Path], *, output: str | Path = "results.html") -> Path:
    """Write a page of what benches wrote with `json=`, in the order of `files`; returns where it is.

    Raises ValueError without a file, for one that no bench wrote, and where the extra [demo] is missing.
    """
    missing = [package for package in NEEDS if find_spec(package) is None]
    if missing:
        raise ValueError(f'a page of results needs {" and ".join(missing)}; run `pip install "hf_fwp[demo]"`')
    if not files:
        raise ValueError("a page of results needs at least one file that hf-fwp bench ... --json wrote")
    write_whole(Path(output), page({Path(file).stem: read(file) for file in files}))
    return Path(output)


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The page of several results, by name."""
    from jinja2 import Environment  # of the extra [demo]

    shown = [{"name": name, **section(result)} for name, result in results.items()]
    return Environment(autoescape=True, trim_blocks=True).from_string(TEMPLATE).render(style=PAGE, results=shown)


def section(result: Mapping[str, Any]) -> dict[str, Any]:
    """One result as the page shows it."""
    from matplotlib import rc_context

    about, rows = result["machine"], result["rows"]
    used = [name for name in COLUMNS if any(row.get(name) is not None for row in rows)]
    told = ("date", "commit", "device", "cpu", "threads")
    parts = [
        f"{name} {about[name]}" if name in ("commit", "threads") else about[name] for name in told if about.get(name)
    ]
    with rc_context(FIGURES):
        plots = [{"axis": axis, "image": image(bars(series, axis=axis))} for axis, series in views(rows)]
    return {
        "subtitle": " · ".join(map(str, parts)),
        "labels": [COLUMNS[name] for name in used],
        "rows": [
            {"ours": row.get("implementation") == OURS, "cells": [_cell(name, row) for name in used]} for row in rows
        ],
        "plots": plots,
        "facts": list(_flat({name: value for name, value in result.items() if name != "rows"})),
    }


def views(rows: Sequence[Row]) -> Iterator[tuple[str, Series]]:
    """(what is measured, who -> group -> value) of everything that a bench's rows hold."""
    times = "ms, less is better"
    if any("transformers_ms" in row for row in rows):
        yield times, _by(rows, {OURS: "ms", "transformers": "transformers_ms"})
    elif any("implementation" in row for row in rows):
        yield times, _by_name(rows, "implementation", "ms")
    elif any("ms" in row for row in rows):
        yield times, _by(rows, {OURS: "ms"})
    if any("decode" in row for row in rows):
        for what in ("prefill", "decode"):
            yield f"{what}, tokens/s, more is better", _by(rows, {"this model": what, "teacher": f"teacher_{what}"})
    if any("accuracy" in row for row in rows):
        yield "right answers, more is better", _by_name(rows, "rule", "accuracy")


def _by(rows: Sequence[Row], columns: Mapping[str, str]) -> Series:
    """A series for each of some columns."""
    return {
        who: {_group(row): row[column] for row in rows if row.get(column) is not None}
        for who, column in columns.items()
    }


def _by_name(rows: Sequence[Row], name: str, column: str) -> Series:
    """A series for each value of the column `name`."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.get(column) is not None:
            found.setdefault(row[name], {})[_group(row, but=name)] = row[column]
    return found


def _group(row: Row, *, but: str = "implementation") -> str:
    """What a row is about, in words; a number by itself says what it counts."""
    about = {name: row[name] for name in IDENTITY if name != but and row.get(name) is not None}
    return " ".join(
        f"{name} {_shown(value)}" if isinstance(value, int) else _shown(value) for name, value in about.items()
    )


def _cell(name: str, row: Row) -> str:
    if name.endswith("cache_bytes"):
        return bytes_shown(row.get(name))
    if name == "ms" and row.get("ms") is None:
        return row.get("note") or "-"
    return _shown(row.get(name))


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " x ".join(map(str, value))
    return number(value) if isinstance(value, float) else "-" if value is None else str(value)


def _flat(told: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as rows; what is not known is left out."""
    for name, value in told.items():
        if isinstance(value, Mapping):
            yield from _flat(value, "" if name == "machine" else f"{name}.")
        elif value is not None:
            yield f"{prefix}{name}", _shown(value)
