"""The chunked operators on a GPU, beside flash-linear-attention, the fallback of transformers and softmax attention.

Everybody gets the same tensors in the same process. A peer is called as its own layers call it: keys and queries are
normalised inside its operator. What is not installed is left out.
"""

from __future__ import annotations

import importlib
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops
from . import device
from .device import Ceilings, Row, Run, Work
from .traffic import with_bytes

# B, T, H, D
Shape = tuple[int, int, int, int]
SHAPES: tuple[Shape, ...] = ((8, 4096, 16, 128), (1, 32768, 16, 128), (32, 2048, 8, 64))
CHUNK = 64
WHAT = ("forward", "forward + backward")
OURS = "hf_fwp"
OUR_BACKENDS = (OURS, "hf_fwp, backend torch")
SAME = ("operator", "shape", "dtype", "what")
OPERATORS = {"delta_rule": ("beta",), "gated_delta_rule": ("g", "beta"), "linear_attention": ()}
# what is timed here only: the gated delta rule with a decay for every channel
GATES: dict[str, tuple[str, ...]] = OPERATORS | {"kimi_delta": ("g", "beta")}
CALLED = {"kimi_delta": "gated_delta_rule"}
DIMENSIONS_OF_G = {"kimi_delta": 4}
NORMALIZED = {"use_qk_l2norm_in_kernel": True}

# (operations that grow with the chunk, operations on the state) per token and head, in units of 2 C D and 2 D D: the
# products of rules/chunked.py, forward and backward.
PRODUCTS = {
    "delta_rule": ((4, 3), (7, 6)),
    "gated_delta_rule": ((4, 3), (7, 6)),
    "linear_attention": ((2, 2), (4, 4)),
    "kimi_delta": ((4, 3), (7, 6)),
}

FLA: dict[str, tuple[str, str, dict[str, Any]]] = {
    "delta_rule": ("fla.ops.delta_rule", "chunk_delta_rule", NORMALIZED),
    "gated_delta_rule": ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule", NORMALIZED),
    "linear_attention": ("fla.ops.linear_attn", "chunk_linear_attn", {"normalize": False}),
    "kimi_delta": ("fla.ops.kda", "chunk_kda", NORMALIZED),
}
STOCK = {
    "gated_delta_rule": ("transformers.models.qwen3_next.modeling_qwen3_next", "torch_chunk_gated_delta_rule"),
    "kimi_delta": ("transformers.models.kimi_linear.modeling_kimi_linear", "chunk_kimi_delta_attention"),
}
Operator = Callable[[dict[str, Tensor]], Tensor]


def bench_kernels(
    *,
    json: str | Path | None = None,
    plot: str | Path | None = None,
    tune: bool = False,
    commit: str | None = None,
    shapes: Sequence[Shape] = SHAPES,
    dtypes: Sequence[str] = ("bfloat16",),
    dry_run: bool = False,
) -> Row:
    """Time every operator at every shape; print a table, and write it and a picture where asked.

    `tune` tries other rows of the kernels' table of block sizes first and reports the best; `commit` names the version
    where the checkout has no history. dry_run: print how many rows would be timed, and return nothing. Raises
    ValueError without a GPU.
    """
    if dry_run:
        device.check_dtypes(dtypes)
        installed = sum(make(operator) is not None for operator in GATES for make in IMPLEMENTATIONS.values())
        return device.say_plan(len(dtypes) * len(shapes) * len(WHAT) * installed, "chunked operators")
    device.check_request(dtypes, plot)
    tuned = importlib.import_module("hf_fwp.bench.tune").best_launches(shapes, dtypes) if tune else None
    rows: list[Row] = []
    with _compiled_anew():
        for dtype in dtypes:
            rows += measured(shapes, dtype, device.measure, device.ceilings(dtype))
    rows = with_bytes(rows, "kernels")
    result = {"machine": device.about(commit), "rows": rows} | ({} if tuned is None else {"tuned": tuned})
    device.write(result, json=json, plot=plot, title="chunked operators")
    device.refuse_failed(rows, OUR_BACKENDS)
    return result


def measured(shapes: Sequence[Shape], dtype: str, measure: Callable[[Run], Row], limits: Ceilings) -> list[Row]:
    """One row for every operator, shape, direction and implementation that is installed."""
    rows = []
    for shape in shapes:
        for operator in GATES:
            for what in WHAT:
                for name, run in runs(operator, shape, dtype, what):
                    work = work_of(name, operator, shape, dtype, what)
                    row = {"operator": operator, "shape": list(shape), "dtype": dtype, "what": what}
                    rows.append(device.judged(row | {"implementation": name} | measure(run), work, limits))
    return device.with_ratios(rows, OURS, SAME)


