"""The verb: convert(teacher, rule=..., keep=..., recipe=..., data=..., output=...).

    plan      check every argument, count the tokens, print what will happen and how long it should take
    solve     calibrate and solve all layers in closed form; rank them if `keep` asks for it, and solve again (solve.py)
    align     each mixer to its attention, by gradient (align.py)
    distil    the whole student to the teacher's predictions (distil.py)
    extend    the student by itself on longer sequences (extend.py)
    report    measure on text that no stage has read (report.py)

A finished stage is saved beside `output`, in `output`.partial, until the finished model is renamed into place.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from hf_fwp.hosts import converted_layers
from hf_fwp.layer import layers_of

from .align import align
from .baselines import HALF_LIFE, set_plain_rates
from .checkpoint import told_when_full
from .data import demo_corpus, read_data, token_blocks
from .distil import distil
from .extend import extend
from .families import copy_teacher
from .keep import Keep, keep_softmax, kept_count, most_needed, rank_layers
from .plan import Plan, describe, within
from .recipes import Recipe, find_recipe
from .report import environment, measure, peak_memory, write_report
from .solve import solve
from .teacher import Teacher, load_teacher

REPORT_TOKENS = 4096


@dataclass
class Run:
    """A conversion under way: its models, its text, what it has found so far, and where it saves."""

    plan: Plan
    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    blocks: dict[str, Tensor]
    work: Path | None
    share: bool
    report: dict[str, Any]
    progress: bool = True

    def stage(self, name: str, student: PreTrainedModel | None, do: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        """Run a stage, or load what it gave when it was finished before."""
        saved = None if self.work is None else self.work / name
        if saved is not None and (saved / "stage.json").is_file():
            self.report = json.loads((saved / "stage.json").read_text())
            loaded: Any = AutoModelForCausalLM.from_pretrained(saved, dtype=self.teacher.dtype)
            return loaded.to(self.teacher.device)
        del student
        started = time.perf_counter()
        result = do()
        self.report["stages"].setdefault(name, {})["seconds"] = time.perf_counter() - started
        if saved is not None:
            _save_whole(saved, result, {"stage.json": json.dumps(self.report, default=str)})
        return result


def convert(
    teacher: Teacher,
    *,
    tokenizer: PreTrainedTokenizerBase | str | None = None,
    rule: str = "gated_delta_net",
    keep: Keep = 0.25,
    recipe: str | Recipe = "quick",
    budget: int | str | None = None,
    data: Any = None,
    output: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    dry_run: bool = False,
) -> PreTrainedModel:
    """Swap the softmax attention of `teacher` for fast weights and repair what that broke; returns the student.

    teacher: a model (never modified), a folder, a Hub id or a .gguf file. keep: layers that stay softmax (keep.py).
    recipe: the name of one, or one of your own (recipes.py). budget: tokens for the stages that take gradient steps,
    or a time ("20m"). data: a text, a Path, a list of texts or a datasets object; with splits "train" and "test" the
    report is measured on "test". output: a new folder for model, tokenizer, report and card; an interrupted run
    continues with `resume`. dry_run: print the plan and return the teacher. The student carries `conversion_report`.
    Raises ValueError for whatever cannot be done, before it starts.
    """
    options, output = find_recipe(recipe), None if output is None else Path(output)
    options.options(rule)
    _check_output(output, resume=resume)
    model, tokenizer = load_teacher(teacher, tokenizer=tokenizer, device=device, dtype=dtype)
    if tokenizer is None:
        raise ValueError("the teacher comes without a tokenizer; give one as tokenizer=, a folder or a Hub id")
    if model.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"the teacher is {model.dtype}; least squares and training need float32 weights: give dtype=torch.float32"
        )
    num_layers = model.config.num_hidden_layers
    plan = Plan(
        teacher=str(model.name_or_path) if isinstance(teacher, PreTrainedModel) else str(teacher),
        rule=rule,
        keep=keep,
        recipe=options,
        seed=seed,
        num_layers=num_layers,
        kept=kept_count(keep, num_layers),
        data=type(data).__name__,
        budget=budget,
    )
    train, heldout = _texts(data)
    work = None if output is None else output.with_name(output.name + ".partial")
    plan = (_as_begun(work, plan) if resume and work is not None else None) or within(plan, budget, model)
    blocks = _blocks(plan, train, heldout, tokenizer)
    plan = replace(plan, text=_fingerprint(blocks))
    Console(stderr=True).print(describe(plan, model), highlight=False)
    if dry_run:
        return model
    if work is not None:
        _begin(work, plan, resume=resume)
    run = Run(
        plan, model, tokenizer, blocks, work, not isinstance(teacher, PreTrainedModel), _first_report(plan, model)
    )
    with nullcontext() if work is None else told_when_full(work):
        student: Any = _finish(run, output)
    student.conversion_report = run.report
    return student


def _texts(data: Any) -> tuple[Any, Any]:
    """(training text, held-out text or None)."""
    if data is None:
        _, train, heldout = demo_corpus()
        return train, heldout
    if isinstance(data, dict):  # a datasets.DatasetDict is one
        if "train" not in data:
            raise ValueError(f"data has the splits {', '.join(map(str, data))}; it needs 'train' (and, if any, 'test')")
        return read_data(data["train"]), read_data(data["test"]) if "test" in data else None
    return read_data(data), None


def _blocks(plan: Plan, train: Any, heldout: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """Token blocks of each stage, none in two of them. Without held-out text the report gets blocks of its own."""
    recipe, length = plan.recipe, plan.recipe.sequence_length
    report_tokens = recipe.report.get("tokens", REPORT_TOKENS)
    counts = {
        "report": 0 if heldout is not None else report_tokens // length,
        "rank": -(-recipe.rank_tokens // length) if plan.ranked else 0,
        "rank_solve": recipe.rank_solve_tokens // length if plan.ranked else 0,
        "solve": recipe.solve_tokens // length,
        "align": -(-recipe.align_tokens // length),
        "distil": -(-recipe.distil_tokens // length),
    }
    used = sum(counts.values()) * length
    longer = -(-recipe.extend_tokens // recipe.extend_length) * recipe.extend_length
    ids_NT = token_blocks(train, tokenizer, sequence_length=length, tokens=used + longer)
    ids_NT, rest_NT = ids_NT.split([used // length, len(ids_NT) - used // length])
    # documents are long: without a shuffle a stage would read few of them
    order = torch.randperm(len(ids_NT), generator=torch.Generator().manual_seed(plan.seed))
    parts = dict(zip(counts, ids_NT[order].split(list(counts.values())), strict=True))
    if longer:
        parts["extend"] = rest_NT.flatten()[:longer].view(-1, recipe.extend_length)
    if heldout is not None:
        parts["report"] = token_blocks(heldout, tokenizer, sequence_length=length, tokens=report_tokens)
    return parts


def _finish(run: Run, output: Path | None) -> PreTrainedModel:
    student = run.stage("solve", None, lambda: _solved(run))
    recipe = run.plan.recipe
    if recipe.align_tokens and converted_layers(student.config):
        student = run.stage("align", student, lambda: _aligned(run, student))
    if recipe.distil_tokens:
        student = run.stage("distil", student, lambda: _distilled(run, student))
    if recipe.extend_tokens:
        student = run.stage("extend", student, lambda: _extended(run, student))
    run.report |= {
        "kept_layers": [i for i in range(run.plan.num_layers) if i not in converted_layers(student.config)],
        "peak_memory_bytes": peak_memory(),
    }
    if output is None:
        run.report |= _measured(run, student)
        return student.eval()
    assert run.work is not None
    unfinished = run.work / "finished"
    shutil.rmtree(unfinished, ignore_errors=True)
    student.save_pretrained(unfinished)
    assert run.tokenizer is not None
    run.tokenizer.save_pretrained(unfinished)
    run.report |= _measured(run, student)
    run.report = write_report(unfinished, {**run.report, "name": output.name})
    if output.is_dir():
        output.rmdir()
    unfinished.rename(output)
    shutil.rmtree(run.work)
    return student.eval()


def _measured(run: Run, student: PreTrainedModel) -> dict[str, Any]:
    settings = {**_MEASURES, **run.plan.recipe.report}
    return measure(student, run.teacher, run.blocks["report"], tokenizer=run.tokenizer, **settings)


_MEASURES: dict[str, Any] = {
    "tokens": REPORT_TOKENS,
    "baseline_tokens": 1024,
    "residual_tokens": 0,
    "lengths": (256, 1024),
    "new_tokens": 32,
}


def _solved(run: Run) -> PreTrainedModel:
    """All layers converted and solved, or, after ranking, all but the kept ones."""
    plan, teacher, recipe = run.plan, run.teacher, run.plan.recipe
    named = plan.named()
    layers = [layer for layer in range(plan.num_layers) if layer not in named]
    student = copy_teacher(teacher, layers=layers, fwp=recipe.options(plan.rule), share=run.share)
    found: dict[int, dict[str, Any]] = {}
    if plan.ranked:
        assert plan.kept is not None
        found = _start(run, student, run.blocks["rank_solve"], **{**recipe.solve, "heldout": 2, "stream": "teacher"})
        swapped = run.blocks["rank"]
        swapped = swapped[:, : recipe.rank_tokens // len(swapped)]
        ranking = rank_layers(student, teacher, swapped, seed=plan.seed, progress=run.progress, **recipe.rank)
        run.report["ranking"] = ranking
        student = keep_softmax(student, teacher, most_needed(ranking, plan.kept), share=run.share)
    given = {"calibrated": plan.ranked, "stream": recipe.stream, **recipe.solve}
    solved = _start(run, student, run.blocks["solve"], **given)
    run.report["choices"] = {layer: {**found.get(layer, {}), **solved[layer]} for layer in solved}
    run.report["residuals"] = {layer: choice["residual"] for layer, choice in run.report["choices"].items()}
    return student


def _start(run: Run, student: PreTrainedModel, ids_NT: Tensor, **settings: Any) -> dict[int, dict[str, Any]]:
    """Solve, or, in a recipe without that stage, the same rates in all heads."""
    if run.plan.recipe.solve_tokens:
        return solve(student, run.teacher, ids_NT, progress=run.progress, **settings)
    for mixer in layers_of(student).values():
        set_plain_rates(mixer, half_life=HALF_LIFE)
    return {}


def _aligned(run: Run, student: PreTrainedModel) -> PreTrainedModel:
    checkpoint = None if run.work is None else run.work / "align.steps"
    blocks, settings = run.blocks["align"], run.plan.recipe.align
    log = align(
        student,
        run.teacher,
        blocks,
        checkpoint=checkpoint,
        resume=True,
        seed=run.plan.seed,
        progress=run.progress,
        **settings,
    )
    run.report["stages"]["align"] = {"tokens": blocks.numel(), **log}
    return student


def _distilled(run: Run, student: PreTrainedModel) -> PreTrainedModel:
    if run.share:
        _own_weights(student)
    blocks, settings = run.blocks["distil"], run.plan.recipe.distil
    log = distil(
        student,
        run.teacher,
        blocks,
        output_dir=None if run.work is None else run.work / "distil.steps",
        resume=True,
        seed=run.plan.seed,
        progress=run.progress,
        **settings,
    )
    run.report["stages"]["distil"] = {"tokens": blocks.numel(), **log}
    return student


def _extended(run: Run, student: PreTrainedModel) -> PreTrainedModel:
    if run.share:
        _own_weights(student)
    blocks = run.blocks["extend"]
    log = extend(
        student,
        blocks,
        output_dir=None if run.work is None else run.work / "extend.steps",
        resume=True,
        seed=run.plan.seed,
        progress=run.progress,
        **run.plan.recipe.extend,
    )
    run.report["stages"]["extend"] = {"tokens": blocks.numel(), **log}
    return student


def _own_weights(student: PreTrainedModel) -> None:
    """Copies of the weights that are still in the teacher's memory: they are going to be trained."""
    for parameter in student.parameters():
        parameter.data = parameter.data.clone()


