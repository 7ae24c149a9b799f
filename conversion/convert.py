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
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_fwp.dtypes import parse_device
from hf_fwp.hosts import converted_layers
from hf_fwp.layer import layers_of
from hf_fwp.telling import say

from .align import align
from .baselines import HALF_LIFE, set_plain_rates
from .checkpoint import told_when_full
from .checks import check_plan, checked
from .data import read_splits
from .distil import distil
from .extend import LOSSES, extend
from .families import copy_teacher
from .fingerprints import blocks_fingerprint, weights_fingerprint
from .keep import Keep, for_recall, keep_softmax, kept_count, most_needed, plain_keep, rank_layers
from .offload import LAYERS, RANKED, finish_offloaded
from .plan import Plan, describe, offloads, too_large, too_short, within
from .positions import check_recipe
from .processes import copy_first, first_says, is_first, meet, processes, wait
from .recipes import TRAINING, Recipe, find_recipe
from .report import environment, measure, peak_memory
from .run import Run, as_begun, begin, begun, check_output
from .solve import solve
from .teacher import Teacher, checked_tokenizer, load_teacher
from .tokens import IGNORED, TooShort, check_ids, kept_blocks

REPORT_TOKENS = 4096
# folders of the unfinished work: token blocks, a file for each split, and large streams while solving
TOKENS, SPLITS, SOLVING = "tokens", ("train", "heldout"), "solve.streams"


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
    dtype: torch.dtype | str | None = None,
    max_memory: int | str | None = None,
    dry_run: bool = False,
) -> PreTrainedModel:
    """Swap the softmax attention of `teacher` for fast weights and repair what that broke; returns the student.

    teacher: a model (never modified), a folder, a Hub id or a .gguf file. keep: layers that stay softmax (keep.py).
    recipe: the name of one, or one of your own (recipes.py). mixer: options of the mixers that differ from those of the
    recipe, {"window": 64, "sinks": 4}. budget: tokens for the stages that take gradient steps, or a time ("20m").
    data: a text, a Path (a file, or a folder with a dataset), a list of texts or rows, or a datasets object; with
    splits "train" and "test" the report is measured on "test". output: a new folder for model, tokenizer, report and
    card; an interrupted run continues with `resume`. max_memory: bytes, or a size ("8GiB"), by default what is free; a
    teacher that needs more is solved layer by layer from its safetensors files, and the student returned has its
    weights in `output` alone (its own are on the device "meta"). dry_run: print the plan and return the teacher without
    its weights. The student carries `conversion_report`. Raises ValueError for whatever cannot be done, before it
    starts.
    """
    device = parse_device(device, here=not dry_run)
    meet(device)
    options = _shared(checked(find_recipe(recipe).with_mixer(mixer)))
    output = None if output is None else Path(output).absolute()
    if for_recall(keep):
        options = replace(options, rank={"recall": 1.0, **options.rank})
    options.options(rule)
    check_output(output, resume=resume)
    given = isinstance(teacher, PreTrainedModel)
    model, tokenizer = load_teacher(teacher, tokenizer=tokenizer, device=device, dtype=dtype, weights=False)
    tokenizer = checked_tokenizer(model, tokenizer, empty=dry_run or not given)
    check_recipe(model, options)
    num_layers = model.config.num_hidden_layers
    kept = kept_count(keep, num_layers)
    told, train, heldout = read_splits(data)
    plan = Plan(
        teacher=str(model.name_or_path) if given else str(teacher),
        rule=rule,
        keep=plain_keep(keep),
        recipe=options,
        seed=seed,
        num_layers=num_layers,
        kept=kept,
        data=told,
        budget=budget,
    )
    check_plan(plan, model, {**_MEASURES, "tokens": REPORT_TOKENS, **options.report}, split=heldout is not None)
    work = None if output is None else output.with_name(output.name + ".partial")
    # where align keeps what it learns in files
    on_disk = work is not None and torch.device(device or model.device).type in ("cpu", "meta")
    offload, lacking = _offloads(plan, model, max_memory, work=work, device=device, given=given)
    if lacking and not dry_run:
        raise ValueError(lacking)
    if offload and work is None and not dry_run:
        raise ValueError("this teacher is converted layer by layer, to files; give output=")
    if not (given or offload or dry_run):
        model, _ = load_teacher(teacher, tokenizer=tokenizer, device=device, dtype=dtype)
    plan = (as_begun(work, plan) if resume and work is not None else None) or within(plan, budget, model)
    plan = first_says(plan)  # a budget of time is measured
    if work is not None and not dry_run:
        _make_way(work, resume=resume)
    plan, blocks, missing = _read(plan, train, heldout, tokenizer, work, dry_run=dry_run)
    check_ids(model, blocks.values(), who="the teacher")
    if is_first():
        say(describe(plan, model, offload=offload, on_disk=on_disk, notes=(lacking, missing)))
    if dry_run:
        return model
    if work is not None:
        begin(work, replace(plan, weights=weights_fingerprint(model)), resume=resume)
    run = Run(plan, model, tokenizer, blocks, work, not given, _first_report(plan, model), progress=is_first())
    with nullcontext() if work is None else told_when_full(work):
        student: Any = finish_offloaded(run, output) if offload and output is not None else _finish(run, output)
    student.conversion_report = run.report
    return student