def runs(operator: str, shape: Shape, dtype: str, what: str, place: str = "cuda") -> Iterator[tuple[str, Run]]:
    """(name, call) of every implementation. The tensors are freed before the next shape."""
    tensors = inputs(shape, dtype, place, operator)
    for name, make in IMPLEMENTATIONS.items():
        compute = make(operator)
        if compute is not None:
            yield name, (forward if what == "forward" else backward)(compute, operator, tensors)


def inputs(shape: Shape, dtype: str, place: str, operator: str = "gated_delta_rule") -> dict[str, Tensor]:
    generator = torch.Generator(place).manual_seed(0)
    options = {"generator": generator, "device": place}
    found = {name: torch.randn(shape, **options).to(device.DTYPES[dtype]) for name in ("q", "k", "v")}
    beta, g = (torch.rand(shape[:n], **options) for n in (3, DIMENSIONS_OF_G.get(operator, 3)))
    return found | {"beta": beta.to(device.DTYPES[dtype]), "g": -0.1 * g}


def forward(compute: Operator, operator: str, tensors: dict[str, Tensor]) -> Run:
    def run() -> None:
        with torch.no_grad():
            compute(tensors)

    return run


def backward(compute: Operator, operator: str, tensors: dict[str, Tensor]) -> Run:
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    d_out = torch.randn_like(tensors["v"])

    def run() -> None:
        out = compute(leaves)
        used = ("q", "k", "v", *GATES[operator])
        torch.autograd.grad(out, [leaves[name] for name in used], d_out.to(out.dtype), allow_unused=True)

    return run


def ours(operator: str, backend: str | None = None) -> Operator:
    keywords = (NORMALIZED if GATES[operator] else {}) | {"backend": backend}
    return partial(_call, getattr(ops, CALLED.get(operator, operator)), GATES[operator], keywords)


def fla(operator: str) -> Operator | None:
    module, name, keywords = FLA[operator]
    function = device.peer(module, name)
    return function and partial(_call, function, GATES[operator], keywords)


def _call(function: Callable[..., Any], gates: Sequence[str], keywords: dict[str, Any], x: dict[str, Tensor]) -> Tensor:
    return function(x["q"], x["k"], x["v"], **{name: x[name] for name in gates}, **keywords)[0]


def transformers_fallback(operator: str) -> Operator | None:
    """transformers has them for the gated delta rules alone, the one with a decay per channel since Kimi Linear."""
    if operator not in STOCK:
        return None
    stock = device.peer(*STOCK[operator])
    return stock and (lambda x: stock(x["q"], x["k"], x["v"], x["g"], x["beta"], **NORMALIZED)[0])


def softmax(operator: str) -> Operator:
    def compute(x: dict[str, Tensor]) -> Tensor:
        q, k, v = (x[name].transpose(1, 2) for name in ("q", "k", "v"))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return compute


IMPLEMENTATIONS: dict[str, Callable[[str], Operator | None]] = {
    OURS: ours,
    "hf_fwp, backend torch": partial(ours, backend="torch"),
    "flash-linear-attention": fla,
    "transformers": transformers_fallback,
    "SDPA": softmax,
}


def work_of(name: str, operator: str, shape: Shape, dtype: str, what: str) -> Work:
    """Forward reads q, k, v and the gates, writes out (4 X); backward reads q, k, v, d out, writes three (7 X)."""
    batch, length, heads, size = shape
    tokens = batch * length * heads
    word = device.DTYPES[dtype].itemsize
    decays = size if DIMENSIONS_OF_G.get(operator) == 4 else 1
    gate_bytes = tokens * sum({"beta": word, "g": 4 * decays}[gate] for gate in GATES[operator])
    both = what != "forward"
    moved = (11 if both else 4) * math.prod(shape) * word + (3 if both else 1) * gate_bytes
    if name == "SDPA":
        # two products over half of the T x T square; backward has five
        return Work(moved, int((7 if both else 2) * tokens * length * size))
    chunked, on_state = (sum(x) if both else x[0] for x in zip(*PRODUCTS[operator], strict=True))
    return Work(moved, 2 * tokens * size * (chunked * CHUNK + on_state * size))


@contextmanager
def _compiled_anew() -> Iterator[None]:
    """Compiles into an empty folder, so that the first call compiles."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        before = knobs.cache.dir
        knobs.cache.dir = folder
        try:
            yield
        finally:
            knobs.cache.dir = before
