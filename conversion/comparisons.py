"""The tables of conversion/RESULTS.md: what each choice is worth, and recipes of others beside ours.

python -m hf_fwp.conversion.comparisons                   all of them
python -m hf_fwp.conversion.comparisons --table choices   one
python -m hf_fwp.conversion.comparisons --finished        what is finished of each, without running any

A table is a call of ablate on SmolLM2-135M-Instruct and the Brown corpus, whose finished runs are not repeated. Its
rows go to conversion/comparisons.json and from there to the page.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_fwp.files import write_whole

from .ablate import ablate, as_table
from .data import brown
from .recipes import Recipe, find_recipe
from .results import ROOT, WINDOW, quote
from .teacher import smollm2_gguf

ROWS = ROOT / "conversion" / "comparisons.json"
PAGE = ROOT / "conversion" / "RESULTS.md"
OTHERS = ("naive", "radlads", "taylor-calibrate", "mamba-in-llama", "lolcats")


def _stepping(name: str, sequences: int) -> Recipe:
    """The recipe with so many sequences a step."""
    return find_recipe(name).changed({"align.batch_size": sequences, "distil.batch_size": sequences})


QUICK = _stepping("quick", 4)  # as many as the others take
# name: arguments of ablate
TABLES: dict[str, Mapping[str, Any]] = {
    # on the student's stream, where the teacher's is a choice
    "choices": {"recipe": find_recipe("closed-form").changed({"stream": "student", "solve_more": 1.0})},
    "kept": {"recipe": "closed-form", "keep": 0.5, "choices": "kept", "needles": 8},
    "recipes": {"recipe": (QUICK, *OTHERS), "budget": "40k", "sweep": "lr"},
    "training": {"recipe": QUICK, "budget": "40k", "choices": ("no align", "align", "no distil", "distil")},
    "window": {"recipe": find_recipe("quick").with_mixer(WINDOW), "budget": "40k", "choices": "window"},
    "steps": {"recipe": (QUICK, *OTHERS), "budget": "40k", "choices": "one sequence a step"},
    "budget": {"recipe": [_stepping(name, 1) for name in ("quick", *OTHERS)], "budget": "0.2M", "sweep": "lr"},
    "half": {
        "recipe": ("naive", "mamba-in-llama"),
        "keep": "uniform:0.5",
        "budget": "40k",
        "choices": ("one sequence a step", "not trained"),
    },
}


def compare_recipes(
    tables: Sequence[str] = tuple(TABLES), *, tokens: int = 8192, output: str | Path = "out/comparisons"
) -> None:
    """Run what is missing of each of `tables`."""
    train, heldout = brown()
    for name in tables:
        said = {"data": {"train": train, "test": heldout}, "tokens": tokens, "output": Path(output) / name}
        ablate(smollm2_gguf(), **said, **TABLES[name])


def measured_tables() -> dict[str, list[dict[str, Any]]]:
    """The rows that the page quotes, by table."""
    return json.loads(ROWS.read_text()) if ROWS.is_file() else {}


def quote_tables(output: str | Path) -> None:
    """Put the rows of all runs that are finished in `output` where the page quotes them."""
    tables = measured_tables()
    for name in TABLES:
        file = Path(output) / name / "ablation.json"
        if file.is_file():
            tables[name] = json.loads(file.read_text())
            quote(as_table(tables[name]), name, PAGE)
    write_whole(ROWS, json.dumps(tables, indent=2) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command behind `make comparisons`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=TABLES, help="only this table")
    parser.add_argument("--tokens", type=int, default=8192, help="held-out tokens")
    parser.add_argument("--output", default="out/comparisons")
    parser.add_argument("--finished", action="store_true", help="quote what is finished, and run nothing")
    asked = parser.parse_args(arguments)
    if not asked.finished:
        tables = tuple(TABLES) if asked.table is None else (asked.table,)
        compare_recipes(tables, tokens=asked.tokens, output=asked.output)
    quote_tables(asked.output)


if __name__ == "__main__":
    main()
