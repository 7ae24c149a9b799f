"""The sequential rules on a GPU: their kernels beside the same rules in PyTorch, token by token and with few states.

The token-by-token loop is `backend="reference"`: the rule's step, one launch for every operation in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..rules import RULES
from . import device
from .device import Row, Run
from .kernels import OURS, SAME, Shape

SHAPES: tuple[Shape, ...] = ((16, 256, 8, 64), (32, 256, 8, 64))
BACKENDS = {OURS: None, "hf_fwp, backend torch": "torch", "PyTorch, token by token": "reference"}
# Where the defaults leave nothing to walk through.
OPTIONS: dict[str, dict[str, Any]] = {
    "fwp_1991": {"squashing": "tanh"},
    "continuous_fwp": {"learning_rule": "oja"},
}
# The keys' size where the kernel does not serve that of the shape: the published one.
KEYS = {"fast_weight_memory": 32}
SEQUENTIAL = (
    "recurrent_delta_net",
    "delta_rnn",
    "delta_lstm",
    "srwm",
    "self_modifying_delta",
    "fwp_1991",
    "fwp_1993",
    "delta_delta",
    "delta_mlp",
    "ba_fast_weights",
    "continuous_fwp",
    "fast_weight_memory",
)


def bench_sequential(
    *,
    json: str | Path | None = None,
    plot: str | Path | None = None,
    commit: str | None = None,
    shapes: Sequence[Shape] = SHAPES,
    dtypes: Sequence[str] = ("bfloat16",),
    dry_run: bool = False,
) -> Row:
    """Time forward and backward of every sequential rule at every (B, T, H, D); print a table, write it where asked.

    dry_run: print how many rows would be timed, and return nothing. Raises ValueError without a GPU.
    """
    if dry_run:
        device.check_dtypes(dtypes)
        count = len(dtypes) * len(shapes) * len(SEQUENTIAL) * len(BACKENDS)
        return device.say_plan(count, "sequential rules")
    device.check_request(dtypes, plot)
    rows: list[Row] = []
    for dtype in dtypes:
        rows += measured(shapes, dtype, lambda run: {"ms": device.median_ms(run)})
    result = {"machine": device.about(commit), "rows": rows}
    device.write(result, json=json, plot=plot, title="sequential rules")
    return result


def measured(shapes: Sequence[Shape], dtype: str, measure: Callable[[Run], Row], place: str = "cuda") -> list[Row]:
    """One row for every rule, shape and backend, with how many times our kernel's time it takes."""
    rows = []
    for shape in shapes:
        for rule in SEQUENTIAL:
            for name, run in runs(rule, shape, dtype, place):
                row = {"operator": rule, "shape": list(shape), "dtype": dtype, "what": "forward + backward"}
                rows.append(row | {"implementation": name} | measure(run))
    return device.with_ratios(rows, OURS, SAME)


def runs(rule: str, shape: Shape, dtype: str, place: str) -> Iterator[tuple[str, Run]]:
    """(name, call) of every backend, on the same tensors."""
    leaves, keywords = problem(rule, shape, dtype, place)
    wanted = [*leaves.values(), *keywords.get("weights", {}).values()]

    def run(backend: str | None) -> None:
        out, _ = RULES[rule].apply(**leaves, backend=backend, **keywords)
        torch.autograd.grad(out, wanted, torch.ones_like(out))

    for name, backend in BACKENDS.items():
        yield name, lambda backend=backend: run(backend)


def problem(rule: str, shape: Shape, dtype: str, place: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Random inputs and weights that are differentiated, and the rule's options."""
    (batch, length, heads, size), found = shape, RULES[rule]
    options = found.resolve_options(OPTIONS.get(rule))
    assert found.own is not None
    own = found.own(KEYS.get(rule, size), size, options)
    names = ("q", "k", "v") if found.qkv else ("x",) if own.hidden else ()
    widths = dict.fromkeys(names, size) | dict(own.projections)
    generator = torch.Generator(place).manual_seed(0)
    leaves = {
        name: torch.randn(batch, length, heads, width, generator=generator, device=place)
        for name, width in widths.items()
    }
    if found.qkv:
        leaves["k"] = torch.nn.functional.normalize(leaves["k"], dim=-1)
    leaves |= {name: torch.rand(batch, length, heads, generator=generator, device=place) for name in found.inputs}
    leaves = {name: x.to(device.DTYPES[dtype]).requires_grad_() for name, x in leaves.items()}
    weights = {n: w.draw(heads, *w.shape).to(place).requires_grad_() for n, w in own.weights.items()}
    return leaves, {"options": options} | ({"weights": weights} if weights else {})
