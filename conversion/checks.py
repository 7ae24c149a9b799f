"""What a conversion is asked for, looked at before it starts: stages that fail at their end would have cost hours."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from hf_fwp.options import refuse_unknown

from .align import align
from .baselines import check_masks
from .distil import distil
from .dropout import rate
from .extend import extend
from .keep import rank_layers
from .plan import Plan
from .recipes import Recipe
from .report import measure
from .solve import solve

# The functions whose settings a recipe holds, under the name of its field, and what `convert` itself gives them.
STAGES: dict[str, tuple[Callable[..., Any], ...]] = {
    "solve": (solve,),
    "rank": (rank_layers,),
    "align": (align,),
    "distil": (distil,),
    "extend": (extend, distil),
    "report": (measure,),
}
GIVEN = {"student", "teacher", "ids_NT", "labels_NT", "data", "tokenizer", "seed", "resume", "progress", "settings"}
GIVEN |= {"output_dir", "checkpoint", "folder", "visit"}
NOT_OF = {"extend": {"losses"}}
SEEDS = 2**32  # as many as numpy, which the Trainer seeds too, can be given


def settings_of(stage: str) -> set[str]:
    """The settings that a recipe may name for a stage."""
    known = {name for function in STAGES[stage] for name in inspect.signature(function).parameters}
    return known - GIVEN - NOT_OF.get(stage, set())


def check_plan(plan: Plan, model: PreTrainedModel, measures: Mapping[str, Any], *, split: bool) -> None:
    """Refuse what cannot be done with this teacher, or with any. measures: settings of the report, whose text is that
    of a `split` of its own, or a part of the other."""
    recipe, seed = plan.recipe, plan.seed
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < SEEDS:
        raise ValueError(f"seed is {seed!r}; give a whole number from 0 to {SEEDS - 1}")
    for stage in STAGES:
        _check_settings(stage, getattr(recipe, stage))
    _check_lengths(recipe)
    _check_window(recipe, recipe.options(plan.rule))
    _check_solve(recipe, ranked=plan.ranked)
    if plan.budget is None:  # else tokens are shared out later
        _check_steps(recipe)
    least = 1 if split else recipe.sequence_length
    if measures["tokens"] < least:
        raise ValueError(
            f"the report is to be measured on {measures['tokens']} tokens, and {least} are the least; give the recipe "
            f"report={{'tokens': {least}}}, or more"
        )
    if not model.can_generate():
        raise ValueError(
            f"the teacher is a {type(model).__name__}, which does not foretell the next token; load it with "
            "AutoModelForCausalLM"
        )
    if measures["baseline_tokens"]:
        check_masks(model)


def check_ids(model: PreTrainedModel, blocks: Mapping[str, Tensor]) -> None:
    """Refuse a tokenizer with tokens that the teacher does not know."""
    known: Any = model.get_input_embeddings()
    largest = max((int(ids_NT.max()) for ids_NT in blocks.values() if ids_NT.numel()), default=0)
    if largest >= len(known.weight):
        raise ValueError(
            f"the tokenizer gives token {largest}, but the teacher has only {len(known.weight)}; give the tokenizer "
            "that it was trained with"
        )


def _check_settings(stage: str, settings: Mapping[str, Any]) -> None:
    refuse_unknown(f"setting of {stage}", settings, settings_of(stage))
    if "window_dropout" in settings:
        schedule: Any = settings["window_dropout"]
        # what has no two ends is refused there as what has three
        rate(schedule if isinstance(schedule, Sequence) else (schedule,), 0, steps=1)
    if "losses" in settings:
        from .trainer import LOSSES  # 90 MB that most conversions can do without until they are solved

        refuse_unknown("loss", settings["losses"], LOSSES)


def _check_lengths(recipe: Recipe) -> None:
    for name, least in {"sequence_length": 2, "extend_length": 2}.items():
        if getattr(recipe, name) < least:
            raise ValueError(f"{name} is {getattr(recipe, name)}; it must be at least {least}")
    for name in (each.name for each in fields(recipe) if each.name.endswith("_tokens")):
        if getattr(recipe, name) < 0:
            raise ValueError(f"{name} is {getattr(recipe, name)}; give 0 to leave the stage out, or more")


def _check_window(recipe: Recipe, options: Mapping[str, Any]) -> None:
    seen = options.get("window", 0) + options.get("sinks", 0)
    if options.get("window") and seen >= recipe.sequence_length:
        raise ValueError(
            f"window and sinks are {seen} tokens, and recipe {recipe.name!r} reads sequences of "
            f"{recipe.sequence_length}: fast weights would learn nothing, as nothing is left for them. Give a smaller "
            "window, or a recipe with a longer sequence_length"
        )


def _check_solve(recipe: Recipe, *, ranked: bool) -> None:
    """Refuse too few sequences to rank and to solve on."""
    heldout = recipe.solve.get("heldout", 4)
    if heldout < 1:
        raise ValueError(f"the setting heldout of solve is {heldout}; at least 1 sequence has to judge")
    # ranking holds out 2; 2 more are solved on
    needed = {"rank_tokens": 1} if ranked else {}
    if recipe.solve_tokens:
        needed |= {"solve_tokens": heldout + 2} | ({"rank_solve_tokens": 4} if ranked else {})
    for name, sequences in needed.items():
        least = 1 if name == "rank_tokens" else sequences * recipe.sequence_length
        if getattr(recipe, name) < least:
            why = "to rank layers" if name.startswith("rank") else "to solve them"
            raise ValueError(
                f"{name} is {getattr(recipe, name)}, and {least} are the least {why}; give more"
                + (", or name the layers to keep" if ranked else "")
            )


def _check_steps(recipe: Recipe) -> None:
    """Refuse a stage with fewer sequences than a step of it takes."""
    for stage in ("align", "distil"):
        tokens, batch = getattr(recipe, f"{stage}_tokens"), recipe.batch(stage)
        if tokens and -(-tokens // recipe.sequence_length) < batch and "steps" not in getattr(recipe, stage):
            raise ValueError(
                f"{stage}_tokens is {tokens}, which is less than a step of {batch} sequences of "
                f"{recipe.sequence_length}; give at least {batch * recipe.sequence_length}, or a smaller batch_size"
            )