def _shared(recipe: Recipe) -> Recipe:
    """The recipe with steps that the processes can share."""
    shared = recipe.for_processes(processes())
    for stage in TRAINING:
        if getattr(recipe, f"{stage}_tokens") and shared.batch(stage) != recipe.batch(stage) and is_first():
            say(f"{stage}: {shared.batch(stage)} sequences a step instead of {recipe.batch(stage)}, to share them")
    return shared


def _offloads(
    plan: Plan, model: PreTrainedModel, limit: int | str | None, *, work: Path | None, device: Any, given: bool
) -> tuple[bool, str]:
    """Whether to go layer by layer, as a run does that was begun so, and why there is too little memory, or ""."""
    if given or torch.device(device or "cpu").type != "cpu":
        if limit is not None:
            raise ValueError("max_memory is for a teacher given as a folder or Hub id, on the CPU; leave it out")
        return False, ""
    if work is not None and any((work / name).is_dir() for name in (LAYERS, RANKED)):
        return True, ""
    found = first_says((offloads(plan, model, limit), too_large(plan, model, limit, on_disk=work is not None)))
    if found[0] and processes() > 1:
        raise ValueError(f"a teacher is converted layer by layer in one process, not in {processes()}; launch one")
    return found


def _make_way(work: Path, *, resume: bool) -> None:
    """Refuse a run that is in the way; what one left that did not come so far as to begin is removed."""
    if not begun(work, resume=resume) and is_first():
        shutil.rmtree(work / TOKENS, ignore_errors=True)
    wait()  # until all have looked


def _read(
    plan: Plan, train: Any, heldout: Any, tokenizer: Any, work: Path | None, *, dry_run: bool
) -> tuple[Plan, dict[str, Tensor], str]:
    """The plan for this text, the blocks of each stage, and, in a dry run, why there are none."""
    try:
        blocks = _blocks(plan, train, heldout, tokenizer, None if dry_run else work)
    except TooShort as short:
        if not dry_run:
            raise
        return plan, {}, too_short(plan, has=short.has, needed=short.needed)
    return _with_text(plan, blocks), blocks, ""


