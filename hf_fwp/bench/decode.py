"""One token of every sequence on a GPU, beside flash-linear-attention, transformers' fallback and softmax attention.

The floor is the time to read and write the states once. `ms` is the replay of a CUDA graph, as a server runs it;
`eager_ms` is the same call from Python. Softmax attention reads a key-value cache of CONTEXT tokens instead of a state.
The rows of a whole mixer go from hidden states to what o_proj reads, in one launch after the projections and in many;
their floor reads the weights of the projections too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..cache import MixerInputs
from ..decoding import can_decode, decode
from ..layer import FastWeightLayer
from ..options import MixerOptions
from ..rules import RULES
from . import device
from .device import Ceilings, Row, Run, Work
from .kernels import NORMALIZED, OPERATORS, OURS, SAME, Operator, inputs

# sequences, heads, K = V
Shape = tuple[int, int, int]
SHAPES: tuple[Shape, ...] = ((1, 16, 128), (64, 16, 128), (256, 16, 128), (256, 8, 64))
CONTEXT = 4096
MANY = "hf_fwp, many launches"
RULE_OF = {"delta_rule": "delta_net", "gated_delta_rule": "gated_delta_net", "linear_attention": "linear_attention"}
FLA: dict[str, tuple[str, str, dict[str, Any]]] = {
    "delta_rule": ("fla.ops.delta_rule", "fused_recurrent_delta_rule", NORMALIZED),
    "gated_delta_rule": ("fla.ops.gated_delta_rule", "fused_recurrent_gated_delta_rule", NORMALIZED),
    "linear_attention": ("fla.ops.linear_attn", "fused_recurrent_linear_attn", {"normalize": False}),
}


def bench_decode(
    *,
    json: str | Path | None = None,
    plot: str | Path | None = None,
    commit: str | None = None,
    shapes: Sequence[Shape] = SHAPES,
    dtypes: Sequence[str] = ("bfloat16",),
    dry_run: bool = False,
) -> Row:
    """Time one decode step of every operator at every (sequences, heads, size); print a table, write it where asked.

    dry_run: print how many rows would be timed, and return nothing. Raises ValueError without a GPU.
    """
    if dry_run:
        device.check_dtypes(dtypes)
        alone = sum(make(operator) is not None for operator in OPERATORS for make in IMPLEMENTATIONS.values())
        mixers = len((OURS, MANY)) * len(OPERATORS)
        return device.say_plan(len(dtypes) * len(shapes) * (alone + mixers), "decode step")
    device.check_request(dtypes, plot)
    rows: list[Row] = []
    for dtype in dtypes:
        rows += measured(shapes, dtype, measure_in_graph, device.ceilings(dtype))
    result = {"machine": device.about(commit), "context": CONTEXT, "rows": rows}
    device.write(result, json=json, plot=plot, title="decode step")
    device.refuse_failed(rows, (OURS, MANY))
    return result


def measured(
    shapes: Sequence[Shape], dtype: str, measure: Callable[[Run], Row], limits: Ceilings, place: str = "cuda"
) -> list[Row]:
    """One row for every operator, shape and implementation that is installed."""
    rows = []
    for shape in shapes:
        for operator in OPERATORS:
            tensors = token(shape, dtype, place)
            for name, make in IMPLEMENTATIONS.items():
                compute = make(operator)
                if compute is None:
                    continue
                row = {"operator": operator, "shape": list(shape), "dtype": dtype, "what": "one token"}
                found = row | {"implementation": name} | measure(without_gradient(compute, tensors))
                rows.append(device.judged(found, work_of(name, operator, shape, dtype), limits))
            rows += mixer_rows(operator, shape, dtype, measure, limits, tensors["state"].device)
    return device.with_ratios(rows, OURS, SAME)


def mixer_rows(
    operator: str, shape: Shape, dtype: str, measure: Callable[[Run], Row], limits: Ceilings, place: str | torch.device
) -> list[Row]:
    """The rule's default mixer, values as wide as keys: in one launch where the kernel serves it, and in many."""
    sequences, heads, size = shape
    options = MixerOptions(rule=RULE_OF[operator], hidden_size=heads * size, num_attention_heads=heads)
    layer = FastWeightLayer(options, 0).to(place, device.DTYPES[dtype]).requires_grad_(False)
    x_BTD = torch.randn(sequences, 1, heads * size, device=place).to(device.DTYPES[dtype])
    given = MixerInputs(x_BTD)
    states = layer._mix(given, {})[1]
    calls: dict[str, Operator] = {MANY: lambda states: layer._mix(given, states, in_place=True)[0]}
    if can_decode(layer, given, states):
        calls = {OURS: lambda states: decode(layer, given, states), **calls}
    weights = sum(x.numel() * x.element_size() for n, x in layer.named_parameters() if "o_proj" not in n)
    step = work_of(OURS, operator, shape, dtype)
    work = Work(step.bytes + weights, step.flops)
    alike = {"operator": operator, "shape": list(shape), "dtype": dtype, "what": "whole mixer"}
    measured_calls = {name: measure(without_gradient(run, states)) for name, run in calls.items()}
    return [device.judged(alike | {"implementation": n} | found, work, limits) for n, found in measured_calls.items()]


