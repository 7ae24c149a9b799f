"""Recipes are data: which stages run, over how many tokens, with which settings. The code is in the stages' files.

`solve_tokens` are those of the final solution; a ranked `keep` first solves on `rank_solve_tokens` others, and measures
the swaps on `rank_tokens`. Tokens of align, distil and extend are read once, those of extend in sequences of
`extend_length`. `solve`, `align`, `distil` and `extend` hold settings of the functions of these names, `rank` those of
rank_layers, `report` those of report.measure, `fwp` options of the mixers; every choice is an ablation of ablate.py.
`window_dropout` is for mixers that have a window.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hf_fwp.options import refuse_unknown

# What a mixer needs so that calibrate and solve can make it answer like the attention whose place it takes.
_GRAFTED: dict[str, Any] = {
    "conv_size": 0,
    "output_norm": False,
    "output_gate": "head_sigmoid",
    "state_heads": "query",
    "value_skip": 1,
    "o_bias": True,
}

# Mixer options of a student, per update rule.
STUDENTS: dict[str, dict[str, Any]] = {
    "linear_attention": {**_GRAFTED, "feature_map": "hedgehog", "qk_norm": "none", "rope_heads": "all"},
    "delta_net": {
        **_GRAFTED,
        "feature_map": "identity",
        "qk_norm": "l2",
        "beta_bias": True,
        "state_bias": True,
        "time_scales": 2,
    },
    "gated_delta_net": {
        **_GRAFTED,
        "feature_map": "identity",
        "qk_norm": "l2",
        "beta_bias": True,
        "state_bias": True,
        "time_scales": 2,
    },
}


@dataclass(frozen=True)
class Recipe:
    """The stages and their settings. A stage of no tokens does not run."""

    name: str
    summary: str
    rule: str | None = None
    """the update rule that it is for; None: any that has a student"""
    copied: bool = False
    """whether mixers start as copied projections and nothing else, without what solve needs beside them"""
    fwp: Mapping[str, Any] = field(default_factory=dict)
    sequence_length: int = 512
    solve_tokens: int = 16384
    solve_more: float = 1.0
    """up to so many times the text is solved on where there is as much"""
    stream: str = "student"
    solve: Mapping[str, Any] = field(default_factory=dict)
    rank_solve_tokens: int = 5120
    rank_tokens: int = 2560
    rank: Mapping[str, Any] = field(default_factory=dict)
    align_tokens: int = 0
    align: Mapping[str, Any] = field(default_factory=dict)
    distil_tokens: int = 0
    distil: Mapping[str, Any] = field(default_factory=dict)
    extend_tokens: int = 0
    extend_length: int = 4096
    extend: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)
    window_rates: float = 1.0
    """times its learning rates, for mixers that get a window: such a student starts near its teacher"""

    def __post_init__(self) -> None:
        refuse_unknown("stream", [self.stream], STREAMS)
        for name in self.fwp:
            if name in ELSEWHERE:
                raise ValueError(f"{name!r} is no option of the mixers of a recipe; give {ELSEWHERE[name]}")

    def options(self, rule: str) -> dict[str, Any]:
        """The mixer options of a student with this update rule, as `fwp` of its config."""
        if self.rule not in (None, rule):
            raise ValueError(
                f"the recipe {self.name!r} is for the rule {self.rule!r}, not {rule!r}; give rule={self.rule!r}"
            )
        return {**({"rule": rule} if self.copied else student_options(rule)), **self.fwp}

    def trained(self) -> int:
        """Tokens of the stages that take gradient steps."""
        return sum(getattr(self, f"{stage}_tokens") for stage in TRAINING)

    @property
    def solved(self) -> int:
        """Tokens that the final solution reads of a text that has them, in whole sequences."""
        if self.solve_more == 1:
            return self.solve_tokens
        return int(self.solve_tokens * self.solve_more) // self.sequence_length * self.sequence_length

    def tokens(self, *, ranked: bool) -> int:
        """The tokens that the data must have, with those that layers are `ranked` on or without."""
        ranking = self.rank_solve_tokens + self.rank_tokens if ranked else 0
        return self.solve_tokens + ranking + self.trained()

    def batch(self, stage: str) -> int:
        """Sequences in a step of a stage that takes gradient steps."""
        return getattr(self, stage).get("batch_size", BATCH[stage])

    def length(self, stage: str) -> int:
        """Tokens of a sequence of a stage that takes gradient steps."""
        return self.extend_length if stage == "extend" else self.sequence_length

    def for_processes(self, count: int) -> Recipe:
        """The same recipe with as many sequences more in a step as `count` processes need to share it evenly."""
        shared = {stage: -(-self.batch(stage) // count) * count for stage in TRAINING}
        more = [stage for stage, batch in shared.items() if batch != self.batch(stage)]
        return replace(self, **{stage: {**getattr(self, stage), "batch_size": shared[stage]} for stage in more})

    def with_trained(self, tokens: int) -> Recipe:
        """The same recipe with `tokens` for all stages that take gradient steps, shared as before."""
        total, before, shares = max(1, self.trained()), 0, {}
        for name in (f"{stage}_tokens" for stage in TRAINING):
            after = before + getattr(self, name)
            shares[name] = round(tokens * after / total) - round(tokens * before / total)
            before = after
        return replace(self, **shares)

    def changed(self, change: Mapping[str, Any]) -> Recipe:
        """The same recipe but for some fields, a setting named with its stage ("align.lr"); as many trained tokens."""
        fields: dict[str, Any] = {}
        for name, value in change.items():
            stage, _, setting = name.partition(".")
            fields[stage] = {**fields.get(stage, getattr(self, stage)), setting: value} if setting else value
        made = replace(self, **fields)
        return made.with_trained(self.trained()) if made.trained() else made

    def with_mixer(self, options: Mapping[str, Any] | None) -> Recipe:
        """The same recipe with some options of the mixers changed; where these add a window, by its `window_rates`."""
        changed = replace(self, fwp={**self.fwp, **(options or {})})
        adds = changed.fwp.get("window") and not self.fwp.get("window")
        return changed.with_rates(self.window_rates) if adds else changed

    def with_rates(self, factor: float) -> Recipe:
        """The same recipe with every learning rate that it names times `factor`."""
        stages = {stage: getattr(self, stage) for stage in TRAINING}
        return replace(self, **{stage: _scaled(settings, factor) for stage, settings in stages.items()})


# Fields of the `fwp` of a config that are arguments of convert.
ELSEWHERE = {
    "rule": "rule=",
    "layers": "keep=, a list of the layers that stay softmax",
    "per_layer": "options that hold for all of them; keep= names the layers that stay softmax",
}
# Whose residual stream the mixers are solved on.
STREAMS = ("student", "teacher")
BATCH = {"align": 4, "distil": 4, "extend": 1}  # sequences a step, where the recipe does not say
# Stages that take gradient steps, and the learning rates among their settings.
TRAINING = ("align", "distil", "extend")
RATES = ("lr", "lr_projections", "lr_rest")


def _scaled(settings: Mapping[str, Any], factor: float) -> dict[str, Any]:
    return {name: value * factor if name in RATES else value for name, value in settings.items()}


# Learning rates for models of up to 200M parameters; papers give those of 7B models. ablate with sweep="lr" tries more.
_ALIGN: dict[str, Any] = {"lr": 1e-3, "lr_projections": 1e-4, "window_dropout": (0.5, 0.25)}
_DISTIL: dict[str, Any] = {"lr": 5e-4, "lr_rest": 2e-4, "window_dropout": (0.25, 0.0)}
_EXTEND: dict[str, Any] = {"lr": 1e-5, "lr_rest": 1e-5, "gradient_checkpointing": True}
_LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
_COPIED: dict[str, Any] = {"copied": True, "solve_tokens": 0, "rank_solve_tokens": 0}

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "closed-form",
            "calibrate and solve, no gradient step: minutes on a CPU",
            # on the teacher's stream nearly twice the text takes no longer, and is worth more than the student's own
            stream="teacher",
            solve_more=2.0,
        ),
        Recipe(
            "quick",
            "closed-form, then align and distil: 0.2M tokens in all",
            align_tokens=16384,
            align={**_ALIGN, "batch_size": 1},  # with few tokens more steps are worth more than larger ones
            distil_tokens=159744,
            distil={**_DISTIL, "batch_size": 1, "save_every": 40},
            window_rates=0.1,
        ),
        Recipe(
            "standard",
            "closed-form on more text, then align, distil and 4k tokens of context: 40M tokens",
            sequence_length=1024,
            solve_tokens=65536,
            rank_solve_tokens=8192,
            rank_tokens=2048,
            align_tokens=8_000_000,
            align={**_ALIGN, "batch_size": 8},
            distil_tokens=28_000_000,
            distil={**_DISTIL, "batch_size": 8, "save_every": 200},
            extend_tokens=4_000_000,
            extend=_EXTEND,
        ),
        Recipe(
            "long",
            "as standard, with 16k tokens of context: 500M tokens",
            sequence_length=2048,
            solve_tokens=131072,
            rank_solve_tokens=16384,
            rank_tokens=4096,
            align_tokens=60_000_000,
            align={**_ALIGN, "batch_size": 8},
            distil_tokens=400_000_000,
            distil={**_DISTIL, "batch_size": 16, "save_every": 500},
            extend_tokens=40_000_000,
            extend_length=16384,
            extend=_EXTEND,
        ),
        # What others have published, as far as it is public, on our operators, with the tokens they used.
        Recipe(
            "naive",
            "copied projections, every rate the same, then distil: what every recipe has to beat",
            **_COPIED,
            distil_tokens=176128,
            distil=_DISTIL,
        ),
        Recipe(
            "lolcats",
            "hedgehog features aligned with all else frozen, then LoRA by cross-entropy (Zhang et al. 2024)",
            rule="linear_attention",
            **_COPIED,
            fwp={"feature_map": "hedgehog", "qk_norm": "none", "rope_heads": "all"},
            align_tokens=20_000_000,
            align={"lr": 1e-2, "lr_projections": 0.0},
            distil_tokens=20_000_000,
            distil={"losses": {"cross_entropy": 1.0}, "lora": _LORA, "lr": 1e-4, "lr_rest": 1e-4},
        ),
        Recipe(
            "radlads",
            "outputs of every layer aligned, then all parameters by KL (Goldstein et al. 2025)",
            **_COPIED,
            align_tokens=100_000_000,
            align={"lr": 1e-3, "lr_projections": 1e-3},
            distil_tokens=250_000_000,
            distil=_DISTIL,
            extend_tokens=100_000_000,
            extend_length=16384,
            extend=_EXTEND,
        ),
        Recipe(
            "taylor-calibrate",
            "decay from the mean distance of attention and beta from its entropy, then distil",
            copied=True,
            solve_tokens=4096,
            stream="teacher",
            solve={"rates": "formulas", "lambdas": (), "per_head": False, "heldout": 2},
            distil_tokens=100_000_000,
            distil=_DISTIL,
        ),
        Recipe(
            "mamba-in-llama",
            "copied projections, then mixers alone by KL and cross-entropy (Wang et al. 2024)",
            **_COPIED,
            distil_tokens=20_000_000_000,
            distil={"losses": {"kl": 1.0, "cross_entropy": 1.0}, "lr": 5e-4, "lr_rest": 0.0},
        ),
    )
}


def find_recipe(recipe: str | Recipe) -> Recipe:
    """The recipe of this name, or an error that names the closest one; a recipe of one's own as it is."""
    if isinstance(recipe, Recipe):
        return recipe
    refuse_unknown("recipe", [recipe], RECIPES)
    return RECIPES[recipe]


def student_options(rule: str) -> dict[str, Any]:
    """The mixer options of a student with this update rule, as `fwp` of its config."""
    refuse_unknown("update rule for conversion", [rule], STUDENTS)
    return {"rule": rule, **STUDENTS[rule]}
