"""The table of results in the README: every recipe at every share of kept layers, on the same held-out text.

python -m hf_fwp.conversion.results                 all of it; rows that are there already are not measured again
python -m hf_fwp.conversion.results --recipe quick  one recipe
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .convert import convert
from .data import brown
from .evaluate import evaluate
from .report import commit, environment
from .teacher import load_teacher, smollm2_gguf

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ("closed-form", "quick")
KEEP = (0, 0.5, 0.75)
HEADER = ("recipe", "kept softmax", "perplexity", "of the teacher's", "KL", "agreement", "minutes", "commit")


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
                row = _measured(recipe, share, tokens=tokens, output=output / f"{recipe}-{share}", seed=seed)
                written.write_text(json.dumps(row, indent=2, default=str))
            rows.append(json.loads(written.read_text()))
    return rows


def _measured(recipe: str, share: float, *, tokens: int, output: Path, seed: int) -> dict[str, Any]:
    train, heldout = brown()
    started = time.perf_counter()
    student = convert(
        smollm2_gguf(),
        rule="gated_delta_net",
        keep=share,
        recipe=recipe,
        data={"train": train, "test": heldout},
        output=output,
        resume=True,
        seed=seed,
    )
    minutes = (time.perf_counter() - started) / 60
    teacher, tokenizer = load_teacher(smollm2_gguf())
    measured = evaluate(student, against=teacher, tokenizer=tokenizer, data=heldout, tokens=tokens)
    return {"recipe": recipe, "keep": share, "minutes": minutes, "commit": commit(), "evaluation": measured}


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown, with what they were measured on below."""
    on = environment()
    lines = [HEADER, tuple("---" for _ in HEADER), *(_cells(row) for row in rows)]
    teacher = rows[0]["evaluation"]
    return "\n".join(
        [
            *(f"| {' | '.join(line)} |" for line in lines),
            "",
            f"SmolLM2-135M-Instruct (perplexity {teacher['teacher_perplexity']:.1f}), gated delta rule, "
            f"{teacher['tokens']} held-out tokens of the Brown corpus, {on['date'][:10]}, {on['device']}, "
            f"{on['threads']} threads, torch {on['versions']['torch']}, transformers {on['versions']['transformers']}; "
            "printed by `make results`.",
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
        f"{row['minutes']:.0f}",
        f"`{row['commit']}`",
    )


def quote(table: str, readme: Path = ROOT / "README.md") -> None:
    """Put the table where the README quotes it."""
    before, start, rest = readme.read_text().partition("<!-- results -->\n")
    _, end, after = rest.partition("<!-- /results -->")
    if not start or not end:
        raise ValueError(f"{readme} has no <!-- results --> ... <!-- /results --> to write between")
    readme.write_text(f"{before}{start}{table}\n{end}{after}")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command behind `make results`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=RECIPES, help="only this recipe")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--output", default="out/results")
    given = parser.parse_args(arguments)
    recipes = RECIPES if given.recipe is None else (given.recipe,)
    table = as_table(results(recipes=recipes, tokens=given.tokens, output=given.output))
    if given.recipe is None:
        quote(table)
    print(table)


if __name__ == "__main__":
    main()
