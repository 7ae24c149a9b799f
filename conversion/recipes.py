"""Recipes are data: which stages run, over how many tokens, with which settings. The code is in the stages' files.

`tokens` of solve are those of the final solution; a ranked `keep` first solves on `rank_solve_tokens` others, and
measures the swaps on `rank_tokens`. Tokens of align and distil are read once.
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
    sequence_length: int = 512
    solve_tokens: int = 16384
    stream: str = "student"
    rank_solve_tokens: int = 5120
    rank_tokens: int = 768
    align_tokens: int = 0
    align: Mapping[str, Any] = field(default_factory=dict)
    distil_tokens: int = 0
    distil: Mapping[str, Any] = field(default_factory=dict)

    def trained(self) -> int:
        """Tokens of the stages that take gradient steps."""
        return self.align_tokens + self.distil_tokens

    def tokens(self, *, ranked: bool) -> int:
        """All tokens that the recipe reads, so many must the data have."""
        ranking = self.rank_solve_tokens + self.rank_tokens if ranked else 0
        return self.solve_tokens + ranking + self.trained()

    def with_trained(self, tokens: int) -> Recipe:
        """The same recipe with `tokens` for align and distil together, shared as before."""
        align = round(tokens * self.align_tokens / max(1, self.trained()))
        return replace(self, align_tokens=align, distil_tokens=tokens - align if self.distil_tokens else 0)


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("closed-form", "calibrate and solve, no gradient step: minutes on a CPU"),
        Recipe(
            "quick",
            "closed-form, then align and distil: 0.2M tokens in all",
            align_tokens=16384,
            distil_tokens=159744,
            distil={"save_every": 10},
        ),
    )
}


def find_recipe(name: str) -> Recipe:
    """The recipe called `name`, or an error that names the closest one."""
    refuse_unknown("recipe", [name], RECIPES)
    return RECIPES[name]


def student_options(rule: str) -> dict[str, Any]:
    """The mixer options of a student with this update rule, as `fwp` of its config."""
    refuse_unknown("update rule for conversion", [rule], STUDENTS)
    return {"rule": rule, **STUDENTS[rule]}