def token(shape: Shape, dtype: str, place: str) -> dict[str, Tensor]:
    """q, k, v, beta, g of one token and the state of every sequence."""
    sequences, heads, size = shape
    state = torch.randn(sequences, heads, size, size, device=place)
    return inputs((sequences, 1, heads, size), dtype, place) | {"state": state}


def without_gradient(compute: Operator, tensors: dict[str, Tensor]) -> Run:
    def run() -> Tensor:
        with torch.no_grad():
            return compute(tensors)

    return run


def measure_in_graph(run: Run) -> Row:
    """As `device.measure`, timed as the replay of a graph; None where a call cannot be captured."""
    found = device.measure(run)
    if found["ms"] is None:
        return found
    try:
        replay = captured(run)
    except RuntimeError as fault:
        return found | {"eager_ms": found["ms"], "ms": None, "note": f"no graph: {str(fault).splitlines()[0][:60]}"}
    return found | {"eager_ms": found["ms"], "ms": device.median_ms(replay)}


def captured(run: Run) -> Run:
    graph = torch.cuda.CUDAGraph()
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        run()
    torch.cuda.current_stream().wait_stream(warm)
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def ours(operator: str) -> Operator:
    apply, gates = RULES[RULE_OF[operator]].apply, OPERATORS[operator]
    options = {"normalize": False} if not gates else None

    def compute(x: dict[str, Tensor]) -> Tensor:
        given = {name: x[name] for name in gates}
        settings = {"options": options, "qk_l2norm": bool(gates), "backend": "step", "in_place": True}
        return apply(x["q"], x["k"], x["v"], **given, states={"state": x["state"]}, **settings)[0]

    return compute


def fla(operator: str) -> Operator | None:
    module, name, keywords = FLA[operator]
    function = device.peer(module, name)
    if function is None:
        return None

    def compute(x: dict[str, Tensor]) -> Tensor:
        given = {gate: x[gate] for gate in OPERATORS[operator]}
        carried = {"initial_state": x["state"], "output_final_state": True}
        return function(x["q"], x["k"], x["v"], **given, **carried, **keywords)[0]

    return compute


def transformers_fallback(operator: str) -> Operator | None:
    """transformers has one for the gated delta rule alone."""
    if OPERATORS[operator] != ("g", "beta"):
        return None
    from transformers.models.qwen3_next import modeling_qwen3_next as theirs

    stock = theirs.torch_recurrent_gated_delta_rule
    carried = {"output_final_state": True, **NORMALIZED}
    return lambda x: stock(x["q"], x["k"], x["v"], x["g"], x["beta"], initial_state=x["state"], **carried)[0]


def softmax(operator: str) -> Operator:
    kept: list[Tensor] = []

    def compute(x: dict[str, Tensor]) -> Tensor:
        if not kept:
            sequences, _, heads, size = x["q"].shape
            kept.extend(x["k"].new_empty(sequences, heads, CONTEXT, size).normal_() for _ in range(2))
        keys, values = kept
        return F.scaled_dot_product_attention(x["q"].transpose(1, 2), keys, values).transpose(1, 2)

    return compute


IMPLEMENTATIONS: dict[str, Callable[[str], Operator | None]] = {
    OURS: ours,
    "flash-linear-attention": fla,
    "transformers": transformers_fallback,
    "SDPA": softmax,
}


def work_of(name: str, operator: str, shape: Shape, dtype: str) -> Work:
    """The states once in and once out in float32 (or the cache once in), and three products of a vector with them."""
    sequences, heads, size = shape
    pairs, word = sequences * heads, device.DTYPES[dtype].itemsize
    small = pairs * (4 * size * word + sum({"beta": word, "g": 4}[gate] for gate in OPERATORS[operator]))
    if name == "SDPA":
        return Work(2 * pairs * CONTEXT * size * word + 4 * pairs * size * word, 4 * pairs * CONTEXT * size)
    return Work(2 * pairs * size * size * 4 + small, (6 if OPERATORS[operator] else 4) * pairs * size * size)