def _blocks(
    plan: Plan, train: Any, heldout: Any, tokenizer: PreTrainedTokenizerBase, work: Path | None
) -> dict[str, Tensor]:
    """Token blocks of each stage, none in two of them. Without held-out text the report gets blocks of its own. Where
    solve would read more than the recipe names, it gets what the text has.

    Where conversations are learned from by cross-entropy, "extend.labels" are the labels of "extend", -100 for all but
    what the assistant says; so for distil. A KL counts every token: the teacher's answer to a question's words is as
    good a lesson as any. In the folder of unfinished work they are kept, not to be made again by a run that goes on.
    """
    recipe, length = plan.recipe, plan.recipe.sequence_length
    report_tokens = recipe.report.get("tokens", REPORT_TOKENS)
    counts = {
        "report": 0 if heldout is not None else report_tokens // length,
        "rank": -(-recipe.rank_tokens // length) if plan.ranked else 0,
        "rank_solve": recipe.rank_solve_tokens // length if plan.ranked else 0,
        "solve": plan.solve_tokens // length,
        "align": -(-recipe.align_tokens // length),
        "distil": -(-recipe.distil_tokens // length),
    }
    used = sum(counts.values()) * length
    longer = -(-recipe.extend_tokens // recipe.extend_length) * recipe.extend_length
    imitating = [stage for stage in ("distil", "extend") if _imitates(recipe, stage)]
    train_file, heldout_file = (None if work is None else work / TOKENS / f"{name}.safetensors" for name in SPLITS)
    most = used + longer
    ids_NT, labels_NT = kept_blocks(
        train_file,
        train,
        tokenizer,
        sequence_length=length,
        tokens=most,
        at_least=most - plan.solve_tokens + min(plan.solve_tokens, recipe.solve_tokens),
        labelled=bool(imitating),
    )
    counts["solve"] -= -(-most // length) - len(ids_NT)
    # documents are long: without a shuffle a stage would read few of them
    order = torch.randperm(sum(counts.values()), generator=torch.Generator().manual_seed(plan.seed))

    def shared(blocks_NT: Tensor) -> dict[str, Tensor]:
        parts = dict(zip(counts, blocks_NT[order].split(list(counts.values())), strict=True))
        extend_NT = blocks_NT[len(order) :].flatten()[:longer].view(-1, recipe.extend_length)
        return {**parts, "extend": extend_NT} if longer else parts

    parts = shared(ids_NT)
    if labels_NT is not None:
        parts |= {f"{stage}.labels": labels for stage, labels in shared(labels_NT).items() if stage in imitating}
    if heldout is not None:
        said = {"sequence_length": length, "tokens": report_tokens, "labelled": False}
        parts["report"], _ = kept_blocks(heldout_file, heldout, tokenizer, **said)
    return parts


def _with_text(plan: Plan, blocks: dict[str, Tensor]) -> Plan:
    """The plan for this text: with what there is of it for solve."""
    length, read = plan.recipe.sequence_length, blocks["solve"].numel()
    planned = plan.solve_tokens // length * length
    if read < planned:
        say(f"the text has {read} tokens for solve, which would read {planned} of a longer one")
        plan = replace(plan, recipe=replace(plan.recipe, solve_tokens=read, solve_more=1.0))
    return replace(plan, text=blocks_fingerprint(blocks))


def _imitates(recipe: Recipe, stage: str) -> bool:
    """Whether a stage takes place and learns to say what the text says."""
    losses: Any = LOSSES if stage == "extend" else getattr(recipe, stage).get("losses", ())
    return bool(getattr(recipe, f"{stage}_tokens")) and "cross_entropy" in losses


def _finish(run: Run, output: Path | None) -> PreTrainedModel:
    student = run.stage("solve", None, lambda: _solved(run))
    recipe, converted = run.plan.recipe, converted_layers(student.config)
    if recipe.align_tokens and converted:
        student = run.stage("align", student, lambda: _aligned(run, student))
    for name, train in {"distil": partial(distil, teacher=run.teacher), "extend": extend}.items():
        if getattr(recipe, f"{name}_tokens") and converted:  # else it is the teacher
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
    if is_first():
        shutil.rmtree(unfinished, ignore_errors=True)
        student.save_pretrained(unfinished)
    run.report |= _measured(run, student)
    if is_first():
        run.publish(unfinished, output)
    wait()
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
    "needles": 2,
}


def _solved(run: Run) -> PreTrainedModel:
    """All layers converted and solved, or, after ranking, all but the kept ones."""
    plan, teacher, recipe = run.plan, run.teacher, run.plan.recipe
    named = plan.named()
    layers = [layer for layer in range(plan.num_layers) if layer not in named]
    student = copy_teacher(teacher, layers=layers, fwp=recipe.options(plan.rule), share=run.share, seed=plan.seed)
    found: dict[int, dict[str, Any]] = {}
    if plan.ranked:
        assert plan.kept is not None
        found = _start(run, student, run.blocks["rank_solve"], **{**recipe.solve, "heldout": 2, "stream": "teacher"})
        ranking = rank_layers(student, teacher, run.rank_blocks, seed=plan.seed, progress=run.progress, **recipe.rank)
        run.report["ranking"] = ranking
        student = keep_softmax(student, teacher, most_needed(ranking, plan.kept), share=run.share)
    given = {"calibrated": plan.ranked, "stream": recipe.stream, **recipe.solve}
    solved = _start(run, student, run.blocks["solve"], **given)
    run.note_choices({layer: {**found.get(layer, {}), **solved[layer]} for layer in solved})
    return _as_first(student, run)


def _as_first(student: PreTrainedModel, run: Run) -> PreTrainedModel:
    """All processes have solved the same sums; where rounding made one choose otherwise, the first one's student counts
    for it too."""
    fwp = first_says(student.config.fwp)
    if fwp != student.config.fwp:
        layers = fwp["layers"]
        rest = {name: value for name, value in fwp.items() if name != "layers"}
        student = copy_teacher(run.teacher, layers=layers, fwp=rest, share=run.share)
    for mixer in layers_of(student).values():
        copy_first(mixer.state_dict())
    return student


def _start(run: Run, student: PreTrainedModel, ids_NT: Tensor, **settings: Any) -> dict[int, dict[str, Any]]:
    """Solve, or, in a recipe without that stage, the same rates in all heads."""
    if run.plan.recipe.solve_tokens:
        folder = None if run.work is None else run.work / SOLVING
        return solve(student, run.teacher, ids_NT, progress=run.progress, folder=folder, **settings)
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
    blocks, labels = run.blocks[name], run.blocks.get(f"{name}.labels")
    log = train(
        student,
        ids_NT=blocks,
        labels_NT=labels,
        output_dir=None if run.work is None else run.work / f"{name}.steps",
        resume=True,
        seed=run.plan.seed,
        progress=run.progress,
        **getattr(run.plan.recipe, name),
    )
    learned = {} if labels is None else {"learned_tokens": int((labels != IGNORED).sum())}
    run.report["stages"][name] = {"tokens": blocks.numel(), **learned, **log}
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
        "tokens": plan.tokens,
        "teacher_bytes": 4 * model.num_parameters(),
        "data": plan.data,
        "environment": environment(),  # at the start: a checkout can move on while its code runs
        "stages": {},
    }
