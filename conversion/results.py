"""The tables of results in the README: ways of converting at several shares of kept layers, on the same held-out text,
and before them the speed of the operators.

python -m hf_fwp.conversion.results                 all of it
python -m hf_fwp.conversion.results --way quick     one way

A row is in conversion/results.json as soon as it is measured, and is not measured again before it is deleted there.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from hf_fwp.bench.cpu import bench_cpu, markdown
from hf_fwp.files import write_whole

from .convert import convert
from .data import brown, state_of_the_union
from .evaluate import evaluate
from .greedy import GIVEN, TEXTS, WRITTEN
from .recall import COLUMNS, EXPLAINED, cells
from .teacher import smollm2_gguf

ROOT = Path(__file__).resolve().parent.parent
ROWS = ROOT / "conversion" / "results.json"
SPEED = ROOT / "hf_fwp" / "bench" / "results" / "cpu.json"
WINDOW = {"window": 64, "sinks": 4}
# name: (recipe, options of the mixers)
WAYS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "closed-form": ("closed-form", {}),
    "closed-form, window": ("closed-form", WINDOW),
    "quick": ("quick", {}),
    "quick, window": ("quick", WINDOW),
}
KEEP = (0, 0.25, 0.5, 0.75)
# (recipe, share of kept layers): times the teacher's perplexity that we want to stay below
GOALS = {
    ("closed-form", 0): 2.0,
    ("closed-form", 0.5): 1.2,
    ("closed-form", 0.75): 1.06,
    ("quick", 0): 1.5,
    ("quick", 0.25): 1.25,
    ("quick", 0.5): 1.08,
}
MEASURED = ("perplexity", "of the teacher's", "on speeches", "KL", "agreement", "same text", "minutes", "peak memory")
NEEDLES = 8  # texts of each kind
HEADER = ("recipe", "kept softmax", *MEASURED, *COLUMNS, "threads", "commit")


def results(
    *,
    ways: Sequence[str] = tuple(WAYS),
    keep: Sequence[float] = KEEP,
    tokens: int = 16384,
    output: str | Path = "out/results",
    file: Path = ROWS,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Convert and measure for each of `ways` and each `keep` that `file` has no row of; gives all rows of the file."""
    for way, share in product(ways, keep):
        rows = measured_rows(file)
        if not any((row["recipe"], row["keep"]) == (way, share) for row in rows):
            # a process of its own: the peak of its memory is that of this one conversion
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                place = Path(output) / f"{way}-{share}"
                row = process.submit(_measured, way, share, tokens=tokens, output=place, seed=seed).result()
            write_whole(file, json.dumps(in_order([*rows, row]), indent=2, default=str) + "\n")
    return measured_rows(file)


def _measured(way: str, share: float, *, tokens: int, output: Path, seed: int) -> dict[str, Any]:
    train, heldout = brown()
    recipe, mixer = WAYS[way]
    if not output.is_dir():
        convert(
            smollm2_gguf(),
            rule="gated_delta_net",
            keep=share,
            recipe=recipe,
            mixer=mixer,
            data={"train": train, "test": heldout},
            output=output,
            resume=True,
            seed=seed,
        )
    report = json.loads((output / "report.json").read_text())
    measured = evaluate(output, against=smollm2_gguf(), data=heldout, tokens=tokens, needles=NEEDLES)
    speeches = evaluate(output, against=smollm2_gguf(), data=state_of_the_union()[1], tokens=tokens, needles=0)
    return {
        "recipe": way,
        "keep": share,
        "seconds": sum(stage["seconds"] for stage in report["stages"].values()),
        "peak_memory_bytes": report["peak_memory_bytes"],
        "teacher_bytes": report["teacher_bytes"],
        "environment": report["environment"],
        "evaluation": measured,
        "speeches": speeches,
    }


def measured_rows(file: Path) -> list[dict[str, Any]]:
    """The rows that have been measured so far."""
    return json.loads(file.read_text()) if file.is_file() else []


