"""What each choice of a recipe is worth: the same conversion with one thing changed, run by run.

    hf-fwp ablate TEACHER                                    every choice of CHOICES that the recipe makes
    hf-fwp ablate TEACHER --keep 0.5 --choices "kept"        those whose names begin so
    hf-fwp ablate TEACHER --recipe quick,radlads --sweep lr  recipes side by side, each at the rates of SWEEPS

A budget is of all tokens that a run reads. Every finished run is a file in OUTPUT/runs and is not repeated; an
interrupted one that takes gradient steps goes on where it was. OUTPUT/ablation.json and ablation.md hold the table of
all that are finished. A student with windows is measured without them, too.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import zip_longest
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_fwp.files import write_whole
from hf_fwp.hosts.options import graft_defaults
from hf_fwp.options import MixerOptions
from hf_fwp.telling import say

from .choices import AS_IT_IS, CHOICES, SWEEPS, SWEPT, Choice
from .convert import convert
from .fingerprints import text_fingerprint, weights_fingerprint
from .keep import Keep, kept_count, kept_layers
from .plan import Plan, estimate, within
from .recall import COLUMNS, EXPLAINED, cells
from .recipes import TRAINING, Recipe, find_recipe
from .report import plain
from .teacher import Teacher, checked_tokenizer, load_teacher

SAME = 0.02  # the share by which the KL of a choice may differ and still count as the same
HEADER = ("recipe", "choice", "expected", "came out", "of the teacher's", "KL", "agreement", "minutes", "runs")
WITHOUT = "KL without windows"
FINGERPRINTS = ("weights", "text")  # of the teacher, and of the data


@dataclass(frozen=True)
class Run:
    """One conversion of the table."""

    choice: str
    expected: str
    recipe: Recipe
    rule: str
    keep: Keep
    seed: int
    number: int = 0
    """among the runs of this choice"""

    @property
    def name(self) -> str:
        """Of its file."""
        words = f"{self.recipe.name} {self.choice} {self.seed + self.number}"
        return "-".join(words.replace(",", " ").split())

    def beside(self, first: Recipe) -> Run:
        """The run with what is expected of a recipe as it is beside another one, the first of the table."""
        if self.recipe.name == first.name or self.expected != CHOICES[AS_IT_IS].expected:
            return self
        return replace(self, expected=f"worse than {first.name}")


def ablate(
    teacher: Teacher,
    *,
    tokenizer: PreTrainedTokenizerBase | str | None = None,
    rule: str = "gated_delta_net",
    keep: Keep = 0,
    recipe: str | Recipe | Sequence[str | Recipe] = "closed-form",
    budget: int | str | None = None,
    choices: str | Sequence[str] | None = None,
    sweep: str | None = None,
    data: Any = None,
    tokens: int = 16384,
    needles: int = 0,
    output: str | Path = "out/ablation",
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    dry_run: bool = False,
) -> list[dict[str, Any]]:
    """Convert `teacher` once per choice and measure each student on `tokens` held-out tokens; returns the table's rows.

    Arguments as in convert. recipe: one or several; one that is for a certain rule is run with it. budget: of tokens,
    all that a run reads, with gradient steps or without; extend, for contexts longer than what is measured, is left
    out then. choices: names of CHOICES, or how they begin; None: all for one recipe, only AS_IT_IS for several or with
    a sweep. sweep: a name of SWEEPS. needles: texts of each kind to recall from, too (recall.py). dry_run: print what
    would be run and how long it should take. Raises ValueError for an unknown choice or sweep, and for results in
    `output` that belong to other arguments.
    """
    made = [find_recipe(each) for each in ([recipe] if isinstance(recipe, (str, Recipe)) else recipe)]
    names = chosen(choices, alone=len(made) == 1 and sweep is None)
    if sweep is not None and sweep not in SWEEPS:
        raise ValueError(f"unknown sweep {sweep!r}; the sweeps are {', '.join(SWEEPS)}")
    model, tokenizer = load_teacher(teacher, tokenizer=tokenizer, device=device, dtype=dtype)
    fitted = [fitted_to(budget, each, model, rule=each.rule or rule, keep=keep) for each in made]
    asked: dict[str, Any] = {"keep": keep, "layers": model.config.num_hidden_layers, "seed": seed, "sweep": sweep}
    by_recipe = [list(runs_of(each, names, rule=each.rule or rule, **asked)) for each in fitted]
    # the first of every recipe first: a table that is not finished compares them too
    runs = [run.beside(fitted[0]) for turn in zip_longest(*by_recipe) for run in turn if run is not None]
    place = Path(output) / "runs"
    if dry_run:
        _show_plan(runs, place, model)
        return []
    tokenizer = checked_tokenizer(model, tokenizer, empty=False)
    told: dict[str, Any] = {"teacher": str(model.name_or_path), "data": type(data).__name__, "tokens": tokens}
    told |= {"weights": weights_fingerprint(model), "text": text_fingerprint(data, tokenizer, tokens=tokens)}
    told |= {"needles": needles} if needles else {}
    results: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for number, run in enumerate(runs, start=1):
        file = place / f"{run.name}.json"
        if not _is_there(file, run, told):
            say(f"run {number} of {len(runs)}: {run.recipe.name}, {run.choice}")
            measures = {"tokens": tokens, "needles": needles}
            result = _measured(run, model, tokenizer, data, measures=measures, work=place / run.name)
            write_whole(file, json.dumps({"run": said(run, told), **result}, indent=2))
        results.append(json.loads(file.read_text()))
        rows = _written(results, Path(output))
    return rows


def _written(results: Sequence[Mapping[str, Any]], output: Path) -> list[dict[str, Any]]:
    """The rows of what is finished, which `output` holds as JSON and as Markdown from now on."""
    rows = rows_of(results)
    write_whole(output / "ablation.json", json.dumps(rows, indent=2))
    write_whole(output / "ablation.md", as_table(rows))
    return rows


def fitted_to(budget: int | str | None, recipe: Recipe, model: PreTrainedModel, *, rule: str, keep: Keep) -> Recipe:
    """The recipe with as many tokens for gradient steps as its other stages leave of the budget."""
    if budget is None:
        return recipe
    return within(planned(model, rule, keep, replace(recipe, extend_tokens=0)), budget, model, in_all=True).recipe


def planned(model: PreTrainedModel, rule: str, keep: Keep, recipe: Recipe) -> Plan:
    """What `convert` would do, for an estimate."""
    layers = model.config.num_hidden_layers
    kept = kept_count(keep, layers)
    return Plan(str(model.name_or_path), rule, keep, recipe, seed=0, num_layers=layers, kept=kept, data="")


def chosen(choices: str | Sequence[str] | None, *, alone: bool) -> list[str]:
    """The names of CHOICES that are asked for, the one that all are compared with first."""
    if choices is None:
        return list(CHOICES) if alone else [AS_IT_IS]
    wanted = [choices] if isinstance(choices, str) else list(choices)
    for start in wanted:
        if not any(name.startswith(start) for name in CHOICES):
            raise ValueError(f"no choice begins with {start!r}; the choices are {', '.join(CHOICES)}")
    return [name for name in CHOICES if name == AS_IT_IS or name.startswith(tuple(wanted))]


def runs_of(
    recipe: Recipe, names: Sequence[str], *, rule: str, keep: Keep, layers: int, seed: int, sweep: str | None
) -> Iterator[Run]:
    """The runs of one recipe: every choice that changes something in it, under every learning rate of the sweep."""
    for factor in (1.0,) if sweep is None else SWEEPS[sweep]:
        rated = recipe.with_rates(factor)
        if factor != 1 and rated == recipe:
            continue  # it takes no gradient steps
        for name in names:
            choice = CHOICES[name]
            changed = rated.changed(choice.change)
            if name != AS_IT_IS and not matters(rated, changed, choice, rule=rule, keep=keep, layers=layers):
                continue
            told = name if sweep is None else f"{name}, {sweep} x {factor:g}"
            expected = choice.expected if factor == 1 else SWEPT
            for number in range(choice.seeds):
                kept = _kept(choice.keep, keep, layers=layers, seed=seed + number)
                yield Run(told, expected, changed, rule, kept, seed, number)


def matters(before: Recipe, after: Recipe, choice: Choice, *, rule: str, keep: Keep, layers: int) -> bool:
    """Whether a choice makes a difference: to the mixers, to a stage that runs, or to which layers are kept."""
    if choice.keep is not None:
        return 0 < _count(keep, layers) < layers
    ranked = kept_count(keep, layers) is not None and 0 < _count(keep, layers) < layers
    off = [stage for stage in TRAINING if not getattr(before, f"{stage}_tokens")]
    hidden: dict[str, Any] = {stage: {} for stage in off} | {"fwp": {}} | ({} if ranked else {"rank": {}})
    hidden |= {"solve_tokens": 0, "solve_more": 1.0}  # together they say how much is read
    solved = [recipe.solved for recipe in (before, after)]
    unsaid = {option.name: option.default for option in fields(MixerOptions)} | graft_defaults(rule)
    mixers = [{**unsaid, **recipe.options(rule)} for recipe in (before, after)]
    said = [replace(_heeded(recipe, rule), **hidden) for recipe in (before, after)]
    return any(first != second for first, second in (said, solved, mixers))


def _heeded(recipe: Recipe, rule: str) -> Recipe:
    """The recipe without what it says of windows, if it has none."""
    if recipe.options(rule).get("window"):
        return recipe
    stages = {stage: dict(getattr(recipe, stage)) for stage in TRAINING}
    for settings in stages.values():
        settings.pop("window_dropout", None)
    return replace(recipe, **stages)


def _count(keep: Keep, layers: int) -> int:
    count = kept_count(keep, layers)
    return len(kept_layers(keep, layers)) if count is None else count


def _kept(way: str | None, keep: Keep, *, layers: int, seed: int) -> Keep:
    """`keep` of a run: as many layers as asked for, chosen this way."""
    if way is None:
        return keep
    count = _count(keep, layers)
    if way == "uniform":
        return kept_layers(f"uniform:{count / layers}", layers)
    return sorted(random.Random(seed).sample(range(layers), count))


def said(run: Run, told: Mapping[str, Any]) -> dict[str, Any]:
    """All that a run's result depends on, as JSON has it."""
    return plain({**asdict(run), **told})


