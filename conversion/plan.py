"""What a conversion is going to do, in words and in numbers, before it starts.

Times are estimates: the tokens of every stage, times what the stage costs in forward passes of the teacher, times the
measured time of one such pass on this machine.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from .keep import Keep, kept_layers
from .recipes import TRAINING, Recipe
from .report import peak_memory

# Forward passes of the teacher that a token costs in each stage, measured on SmolLM2-135M with 2 CPU cores.
COSTS = {"solve": 6.0, "rank": 40.0, "align": 2.7, "distil": 5.8, "extend": 5.0}
# Tensors [tokens, hidden size] that are in memory at once: while solving, and per layer for the backward of distil.
STREAMS, ACTIVATIONS = 9, 40
BATCH = 4  # sequences a step, where the recipe does not say


@dataclass(frozen=True)
class Plan:
    """What a conversion is going to do; equal plans give equal models."""

    teacher: str
    rule: str
    keep: Keep
    recipe: Recipe
    seed: int
    num_layers: int
    kept: int | None  # how many layers are kept by rank; None where keep names them
    data: str
    budget: int | str | None = None
    text: str = ""  # fingerprint of the token blocks

    @property
    def ranked(self) -> bool:
        return self.kept is not None and 0 < self.kept < self.num_layers

    def named(self) -> list[int]:
        """The layers that stay softmax, as far as they are known before ranking."""
        if self.kept is None:
            return kept_layers(self.keep, self.num_layers)
        return list(range(self.num_layers)) if self.kept == self.num_layers else []

    def as_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self), default=str))


def describe(plan: Plan, model: PreTrainedModel) -> str:
    """The plan in words, with estimates of time and memory."""
    if plan.kept is None or not plan.ranked:
        kept = f"{len(plan.named())} of {plan.num_layers} layers stay softmax"
    else:
        kept = f"{plan.kept} of {plan.num_layers} layers stay softmax, ranked by measured KL"
    recipe = plan.recipe
    steps = [f"solve {recipe.solve_tokens} tokens"]
    if plan.ranked:
        steps.insert(0, f"rank on {recipe.rank_tokens}")
    steps += [f"align {recipe.align_tokens}"] if recipe.align_tokens else []
    steps += [f"distil {recipe.distil_tokens}"] if recipe.distil_tokens else []
    steps += [f"extend {recipe.extend_tokens}"] if recipe.extend_tokens else []
    return (
        f"convert {plan.teacher} to {plan.rule}, recipe {recipe.name}: {kept}\n"
        f"  {', '.join(steps)}; about {estimate(plan, model) / 60:.0f} minutes, "
        f"{memory(plan, model) / 2**30:.1f} GiB of memory"
    )


def memory(plan: Plan, model: PreTrainedModel) -> float:
    """Bytes that the process will hold at most, given that it holds the teacher by now."""
    recipe, weights = plan.recipe, model.num_parameters() * model.dtype.itemsize
    token = model.config.hidden_size * model.dtype.itemsize
    so_far = peak_memory() or 2 * weights  # loading takes the weights twice
    extra = STREAMS * recipe.solve_tokens * token
    if recipe.distil_tokens:
        batch = recipe.distil.get("batch_size", BATCH) * recipe.sequence_length
        # the student, its gradients and Adam's two moments
        extra = max(extra, 4 * weights + ACTIVATIONS * plan.num_layers * batch * token)
    return max(so_far, so_far - weights + extra)


def estimate(plan: Plan, model: PreTrainedModel) -> float:
    """Seconds that the stages will take, from the measured time of one forward pass."""
    recipe = plan.recipe
    units = recipe.solve_tokens * COSTS["solve"]
    units += sum(getattr(recipe, f"{stage}_tokens") * COSTS[stage] for stage in TRAINING)
    if plan.ranked:
        units += recipe.rank_solve_tokens * COSTS["solve"] + recipe.rank_tokens * COSTS["rank"] * plan.num_layers / 30
    return units * _seconds_per_token(model)


@torch.no_grad()
def _seconds_per_token(model: PreTrainedModel, length: int = 256) -> float:
    ids = torch.zeros(1, length, dtype=torch.long, device=model.device)
    times = []
    for _ in range(2):
        started = time.perf_counter()
        model.base_model(input_ids=ids, use_cache=False)
        times.append(time.perf_counter() - started)
    return min(times) / length


def within(plan: Plan, budget: int | str | None, model: PreTrainedModel) -> Plan:
    """The plan with as many tokens for gradient steps as the budget allows."""
    if budget is None:
        return plan
    units, sizes = {"s": 1, "m": 60, "h": 3600}, {"k": 1e3, "M": 1e6}
    text = str(budget)
    try:
        if text[-1:] in units:
            closed = replace(plan, recipe=plan.recipe.with_trained(0))
            left = float(text[:-1]) * units[text[-1]] - estimate(closed, model)
            tokens = round(left / (COSTS["distil"] * _seconds_per_token(model)))
        else:
            tokens = round(float(text[:-1]) * sizes[text[-1]]) if text[-1:] in sizes else int(text)
    except ValueError as error:
        raise ValueError(
            f"budget is {budget!r}; give a number of tokens (200000, '200k', '0.2M') or a time ('90s', '20m', '2h')"
        ) from error
    if not plan.recipe.trained():
        raise ValueError(
            f"recipe {plan.recipe.name!r} takes no gradient steps: it has no use for a budget; leave it out"
        )
    scaled, step = plan.recipe.with_trained(tokens), 4 * plan.recipe.sequence_length  # one step of 4 sequences
    for stage, least in {"align": step, "distil": step, "extend": plan.recipe.extend_length}.items():
        wanted, left = (getattr(recipe, f"{stage}_tokens") for recipe in (plan.recipe, scaled))
        if wanted and left < least:
            raise ValueError(
                f"a budget of {budget!r} leaves {max(0, left)} tokens to {stage} on, and {least} are the least; "
                "give more, or 'closed-form'"
            )
    return replace(plan, recipe=scaled)
