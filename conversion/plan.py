"""What a conversion is going to do, in words and in numbers, before it starts.

Times are estimates: the tokens of every stage, times what the stage costs in forward passes of the teacher, times the
time of one such pass on this machine. Neither time nor memory needs the teacher's weights: its config is enough.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from accelerate.utils import convert_file_size_to_int, get_max_memory
from transformers import PreTrainedModel

from hf_fwp.estimates import duration, peak_memory, size
from hf_fwp.estimates import seconds_per_token as _seconds_per_token
from hf_fwp.hosts import blocks_of, find_host
from hf_fwp.layer import layers_of

from .families import empty_student
from .keep import Keep, kept_layers
from .recipes import TRAINING, Recipe

# Forward passes of the teacher that a token costs, measured on SmolLM2-135M with 2 CPU cores (one pass of a token:
# 1.57 ms): while all layers are searched for settings, while each of 30 layers is swapped in, and in gradient steps.
# The closed form with three quarters of the layers kept comes to 140 000 passes: 3.9 minutes, measured alone, are these
# at 1.66 ms each, where a pass took 1.67.
COSTS = {"calibrate": 10.1, "rank": 18.0, "align": 2.7, "distil": 5.8, "extend": 5.0}
# While all layers are solved on a stream, or left as they are.
SOLVE = {"student": 4.5, "teacher": 3.5}
MOVE = {"student": 1.6, "teacher": 0.8}
SEARCHED = 5  # sequences that are searched for settings: solve's own 3, and 2 that judge
# Tensors [tokens, hidden size] that are in memory at once: while solving the streams of teacher and student, per layer
# for the backward of distil, and for a layer of align, where 0.37 GiB were measured (SmolLM2-135M, 2048 tokens).
STREAMS, ACTIVATIONS, ALIGNED = {"student": 2, "teacher": 1}, 40, 85
# Bytes for each pair of regressors, and of a regressor and an output, in float32 sums and the float64 solution.
EQUATIONS = (24, 56)


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
    weights: str = ""  # and of the teacher

    @property
    def ranked(self) -> bool:
        return self.kept is not None and 0 < self.kept < self.num_layers

    @property
    def converted(self) -> int:
        """How many layers do not stay softmax."""
        return self.num_layers - (len(self.named()) if self.kept is None else self.kept)

    @property
    def solve_tokens(self) -> int:
        """Tokens of the final solution."""
        return self.recipe.solved

    @property
    def tokens(self) -> int:
        """All tokens that are read, but for the report."""
        return self.recipe.tokens(ranked=self.ranked) - self.recipe.solve_tokens + self.solve_tokens

    def named(self) -> list[int]:
        """The layers that stay softmax, as far as they are known before ranking."""
        if self.kept is None:
            return kept_layers(self.keep, self.num_layers)
        return list(range(self.num_layers)) if self.kept == self.num_layers else []

    def as_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self), default=_same_everywhere))


def _same_everywhere(value: Any) -> Any:
    """In words, or of a set its members, that do not change from process to process."""
    return sorted(value, key=str) if isinstance(value, set | frozenset) else str(value)


@dataclass(frozen=True)
class Stage:
    """A part of a conversion: what it reads, and estimates of what it takes."""

    name: str
    tokens: int
    seconds: float
    bytes: float  # that the process holds meanwhile


def describe(
    plan: Plan, model: PreTrainedModel, *, offload: bool = False, on_disk: bool = False, notes: Sequence[str] = ()
) -> str:
    """The plan in words, with estimates of time and memory for every stage; notes: what keeps it from being run."""
    if plan.kept is None or not plan.ranked:
        kept = f"{len(plan.named())} of {plan.num_layers} layers stay softmax"
    else:
        measure = "measured KL on text and on a probe of recall" if plan.recipe.rank.get("recall") else "measured KL"
        kept = f"{plan.kept} of {plan.num_layers} layers stay softmax, ranked by {measure}"
    lines = [f"convert {plan.teacher} to {plan.rule}, recipe {plan.recipe.name}: {kept}"]
    lines += [f"  text: {plan.data}"] if plan.data else []
    lines += ["  layer by layer: the teacher is never in memory as a whole"] if offload else []
    for stage in stages(plan, model, offload=offload, on_disk=on_disk):
        lines.append(f"  {stage.name} {stage.tokens} tokens: {duration(stage.seconds)}, {size(stage.bytes)}")
    lines += [f"  note: a run would be refused: {note}" for note in notes if note]
    return "\n".join(lines)


def stages(plan: Plan, model: PreTrainedModel, *, offload: bool = False, on_disk: bool = False) -> list[Stage]:
    """What the stages take, in order; the weights of `model` may be on the device "meta".

    offload: the closed form is solved layer by layer, from files. on_disk: what align learns lies in files, as it does
    on a processor with an output folder.
    """
    recipe, second = plan.recipe, _seconds_per_token(model)
    need = _needs(plan, model)
    solving = need.offloaded() if offload else need.solving()
    held = {"rank": solving, "solve": solving, "align": need.aligning(on_disk=on_disk), "distil": need.distilling()}
    held["extend"] = need.extending()
    tokens = {
        "rank": recipe.rank_solve_tokens + recipe.rank_tokens if plan.ranked else 0,
        "solve": plan.solve_tokens,
        **{stage: getattr(recipe, f"{stage}_tokens") for stage in TRAINING},
    }
    units = {stage: tokens[stage] * COSTS[stage] for stage in TRAINING} | _closed_form(plan)
    return [Stage(name, count, units[name] * second, held[name]) for name, count in tokens.items() if count]


def _closed_form(plan: Plan) -> dict[str, float]:
    """Forward passes of one token that ranking and solving take; the search is part of whichever comes first."""
    recipe, converted = plan.recipe, plan.converted / plan.num_layers
    search = SEARCHED * recipe.sequence_length * COSTS["calibrate"]
    solve = plan.solve_tokens * (converted * SOLVE[recipe.stream] + (1 - converted) * MOVE[recipe.stream])
    rank = recipe.rank_tokens * COSTS["rank"] * plan.num_layers / 30  # a swap for every layer
    rank *= 2 if recipe.rank.get("recall") else 1
    rank += recipe.rank_solve_tokens * SOLVE["teacher"]
    return {"rank": search + rank, "solve": solve if plan.ranked else solve + converted * search}


def memory(plan: Plan, model: PreTrainedModel, *, offload: bool = False, on_disk: bool = False) -> float:
    """Bytes that the process will hold at most."""
    least = _needs(plan, model).weights  # where no stage runs
    return max((stage.bytes for stage in stages(plan, model, offload=offload, on_disk=on_disk)), default=least)


def estimate(plan: Plan, model: PreTrainedModel) -> float:
    """Seconds that the stages will take."""
    return sum(stage.seconds for stage in stages(plan, model))


@dataclass(frozen=True)
class Needs:
    """Bytes of everything that takes memory in a conversion."""

    process: float  # what the process holds by now, but for the teacher
    weights: float  # of the teacher
    outside: float  # of them, what lies outside of its blocks
    mixer: float  # weights of one
    mixers: float  # of all that are converted
    streams: float  # tensors [tokens, hidden size] while solving
    equations: float  # of the least squares of one layer, [regressors, regressors] and [regressors, hidden size]
    layer: float  # activations of one layer in a step of align
    steps: float  # those of all layers in a step of distil
    longer: float  # those of all layers in a step on longer sequences
    num_layers: int

    def solving(self) -> float:
        return self.process + self.weights + self.mixers + self.streams + self.equations

    def offloaded(self) -> float:
        block = (self.weights - self.outside) / self.num_layers
        return self.process + self.outside + 2 * block + self.mixer + self.streams + self.equations

    def aligning(self, *, on_disk: bool) -> float:
        # with Adam's two moments, and the gradient of one; in files all mixers lie but before and afterwards
        learned = self.mixer if on_disk else self.mixers
        return self.process + self.weights + max(self.mixers, 3 * learned + self.mixer + self.layer)

    def distilling(self) -> float:
        return self.process + self.weights + 4 * (self.weights + self.mixers) + self.steps

    def extending(self) -> float:
        return self.process + self.weights + 4 * (self.weights + self.mixers) + self.longer


def _kept(recipe: Recipe, num_layers: int) -> int:
    """Tensors [tokens, hidden size] that a backward of extend keeps: one per layer where it computes a layer anew."""
    checkpointed = recipe.extend.get("gradient_checkpointing", False)
    return num_layers + ACTIVATIONS if checkpointed else ACTIVATIONS * num_layers


def _needs(plan: Plan, model: PreTrainedModel) -> Needs:
    recipe, byte, hidden = plan.recipe, model.dtype.itemsize, model.config.hidden_size
    student = empty_student(model, layers=[0], fwp=plan.recipe.options(plan.rule))
    mixer = layers_of(student)[0]
    weights, own = model.num_parameters(), sum(parameter.numel() for parameter in mixer.parameters())
    blocks = sum(p.numel() for p in blocks_of(model.base_model, find_host(model.config)).parameters())
    skipped = mixer.skip_proj.in_features if mixer.options.value_skip else 0
    reads = mixer.o_proj.in_features + skipped + mixer.options.o_bias
    empty = model.get_input_embeddings().weight.is_meta
    process = (peak_memory() or 0) - (0 if empty else byte * weights)
    token = hidden * byte * recipe.sequence_length
    return Needs(
        process=max(0, process),
        weights=byte * weights,
        outside=byte * (weights - blocks),
        mixer=byte * own,
        mixers=byte * own * plan.converted,
        streams=byte * hidden * STREAMS[recipe.stream] * plan.solve_tokens,
        equations=EQUATIONS[0] * reads**2 + EQUATIONS[1] * reads * hidden,
        layer=ALIGNED * recipe.batch("align") * token,
        steps=ACTIVATIONS * plan.num_layers * recipe.batch("distil") * token,
        longer=_kept(recipe, plan.num_layers) * recipe.batch("extend") * hidden * byte * recipe.extend_length,
        num_layers=plan.num_layers,
    )


def offloads(plan: Plan, model: PreTrainedModel, limit: int | str | None) -> bool:
    """Whether the closed form has to be solved layer by layer to stay within `limit`, by default the free memory."""
    return not plan.recipe.trained() and memory(plan, model) > _free(limit)


def too_large(plan: Plan, model: PreTrainedModel, limit: int | str | None, *, on_disk: bool) -> str:
    """Why `limit`, by default the free memory, is too little, and what would help; "" where it is enough.

    Without a limit, only a teacher whose weights alone do not fit keeps a stage of gradient steps from being tried.
    """
    free, needed, trained = _free(limit), memory(plan, model, on_disk=on_disk), plan.recipe.trained()
    if needed <= free or (limit is None and trained and _needs(plan, model).weights <= free):
        return ""
    told = f"converting {plan.teacher} takes {size(needed)} of memory, and {size(free)} are there"
    if trained:
        return (
            f"{told}; recipe {plan.recipe.name!r} takes gradient steps on the whole student. Give "
            "recipe='closed-form', which works layer by layer, or more memory"
        )
    least = memory(plan, model, offload=True)
    if least <= free:
        return ""
    return f"{told}; layer by layer it takes {size(least)}, which is more too: it needs another machine"


def _free(limit: int | str | None) -> int:
    return parsed(get_max_memory()["cpu"] if limit is None else limit)


def too_short(plan: Plan, *, has: int, needed: int) -> str:
    """How many tokens a text that `has` fewer than are `needed` lacks, and what would help."""
    recipe = plan.recipe
    told = (
        f"{needed - has} tokens are missing: the data has {has}, and {needed} are needed; give more text, as "
        "hf-fwp write-text lets the teacher write it, or other data"
    )
    # every stage reads whole sequences
    rounded = 3 * recipe.sequence_length + (recipe.extend_length if recipe.extend_tokens else 0)
    budget = has - (needed - recipe.trained()) - rounded
    trains = needed >= recipe.tokens(ranked=plan.ranked)  # held-out text is for the report alone
    if not trains or budget < 1 or _starved(recipe, recipe.with_trained(budget)):
        return told
    return f"{told}, or a smaller budget, --budget {budget} at most"


def parsed(limit: int | str) -> int:
    """Bytes of 4000000000, '4GB' or '4GiB'."""
    try:
        return convert_file_size_to_int(limit)
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"max_memory is {limit!r}; give a number of bytes, or a size like '4GiB' or '500MB'"
        ) from error


def token_count(said: int | str, *, what: str = "budget") -> int:
    """200000, '200k' or '0.2M'."""
    sizes, text = {"k": 1e3, "M": 1e6, "G": 1e9}, str(said)
    try:
        count = round(float(text[:-1]) * sizes[text[-1]]) if text[-1:] in sizes else int(text)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{what} is {said!r}; give a number of tokens (200000, '200k', '0.2M')") from error
    if count < 1:
        raise ValueError(f"{what} is {said!r}; give at least one token")
    return count


def within(plan: Plan, budget: int | str | None, model: PreTrainedModel, *, in_all: bool = False) -> Plan:
    """The plan with as many tokens for gradient steps as the budget allows.

    in_all: a budget of tokens is what all stages read together, those without gradient steps too.
    """
    if budget is None:
        return plan
    units, text = {"s": 1, "m": 60, "h": 3600}, str(budget)
    try:
        if text[-1:] in units:
            closed = replace(plan, recipe=plan.recipe.with_trained(0))
            left = float(text[:-1]) * units[text[-1]] - estimate(closed, model)
            tokens = round(left / (COSTS["distil"] * _seconds_per_token(model)))
        else:
            tokens = token_count(budget)
            tokens -= replace(plan, recipe=plan.recipe.with_trained(0)).tokens if in_all else 0
    except (ValueError, OverflowError) as error:
        raise ValueError(
            f"budget is {budget!r}; give a number of tokens (200000, '200k', '0.2M') or a time ('90s', '20m', '2h')"
        ) from error
    if not plan.recipe.trained():
        raise ValueError(
            f"recipe {plan.recipe.name!r} takes no gradient steps: it has no use for a budget; leave it out"
        )
    scaled = plan.recipe.with_trained(tokens)
    if starved := _starved(plan.recipe, scaled):
        raise ValueError(f"a budget of {budget!r} leaves {starved}; give more, or 'closed-form'")
    return replace(plan, recipe=scaled)


def _starved(recipe: Recipe, scaled: Recipe) -> str:
    """Which stage of a scaled recipe has no tokens for a step; "" where none has too few."""
    for stage in TRAINING:
        least = recipe.batch(stage) * recipe.length(stage)
        wanted, left = (getattr(each, f"{stage}_tokens") for each in (recipe, scaled))
        if wanted and left < least:
            return f"{max(0, left)} tokens to {stage} on, and {least} are the least"
    return ""
