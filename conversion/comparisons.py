"""The tables of conversion/RESULTS.md: what each choice is worth, and recipes of others beside ours.

python -m hf_fwp.conversion.comparisons                   all of them
python -m hf_fwp.conversion.comparisons --table choices   one

A table is a call of ablate on SmolLM2-135M-Instruct and the Brown corpus, whose finished runs are not repeated. Its
rows are in conversion/comparisons.json as soon as all of them are there.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_fwp.files import write_whole

from .ablate import ablate, as_table
from .data import brown
from .results import ROOT, quote
from .teacher import smollm2_gguf

ROWS = ROOT / "conversion" / "comparisons.json"
PAGE = ROOT / "conversion" / "RESULTS.md"
# name: arguments of ablate
TABLES: dict[str, Mapping[str, Any]] = {
    "choices": {"recipe": "closed-form"},
    "kept": {"recipe": "closed-form", "keep": 0.5, "choices": "kept"},
    "recipes": {
        "recipe": ("quick", "naive", "radlads", "taylor-calibrate", "mamba-in-llama", "lolcats"),
        "budget": "40k",
        "sweep": "lr",
    },
    "training": {"recipe": "quick", "budget": "40k", "choices": ("no align", "align", "distil")},
}


def compare_recipes(
    tables: Sequence[str] = tuple(TABLES), *, tokens: int = 8192, output: str | Path = "out/comparisons"
) -> dict[str, list[dict[str, Any]]]:
    """Run what is missing of each of `tables`; gives the rows of all that have been measured."""
    train, heldout = brown()
    for name in tables:
        said = {"data": {"train": train, "test": heldout}, "tokens": tokens, "output": Path(output) / name}
        rows = ablate(smollm2_gguf(), **said, **TABLES[name])
        write_whole(ROWS, json.dumps({**measured_tables(), name: rows}, indent=2) + "\n")
    return measured_tables()


def measured_tables() -> dict[str, list[dict[str, Any]]]:
    """The rows that have been measured so far, by table."""
    return json.loads(ROWS.read_text()) if ROWS.is_file() else {}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command behind `make comparisons`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=TABLES, help="only this table")
    parser.add_argument("--tokens", type=int, default=8192, help="held-out tokens")
    parser.add_argument("--output", default="out/comparisons")
    asked = parser.parse_args(arguments)
    tables = tuple(TABLES) if asked.table is None else (asked.table,)
    for name, rows in compare_recipes(tables, tokens=asked.tokens, output=asked.output).items():
        quote(as_table(rows), name, PAGE)


if __name__ == "__main__":
    main()