def _first_report(plan: Plan, model: PreTrainedModel) -> dict[str, Any]:
    return {
        "teacher": plan.teacher,
        "rule": plan.rule,
        "recipe": plan.recipe.name,
        "keep": plan.keep,
        "seed": plan.seed,
        "num_layers": plan.num_layers,
        "tokens": plan.recipe.tokens(ranked=plan.ranked),
        "teacher_bytes": 4 * model.num_parameters(),
        "data": plan.data,
        "environment": environment(),  # at the start: a checkout can move on while its code runs
        "stages": {},
    }


def _check_output(output: Path | None, *, resume: bool) -> None:
    if output is None:
        if resume:
            raise ValueError("resume needs the output folder of the run to continue; give output=")
        return
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise ValueError(f"the output folder {output} is in use; give a new folder, or delete this one")


def _as_begun(work: Path, plan: Plan) -> Plan | None:
    """The plan with the tokens that an interrupted run was begun with: a budget of time would be measured anew."""
    file = work / "plan.json"
    if not file.is_file():
        return None
    saved = json.loads(file.read_text())
    if plan.budget is None or saved.get("budget") != plan.budget or saved["recipe"]["name"] != plan.recipe.name:
        return None
    tokens = {name: saved["recipe"][name] for name in ("align_tokens", "distil_tokens", "extend_tokens")}
    return replace(plan, recipe=replace(plan.recipe, **tokens))