def _is_there(file: Path, run: Run, told: Mapping[str, Any]) -> bool:
    if not file.is_file():
        return False
    before, asked = json.loads(file.read_text())["run"], said(run, told)
    before = {name: asked[name] for name in FINGERPRINTS} | before  # older results have none
    changed = [name for name in asked if name != "expected" and before.get(name) != asked[name]]
    if changed:
        raise ValueError(f"{file} is the result of a run with another {', '.join(changed)}; give another output")
    return True


def _measured(
    run: Run,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    data: Any,
    *,
    measures: Mapping[str, int],
    work: Path,
) -> dict[str, Any]:
    """Convert and evaluate. The model itself is not kept; its stages are, until the run has been measured."""
    parts = measures["tokens"] if run.recipe.options(run.rule).get("window") else 0
    report = {"baseline_tokens": parts, "residual_tokens": 0, "lengths": (), "prompts": (), **measures}
    student: Any = convert(
        model,
        tokenizer=tokenizer,
        rule=run.rule,
        keep=run.keep,
        recipe=replace(run.recipe, report=report),
        data=data,
        seed=run.seed,
        output=work if run.recipe.trained() else None,
        resume=bool(run.recipe.trained()),
    )
    found = student.conversion_report
    shutil.rmtree(work, ignore_errors=True)
    wanted = ("evaluation", "baselines", "recall", "kept_layers", "ranking", "residuals", "environment")
    seconds = sum(stage["seconds"] for stage in found["stages"].values())
    return plain({"seconds": seconds, **{name: found[name] for name in wanted if name in found}})


