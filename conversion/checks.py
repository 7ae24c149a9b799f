"""What a conversion is asked for, looked at before it starts: stages that fail at their end would have cost hours."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from transformers import PreTrainedModel

from hf_fwp.options import check_counts, refuse_unknown

from .align import align
from .baselines import check_masks
from .distil import distil
from .dropout import rate
from .extend import extend
from .keep import rank_layers
from .plan import Plan
from .recipes import RATES, TRAINING, Recipe
from .report import measure
from .seeds import check_seed
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
# Settings that count something, and the least of each; those that are 0 or more; those of which one has to be more.
LEAST = {"batch_size": 1, "save_every": 1, "steps": 1, "search": 1, "heldout": 0, "new_tokens": 1, "needles": 0}
LEAST |= dict.fromkeys(("tokens", "baseline_tokens", "residual_tokens", "texts"), 0)
NOT_NEGATIVE = (*RATES, "lr_end", "warmup", "recall")
LEARNING = {"align": ("lr", "lr_projections"), "distil": ("lr", "lr_rest"), "extend": ("lr", "lr_rest")}


def settings_of(stage: str) -> set[str]:
    """The settings that a recipe may name for a stage."""
    known = {name for function in STAGES[stage] for name in inspect.signature(function).parameters}
    return known - GIVEN - NOT_OF.get(stage, set())


def check_plan(plan: Plan, model: PreTrainedModel, measures: Mapping[str, Any], *, split: bool) -> None:
    """Refuse what cannot be done with this teacher, or with any. measures: settings of the report, whose text is that
    of a `split` of its own, or a part of the other."""
    recipe = plan.recipe
    check_seed(plan.seed)
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


def checked(recipe: Recipe) -> Recipe:
    """The recipe, if what it says about its stages can be followed."""
    for stage in STAGES:
        _check_settings(stage, getattr(recipe, stage))
    return recipe


def _check_settings(stage: str, settings: Mapping[str, Any]) -> None:
    refuse_unknown(f"setting of {stage}", settings, settings_of(stage))
    for name, value in settings.items():
        _check_value(f"the setting {name} of {stage}", name, value)
    said = {name: settings.get(name, _default(stage, name)) for name in LEARNING.get(stage, ())}
    if said and not any(said.values()):
        told = " and ".join(f"{name} is {value}" for name, value in said.items())
        raise ValueError(f"nothing is learned in {stage}: {told}; give one that is above 0")
    if "window_dropout" in settings:
        schedule: Any = settings["window_dropout"]
        # what has no two ends is refused there as what has three
        rate(schedule if isinstance(schedule, Sequence) else (schedule,), 0, steps=1)
    if "losses" in settings:
        _check_losses(settings["losses"])


def _check_value(told: str, name: str, value: Any) -> None:
    """Refuse a setting that is no number of its kind."""
    if name in LEAST and not (name == "steps" and value is None):
        least = LEAST[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{told} is {value!r}; give a whole number, {least} or more")
    if name in NOT_NEGATIVE and not _not_negative(value):
        raise ValueError(f"{told} is {value!r}; give a number, 0 or more")
    if name == "lambdas" and not (isinstance(value, Sequence) and all(map(_not_negative, value))):
        raise ValueError(f"{told} is {value!r}; give numbers of 0 or more to choose from, or none: ()")


def _not_negative(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _default(stage: str, setting: str) -> Any:
    return inspect.signature(STAGES[stage][0]).parameters[setting].default


def _check_losses(losses: Any) -> None:
    from .trainer import LOSSES  # 90 MB that most conversions can do without until they are solved

    refuse_unknown("loss", losses if isinstance(losses, Mapping) else (), LOSSES)
    if not (isinstance(losses, Mapping) and all(map(_not_negative, losses.values())) and any(losses.values())):
        raise ValueError(
            f"the setting losses of distil is {losses!r}; give a weight above 0 to one or more of {', '.join(LOSSES)}: "
            "{'kl': 1.0}"
        )


def _check_lengths(recipe: Recipe) -> None:
    if not _not_negative(recipe.solve_more) or recipe.solve_more < 1:
        raise ValueError(
            f"solve_more is {recipe.solve_more!r}; give 1, or how many times the text is solved on at most"
        )
    for name, least in {"sequence_length": 2, "extend_length": 2}.items():
        if getattr(recipe, name) < least:
            raise ValueError(f"{name} is {getattr(recipe, name)}; it must be at least {least}")
    for name in (each.name for each in fields(recipe) if each.name.endswith("_tokens")):
        if getattr(recipe, name) < 0:
            raise ValueError(f"{name} is {getattr(recipe, name)}; give 0 to leave the stage out, or more")


def _check_window(recipe: Recipe, options: Mapping[str, Any]) -> None:
    check_counts({name: value for name, value in options.items() if value is not None})
    seen = (options.get("window") or 0) + (options.get("sinks") or 0)
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
    for stage in TRAINING:
        tokens, batch, length = getattr(recipe, f"{stage}_tokens"), recipe.batch(stage), recipe.length(stage)
        again = stage == "align" and getattr(recipe, stage).get("steps")  # reads its sequences more than once
        if tokens and -(-tokens // length) < batch and not again:
            raise ValueError(
                f"{stage}_tokens is {tokens}, which is less than a step of {batch} sequences of {length}; give at "
                f"least {batch * length}, or a smaller batch_size"
            )