def _fingerprint(blocks: dict[str, Tensor]) -> str:
    """The same for the same tokens in the same stages."""
    digest = hashlib.sha256()
    for name, ids_NT in blocks.items():
        digest.update(name.encode() + ids_NT.numpy().tobytes())
    return digest.hexdigest()[:16]


def _begin(work: Path, plan: Plan, *, resume: bool) -> None:
    """Make the folder of unfinished work, or check that the one there belongs to this plan."""
    file = work / "plan.json"
    if file.is_file():
        if not resume:
            raise ValueError(f"{work} holds an interrupted run; continue it with resume=True, or delete the folder")
        saved, given = json.loads(file.read_text()), plan.as_json()
        changed = [name for name in given if saved.get(name) != given[name]]
        if changed:
            told = ", ".join(f"{name} was {saved.get(name)!r}, is {given[name]!r}" for name in changed)
            raise ValueError(
                f"{work} holds a run with other arguments ({told}); give the same ones, or delete the folder"
            )
        return
    work.mkdir(parents=True, exist_ok=True)
    unfinished = work / "plan.json.unfinished"
    unfinished.write_text(json.dumps(plan.as_json(), indent=2))
    unfinished.rename(file)


def _save_whole(folder: Path, model: PreTrainedModel, files: dict[str, str]) -> None:
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    for name, text in files.items():
        (unfinished / name).write_text(text)
    unfinished.rename(folder)
