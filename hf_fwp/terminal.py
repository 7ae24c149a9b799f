"""How the command line reads what a user typed, and shows what a function gave back."""

import functools
import importlib
import inspect
import json as json_format
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from .dtypes import parse_dtype as parse_dtype
from .telling import manner, tell

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Errors and what --json prints only; the exit code tells.")]
# the rules that have a student in conversion/recipes.py, which takes a second to import
STUDENTS = ("linear_attention", "delta_net", "gated_delta_net")
StudentRule = Annotated[str, typer.Option("--rule", help=f"Update rule: {', '.join(STUDENTS)}.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and what it takes, and stop.")]
COMMON = {"context": typer.Context, "quiet": Quiet}


def well_mannered(command: Callable[..., None]) -> Callable[..., None]:
    """What every command has: --quiet, bars of progress on a terminal only, and errors in one line on stderr.

    The Python function of the same name gives the traceback.
    """
    own = inspect.signature(command)

    @functools.wraps(command)
    def reporting(**given: Any) -> None:
        quiet = given.pop("quiet")
        # until the innermost command is done: `bench -q cpu` is as quiet as `bench cpu -q`
        given["context"].with_resource(manner(bars=sys.stderr.isatty() and not quiet, words=not quiet))
        try:
            command(**{name: given[name] for name in own.parameters})
        except (ValueError, OSError, ImportError) as fault:
            sys.stderr.write(f"hf-fwp: {' '.join(str(fault).split())}\n")
            raise typer.Exit(2) from fault
        except KeyboardInterrupt as stop:
            sys.stderr.write("hf-fwp: interrupted; a conversion goes on from here with --resume\n")
            raise typer.Exit(130) from stop

    reporting.__annotations__ = command.__annotations__ | COMMON
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=False)
        for name, kind in COMMON.items()
        if name not in own.parameters
    ]
    setattr(reporting, "__signature__", own.replace(parameters=[*own.parameters.values(), *added]))  # noqa: B010
    return reporting


def parse_keep(text: str) -> float | int | list[int] | str:
    """`0.25` a fraction, `7` a count, `0,3,5` a list of layers, `recall:0.25` and `uniform:0.25` as they are."""
    if text.startswith(("recall:", "uniform:")):
        return text
    try:
        if "," in text:
            return [int(layer) for layer in text.split(",") if layer.strip()]
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    except ValueError as fault:
        raise ValueError(
            f"cannot read --keep {text!r}; give a fraction (0.25), a count (7), layers (0,3,5), recall:0.25 or "
            "uniform:0.25"
        ) from fault


def parse_mixer(text: str | None) -> dict[str, Any] | None:
    """`window=64,sinks=4`: options of mixers. A value is what JSON makes of it, or else a word."""
    if text is None:
        return None
    options: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not (name and equals and value):
            raise ValueError(f"cannot read --mixer {text!r}; give options with commas between: window=64,sinks=4")
        try:
            options[name] = json_format.loads(value)
        except ValueError:
            options[name] = value
    return options


def parse_layers(text: str) -> list[int]:
    """`0,3,5`: indices of layers."""
    try:
        return [int(layer) for layer in text.split(",") if layer.strip()]
    except ValueError as fault:
        raise ValueError(f"cannot read --layers {text!r}; give indices of layers: 0,3,5") from fault


def show(result: dict[str, Any], *, as_json: bool, title: str | None = None) -> None:
    """A result for a machine, or as one table for a person."""
    if as_json:
        sys.stdout.write(json_format.dumps(result, indent=2, default=str) + "\n")
        return
    table = Table("", "", title=title, title_justify="left", show_header=False)
    for name, value in flat(result):
        table.add_row(name, value)
    tell(table)


def show_rows(rows: dict[str, dict[str, str]], *, title: str, columns: tuple[str, ...]) -> None:
    """A table with one line for each name, of some columns."""
    table = Table(Column("", no_wrap=True), *columns, title=title, title_justify="left")
    for name, row in rows.items():
        table.add_row(name, *(row.get(column, "") for column in columns))
    tell(table)


def flat(result: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Rows of a nested result: names joined by dots, numbers with four digits, lists in one line."""
    rows = []
    for name, value in result.items():
        if isinstance(value, dict):
            rows += flat(value, f"{prefix}{name}.")
        elif isinstance(value, (list, tuple)):
            rows.append((prefix + name, ", ".join(map(str, value))))
        else:
            rows.append((prefix + name, f"{value:.4g}" if isinstance(value, float) else str(value)))
    return rows


def parse_data(name: str | None) -> Any:
    """What --data names; None where it is left out."""
    return None if name is None else conversion("data", "find_data")(name)


def conversion(module: str, name: str | None = None) -> Any:
    """A name of hf_fwp.conversion, by default the function its module is called after; loaded when needed."""
    return getattr(importlib.import_module(f"hf_fwp.conversion.{module}"), name or module)