def rows_of(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row per recipe and choice, over its seeds, compared with the first row of the same recipe, and that with the
    first of all."""
    recipes = list(dict.fromkeys(result["run"]["recipe"]["name"] for result in results))
    results = sorted(results, key=lambda result: recipes.index(result["run"]["recipe"]["name"]))
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["run"]["recipe"]["name"], result["run"]["choice"]), []).append(result)
    rows: list[dict[str, Any]] = []
    for (recipe, choice), runs in groups.items():
        measured = [run["evaluation"] for run in runs]
        row: dict[str, Any] = {"recipe": recipe, "choice": choice, "expected": runs[0]["run"]["expected"]}
        row |= {name: mean(each[name] for each in measured) for name in ("ratio", "kl", "agreement")}
        row |= {"ratios": [each["ratio"] for each in measured], "seconds": mean(run["seconds"] for run in runs)}
        row |= {"tokens": measured[0]["tokens"], "teacher_perplexity": measured[0]["teacher_perplexity"]}
        # of a teacher in a folder its name: where it lies says nothing on another machine
        said_of = runs[0]["run"] | {"teacher": Path(runs[0]["run"]["teacher"]).name}
        row |= {"environment": runs[0]["environment"], "run": said_of}
        row |= {"recall": [run["recall"]["student"] for run in runs if "recall" in run]}
        parts = [run.get("baselines", {}) for run in runs]
        without = [each["window_off"]["kl"] for each in parts if "window_off" in each]  # none where all layers are kept
        row |= {"kl_without_windows": mean(without)} if without else {}
        first = next((before for before in rows if before["recipe"] == recipe), (rows or [row])[0])
        row["outcome"] = outcome(row["kl"], first["kl"])
        rows.append(row)
    return rows


def outcome(kl: float, reference: float) -> str:
    """Better, worse or same than the reference."""
    if abs(kl - reference) <= SAME * reference:
        return "same"
    return "better" if kl < reference else "worse"


def as_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown, with what they were measured on below."""
    run, on = rows[0]["run"], rows[0]["environment"]
    windowed, recalled = (any(row.get(name) for row in rows) for name in ("kl_without_windows", "recall"))
    header = (*HEADER, *([WITHOUT] if windowed else []), *(COLUMNS if recalled else []))
    lines = [header, tuple("---" for _ in header)]
    lines += [(*_cells(row), *_windowless(row, windowed), *_recalled(row, recalled)) for row in rows]
    commits = dict.fromkeys(f"`{row['environment']['commit']}`" for row in rows)
    return "\n".join(
        [
            *(f"| {' | '.join(line)} |" for line in lines),
            "",
            f"{run['teacher']} (perplexity {rows[0]['teacher_perplexity']:.1f}), {run['rule']}, keep {run['keep']}, "
            f"{rows[0]['tokens']} held-out tokens, commit {', '.join(commits)}, {on['date'][:10]}, {on['device']}, "
            f"{on['threads']} threads, torch {on['versions']['torch']}, transformers {on['versions']['transformers']}; "
            f"minutes of the conversion without measuring it; the same: within {SAME:.0%} of the KL of the recipe's "
            f"first row, or, for that, of the first row of all{f'; {EXPLAINED}' if recalled else ''}.",
            "",
        ]
    )


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    spread = "" if len(row["ratios"]) == 1 else f" ({min(row['ratios']):.3f} to {max(row['ratios']):.3f})"
    return (
        row["recipe"],
        row["choice"],
        row["expected"],
        row["outcome"],
        f"{row['ratio']:.3f} x{spread}",
        f"{row['kl']:.4f}",
        f"{row['agreement']:.3f}",
        f"{row['seconds'] / 60:.1f}",
        str(len(row["ratios"])),
    )


def _windowless(row: Mapping[str, Any], shown: bool) -> Iterator[str]:
    if shown:
        yield f"{row['kl_without_windows']:.4f}" if "kl_without_windows" in row else "-"


def _recalled(row: Mapping[str, Any], shown: bool) -> Iterator[str]:
    if shown:
        yield from map(", ".join, zip(*map(cells, row.get("recall") or [None]), strict=True))


def _show_plan(runs: Sequence[Run], place: Path, model: PreTrainedModel) -> None:
    """What would be run, and how long the runs that are not there yet should take."""
    total = 0.0
    for run in runs:
        there = (place / f"{run.name}.json").is_file()
        seconds = 0.0 if there else estimate(planned(model, run.rule, run.keep, run.recipe), model)
        total += seconds
        when = "there" if there else f"about {seconds / 60:.1f} minutes"
        say(f"  {run.recipe.name}, {run.choice}: {when}")
    say(f"{len(runs)} runs, about {total / 60:.0f} minutes")