def in_order(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Way by way, the fewest kept layers first."""
    return sorted(rows, key=lambda row: (list(WAYS).index(row["recipe"]), row["keep"]))


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown, with what they were measured on below."""
    on = rows[0]["environment"]
    lines = [HEADER, tuple("---" for _ in HEADER), *(_cells(row) for row in rows)]
    recalled = next((row["evaluation"] for row in rows if "recall" in row["evaluation"]), {})
    theirs = ", ".join(cells(recalled.get("recall", {}).get("teacher")))
    devices = dict.fromkeys(row["environment"]["device"] for row in rows)
    teacher, dates = rows[0]["evaluation"], sorted({row["environment"]["date"][:10] for row in rows})
    return "\n".join(
        [
            *(f"| {' | '.join(line)} |" for line in lines),
            "",
            f"SmolLM2-135M-Instruct (perplexity {teacher['teacher_perplexity']:.1f}), gated delta rule, "
            f"{teacher['tokens']} held-out tokens of the Brown corpus, from which it was converted, and of speeches to "
            f"the Congress (State of the Union), which are another kind of text; {', '.join(dates)}, "
            f"{' and '.join(devices)}, torch {on['versions']['torch']}, transformers {on['versions']['transformers']}; "
            f"minutes and memory of the conversion, without measuring it (the teacher's weights take "
            f"{rows[0]['teacher_bytes'] / 2**30:.1f} GiB in float32); same text: of {WRITTEN} tokens that the teacher "
            f"writes greedily after {GIVEN}, those before the student's first other one, over {TEXTS} texts; "
            f"{EXPLAINED}, in {NEEDLES} texts each (the teacher: {theirs}); window: {WINDOW['window']} tokens and "
            f"{WINDOW['sinks']} sinks beside the fast "
            "weights; printed by `make results`.",
        ]
    )


def as_goals(rows: Sequence[dict[str, Any]]) -> str:
    """What was to be reached, and what was, on both texts and with a window beside the fast weights."""
    found = {(row["recipe"], row["keep"]): row for row in rows}
    header = ("recipe", "kept softmax", "at most", "reached", "on speeches", "closed form with a window", "on speeches")
    lines = [header, tuple("---" for _ in header)]
    for (recipe, keep), most in GOALS.items():
        reached = [_ratios(found.get(each)) for each in ((recipe, keep), ("closed-form, window", keep))]
        lines.append((recipe, f"{keep:.0%}", f"{most:.2f} x", *reached[0], *reached[1]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _ratios(row: Mapping[str, Any] | None) -> tuple[str, str]:
    """Times the teacher's perplexity, on the text it was converted from and on the other."""
    measured = [row[name] if row and name in row else None for name in ("evaluation", "speeches")]
    first, second = (f"{each['ratio']:.2f} x" if each else "-" for each in measured)
    return first, second


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    measured = row["evaluation"]
    return (
        row["recipe"],
        f"{row['keep']:.0%}",
        f"{measured['perplexity']:.1f}",
        *_ratios(row),
        f"{measured['kl']:.3f}",
        f"{measured['agreement']:.2f}",
        f"{measured['followed']:.2f}" if "followed" in measured else "-",
        f"{row['seconds'] / 60:.1f}",
        f"{row['peak_memory_bytes'] / 2**30:.1f} GiB",
        *cells(measured.get("recall", {}).get("model")),
        str(row["environment"]["threads"]),
        f"`{row['environment']['commit']}`",
    )


def quote(table: str, name: str = "results", readme: Path = ROOT / "README.md") -> None:
    """Put the table where the README quotes it, between <!-- name --> and <!-- /name -->."""
    before, start, rest = readme.read_text().partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    if not start or not end:
        raise ValueError(f"{readme} has no <!-- {name} --> ... <!-- /{name} --> to write between")
    readme.write_text(f"{before}{start}{table}\n{end}{after}")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command behind `make results`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", choices=WAYS, help="only this way of converting")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--output", default="out/results")
    given = parser.parse_args(arguments)
    ways = tuple(WAYS) if given.way is None else (given.way,)
    if not SPEED.is_file():
        SPEED.parent.mkdir(parents=True, exist_ok=True)
        bench_cpu(json=SPEED)
    rows = results(ways=ways, tokens=given.tokens, output=given.output)
    table = as_table(rows)
    quote(markdown(json.loads(SPEED.read_text())), "speed")
    quote(as_goals(rows), "goals")
    quote(table)
    print(table)


if __name__ == "__main__":
    main()
