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

import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
from .offload import LAYERS, finish_offloaded
from .plan import Plan, describe, offloads, within
from .recipes import Recipe, find_recipe
from .report import environment, measure, peak_memory
from .run import Run, as_begun, begin, check_output, fingerprint
from .solve import solve
from .teacher import Teacher, load_teacher

REPORT_TOKENS = 4096


def convert(
    teacher: Teacher,
    *,
    tokenizer: PreTrainedTokenizerBase | str | None = None,
    rule: str = "gated_delta_net",
    keep: Keep = 0.25,
    recipe: str | Recipe = "quick",
    mixer: Mapping[str, Any] | None = None,
    budget: int | str | None = None,
    data: Any = None,
    output: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    max_memory: int | str | None = None,
    dry_run: bool = False,
) -> PreTrainedModel:
    """Swap the softmax attention of `teacher` for fast weights and repair what that broke; returns the student.

    teacher: a model (never modified), a folder, a Hub id or a .gguf file. keep: layers that stay softmax (keep.py).
    recipe: the name of one, or one of your own (recipes.py). mixer: options of the mixers that differ from those of the
    recipe, {"window": 64, "sinks": 4}. budget: tokens for the stages that take gradient steps, or a time ("20m").
    data: a text, a Path, a list of texts or a datasets object; with splits "train" and "test" the
    report is measured on "test". output: a new folder for model, tokenizer, report and card; an interrupted run
    continues with `resume`. max_memory: bytes, or a size ("8GiB"), by
    default what is free; a teacher that needs more is solved layer by layer from its safetensors files, and the student
    returned has its weights in `output` alone (its own are on the device "meta"). dry_run: print the plan and return
    the teacher without its weights. The student carries `conversion_report`. Raises ValueError for whatever cannot be
    done, before it starts.
    """
    options, output = find_recipe(recipe).with_mixer(mixer), None if output is None else Path(output)
    options.options(rule)
    check_output(output, resume=resume)
    given = isinstance(teacher, PreTrainedModel)
    model, tokenizer = load_teacher(teacher, tokenizer=tokenizer, device=device, dtype=dtype, weights=False)
    tokenizer = _checked(model, tokenizer, empty=dry_run or not given)
    num_layers = model.config.num_hidden_layers
    plan = Plan(
        teacher=str(model.name_or_path) if given else str(teacher),
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
    offload = _offloads(plan, model, max_memory, work=work, device=device, given=given)
    if offload and work is None and not dry_run:
        raise ValueError("this teacher is converted layer by layer, to files; give output=")
    if not (given or offload or dry_run):
        model, _ = load_teacher(teacher, tokenizer=tokenizer, device=device, dtype=dtype)
    plan = (as_begun(work, plan) if resume and work is not None else None) or within(plan, budget, model)
    blocks = _blocks(plan, train, heldout, tokenizer)
    plan = replace(plan, text=fingerprint(blocks))
    Console(stderr=True).print(describe(plan, model, offload=offload), highlight=False)
    if dry_run:
        return model
    if work is not None:
        begin(work, plan, resume=resume)
    run = Run(plan, model, tokenizer, blocks, work, not given, _first_report(plan, model))
    with nullcontext() if work is None else told_when_full(work):
        student: Any = finish_offloaded(run, output) if offload and output is not None else _finish(run, output)
    student.conversion_report = run.report
    return student


def _checked(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, *, empty: bool
) -> PreTrainedTokenizerBase:
    """The tokenizer. Refuses a teacher without one, in a narrow dtype or, unless it may be `empty`, without weights."""
    if tokenizer is None:
        raise ValueError("the teacher comes without a tokenizer; give one as tokenizer=, a folder or a Hub id")
    if model.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"the teacher is {model.dtype}; least squares and training need float32 weights: give dtype=torch.float32"
        )
    if not empty and any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError('the teacher has weights on the device "meta", which hold nothing: plan it with dry_run=True')
    return tokenizer


def _offloads(
    plan: Plan, model: PreTrainedModel, limit: int | str | None, *, work: Path | None, device: Any, given: bool
) -> bool:
    """Whether to go layer by layer; a run goes on as it was begun."""
    if given or torch.device(device or "cpu").type != "cpu":
        if limit is not None:
            raise ValueError("max_memory is for a teacher given as a folder or Hub id, on the CPU; leave it out")
        return False
    if work is not None and (work / LAYERS).is_dir():
        return True
    return offloads(plan, model, limit)


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
    for name, train in {"distil": partial(distil, teacher=run.teacher), "extend": extend}.items():
        if getattr(recipe, f"{name}_tokens"):
            student = run.stage(name, student, partial(_trained, run, student, name, train))
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
    run.report |= _measured(run, student)
    run.publish(unfinished, output)
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
    run.note_choices({layer: {**found.get(layer, {}), **solved[layer]} for layer in solved})
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


def _trained(run: Run, student: PreTrainedModel, name: str, train: Callable[..., dict[str, Any]]) -> PreTrainedModel:
    """The whole student after a stage of gradient steps."""
    if run.share:
        _own_weights(student)
    blocks = run.blocks[name]
    log = train(
        student,
        ids_NT=blocks,
        output_dir=None if run.work is None else run.work / f"{name}.steps",
        resume=True,
        seed=run.plan.seed,
        progress=run.progress,
        **getattr(run.plan.recipe, name),
    )
    run.report["stages"][name] = {"tokens": blocks.numel(), **log}
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
