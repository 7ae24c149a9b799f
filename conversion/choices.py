"""What can be done otherwise in a recipe, and what was expected of it before it was measured (ablate.py).

Choices of stages that a recipe does not run make no difference to it and are left out there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .dropout import NEVER

AS_IT_IS = "as it is"


@dataclass(frozen=True)
class Choice:
    """One thing that is done otherwise, and what is expected of it."""

    expected: str
    """better, worse or same, in KL against the recipe as it is, and why"""
    change: Mapping[str, Any] = field(default_factory=dict)
    """of the recipe: Recipe.changed"""
    keep: str | None = None
    """how kept layers are chosen instead: uniform, or random"""
    seeds: int = 1
    """runs with other kept layers on the same text, whose mean counts"""


CHOICES: dict[str, Choice] = {
    AS_IT_IS: Choice("same: this is what the others are compared with"),
    "one time scale": Choice("worse: one half-life per head cannot be near and far", {"fwp.time_scales": 1}),
    "three time scales": Choice("better: for the worst heads", {"fwp.time_scales": 3}),
    "rates by formulas with one time scale": Choice(
        "worse than one time scale: a sink spoils distance and entropy",
        {"solve.rates": "formulas", "fwp.time_scales": 1, "fwp.state_bias": False},
    ),
    "beta fixed": Choice("worse: heads differ in how strongly they should write", {"solve.fixed": {"beta": 0.5}}),
    "half-life fixed": Choice("worse: heads differ in how far they look", {"solve.fixed": {"half_life": 38.0}}),
    "never rotated": Choice("worse: some heads need positions", {"fwp.rope_heads": "none"}),
    "always rotated": Choice("worse: most heads prefer no RoPE", {"solve.fixed": {"rotate": True}}),
    "no value regressor": Choice("worse: the current token's value is cheap", {"fwp.value_skip": 0}),
    "two values": Choice("better: the last token's value is a frequent target", {"fwp.value_skip": 2}),
    "no constant": Choice("worse: a sink's value is a constant", {"fwp.o_bias": False}),
    "no bias of q and k": Choice("worse: the state cannot be asked for the mean value", {"fwp.state_bias": False}),
    "no gate": Choice("worse: nothing says 'nothing here'", {"fwp.output_gate": "none"}),
    "window and sinks": Choice("better: what is near is exact", {"fwp.window": 64, "fwp.sinks": 4}),
    "grouped states": Choice("worse: fewer states, by as many as share a key", {"fwp.state_heads": "grouped"}),
    "lambda 0.01": Choice("worse: it overfits few tokens", {"solve.lambdas": (1e-2,)}),
    "lambda 1": Choice("worse: layers differ in what they need", {"solve.lambdas": (1.0,)}),
    "drawn to the copy": Choice("worse: W0 of the copied projection is far off", {"solve.per_head": False}),
    "teacher inputs": Choice("worse: later layers never see the errors of earlier ones", {"stream": "teacher"}),
    "student inputs": Choice("better: later layers see the errors of earlier ones", {"stream": "student"}),
    "solved on 8192 tokens": Choice("worse: the solution overfits", {"solve_tokens": 8192, "solve_more": 1.0}),
    "solved on 16384 tokens": Choice("worse: the solution overfits", {"solve_tokens": 16384, "solve_more": 1.0}),
    "solved on 32768 tokens": Choice("better: the solution overfits less", {"solve_tokens": 32768, "solve_more": 1.0}),
    "not trained": Choice("worse", {"align_tokens": 0, "distil_tokens": 0, "extend_tokens": 0}),
    "no align": Choice("worse: align is the cheapest way to a good start", {"align_tokens": 0}),
    "align lr x 0.3": Choice("worse", {"align.lr": 3e-4, "align.lr_projections": 3e-5}),
    "align lr x 3": Choice("worse", {"align.lr": 3e-3, "align.lr_projections": 3e-4}),
    "align mixers only": Choice("worse: q, k, v can help", {"align.lr_projections": 0.0}),
    "one sequence a step": Choice(
        "better: with few tokens more steps are worth more than larger ones",
        {"align.batch_size": 1, "distil.batch_size": 1},
    ),
    "no distil": Choice("worse: errors of layers add up, which align does not see", {"distil_tokens": 0}),
    "distil mixers only": Choice("worse: the rest can make up for mixers", {"distil.lr_rest": 0.0}),
    "window never left out": Choice(
        "better with its windows, worse without: the fast weights are not asked for what is near",
        {"align.window_dropout": NEVER, "distil.window_dropout": NEVER},
    ),
    "window rates x 10": Choice(
        "same: it learns as one without windows does, whose rates these are",
        {"align.lr": 1e-3, "align.lr_projections": 1e-4, "distil.lr": 5e-4, "distil.lr_rest": 2e-4},
    ),
    "no extend": Choice(
        "better: what is measured is no longer than what distil reads, which gets its tokens", {"extend_tokens": 0}
    ),
    "kept for recall too": Choice("worse in KL on text: other layers matter for recall", {"rank.recall": 1.0}),
    "kept uniformly": Choice("worse: layers differ by ten times in what they cost", keep="uniform"),
    "kept at random": Choice("worse: layers differ by ten times in what they cost", keep="random", seeds=3),
}

# Factors on every learning rate of a recipe.
SWEEPS: dict[str, tuple[float, ...]] = {"lr": (1.0, 0.3, 3.0)}
SWEPT = "worse: the recipe names its best rates"
