"""The tables of results in the README: every recipe at every share of kept layers, on the same held-out text; before
them the speed of the operators.

python -m hf_fwp.conversion.results                 all of it; what is there already is not measured again
python -m hf_fwp.conversion.results --recipe quick  one recipe
"""

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from hf_fwp.bench.cpu import bench_cpu, markdown
from hf_fwp.files import write_whole

from .convert import convert
from .data import brown
from .evaluate import evaluate
from .teacher import smollm2_gguf

ROOT = Path(__file__).resolve().parent.parent
SPEED = ROOT / "hf_fwp" / "bench" / "results" / "cpu.json"
RECIPES = ("closed-form", "quick")
KEEP = (0, 0.5, 0.75)
MEASURED = ("perplexity", "of the teacher's", "KL", "agreement", "minutes", "peak memory")
HEADER = ("recipe", "kept softmax", *MEASURED, "commit")


def results(
    *,
    recipes: Sequence[str] = RECIPES,
    keep: Sequence[float] = KEEP,
    tokens: int = 16384,
    output: str | Path = "out/results",
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Convert, measure and write down a row for each recipe and each `keep`."""
    output = Path(output)
    rows = []
    for recipe in recipes:
        for share in keep:
            written = output / f"{recipe}-{share}.json"
            if not written.is_file():
                # a process of its own: the peak of its memory is that of this one conversion
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                    place = output / f"{recipe}-{share}"
                    row = process.submit(_measured, recipe, share, tokens=tokens, output=place, seed=seed).result()
                write_whole(written, json.dumps(row, indent=2, default=str))
            rows.append(json.loads(written.read_text()))
    return rows


def _measured(recipe: str, share: float, *, tokens: int, output: Path, seed: int) -> dict[str, Any]:
    train, heldout = brown()
    if not output.is_dir():
        convert(
            smollm2_gguf(),
            rule="gated_delta_net",
            keep=share,
            recipe=recipe,
            data={"train": train, "test": heldout},
            output=output,
            resume=True,
            seed=seed,
        )
    report = json.loads((output / "report.json").read_text())
    measured = evaluate(output, against=smollm2_gguf(), data=heldout, tokens=tokens)
    return {
        "recipe": recipe,
        "keep": share,
        "seconds": sum(stage["seconds"] for stage in report["stages"].values()),
        "peak_memory_bytes": report["peak_memory_bytes"],
        "teacher_bytes": report["teacher_bytes"],
        "environment": report["environment"],
        "evaluation": measured,
    }


def measured_rows(output: str | Path) -> list[dict[str, Any]]:
    """The rows that have been measured so far, in the order of the table."""
    files = [Path(output) / f"{recipe}-{share}.json" for recipe in RECIPES for share in KEEP]
    return [json.loads(file.read_text()) for file in files if file.is_file()]


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown, with what they were measured on below."""
    on = rows[0]["environment"]
    lines = [HEADER, tuple("---" for _ in HEADER), *(_cells(row) for row in rows)]
    teacher = rows[0]["evaluation"]
    return "\n".join(
        [
            *(f"| {' | '.join(line)} |" for line in lines),
            "",
            f"SmolLM2-135M-Instruct (perplexity {teacher['teacher_perplexity']:.1f}), gated delta rule, "
            f"{teacher['tokens']} held-out tokens of the Brown corpus, {on['date'][:10]}, {on['device']}, "
            f"{on['threads']} threads, torch {on['versions']['torch']}, transformers {on['versions']['transformers']}; "
            f"minutes and memory of the conversion, without measuring it (the teacher's weights take "
            f"{rows[0]['teacher_bytes'] / 2**30:.1f} GiB in float32); printed by `make results`.",
        ]
    )


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    measured = row["evaluation"]
    return (
        row["recipe"],
        f"{row['keep']:.0%}",
        f"{measured['perplexity']:.1f}",
        f"{measured['ratio']:.2f} x",
        f"{measured['kl']:.3f}",
        f"{measured['agreement']:.2f}",
        f"{row['seconds'] / 60:.1f}",
        f"{row['peak_memory_bytes'] / 2**30:.1f} GiB",
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
    parser.add_argument("--recipe", choices=RECIPES, help="only this recipe")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--output", default="out/results")
    given = parser.parse_args(arguments)
    recipes = RECIPES if given.recipe is None else (given.recipe,)
    if not SPEED.is_file():
        SPEED.parent.mkdir(parents=True, exist_ok=True)
        bench_cpu(json=SPEED)
    results(recipes=recipes, tokens=given.tokens, output=given.output)
    table = as_table(measured_rows(given.output))
    quote(markdown(json.loads(SPEED.read_text())), "speed")
    quote(table)
    print(table)


if __name__ == "__main__":
    main()
