"""One token of every sequence on a GPU, beside flash-linear-attention, transformers' fallback and softmax attention.

The floor is the time to read and write the states once. `ms` is the replay of a CUDA graph, as a server runs it;
`eager_ms` is the same call from Python. Softmax attention reads a key-value cache of CONTEXT tokens instead of a state.
The rows of a whole mixer go from hidden states to what o_proj reads, in one launch after the projections and in many;
their floor reads the weights of the projections too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..cache import MixerInputs
from ..decoding import ERASES, can_decode, decode
from ..layer import FastWeightLayer
from ..options import MixerOptions
from ..rules import RULES
from . import device
from .device import Ceilings, Row, Run, Work
from .kernels import DIMENSIONS_OF_G, GATES, NORMALIZED, OURS, SAME, Operator, inputs
from .traffic import with_bytes

# sequences, heads, K = V
Shape = tuple[int, int, int]
SHAPES: tuple[Shape, ...] = ((1, 16, 128), (64, 16, 128), (256, 16, 128), (256, 8, 64))
CONTEXT = 4096
MANY = "hf_fwp, many launches"
MIXER = "whole mixer"
WHAT = ("one token", MIXER)
RULE_OF = {name: name for name in GATES} | {"delta_rule": "delta_net", "gated_delta_rule": "gated_delta_net"}
FLA: dict[str, tuple[str, str, dict[str, Any]]] = {
    "delta_rule": ("fla.ops.delta_rule", "fused_recurrent_delta_rule", NORMALIZED),
    "gated_delta_rule": ("fla.ops.gated_delta_rule", "fused_recurrent_gated_delta_rule", NORMALIZED),
    "linear_attention": ("fla.ops.linear_attn", "fused_recurrent_linear_attn", {"normalize": False}),
    "kimi_delta": ("fla.ops.kda", "fused_recurrent_kda", NORMALIZED),
}
STOCK = {
    "gated_delta_rule": ("transformers.models.qwen3_next.modeling_qwen3_next", "torch_recurrent_gated_delta_rule"),
    "kimi_delta": ("transformers.models.kimi_linear.modeling_kimi_linear", "recurrent_kimi_delta_attention"),
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
        alone = sum(make(operator) is not None for operator in GATES for make in IMPLEMENTATIONS.values())
        mixers = len(GATES) + sum(rule in ERASES for rule in RULE_OF.values())  # in many launches, and in one
        return device.say_plan(len(dtypes) * len(shapes) * (alone + mixers), "decode step")
    device.check_request(dtypes, plot)
    rows: list[Row] = []
    for dtype in dtypes:
        rows += measured(shapes, dtype, measure_in_graph, device.ceilings(dtype))
    rows = with_bytes(rows, "decode")
    result = {"machine": device.about(commit), "context": CONTEXT, "rows": rows}
    device.write(result, json=json, plot=plot, title="decode step")
    device.refuse_failed(rows, (OURS, MANY))
    return result


def measured(
    shapes: Sequence[Shape], dtype: str, measure: Callable[[Run], Row], limits: Ceilings, place: str = "cuda"
) -> list[Row]:
    """One row for every operator, shape and implementation that is installed."""
    rows = []
    for shape, operator, what in product(shapes, GATES, WHAT):
        for name, run in runs(operator, shape, dtype, what, place):
            work = work_of(name, operator, shape, dtype)
            if what == MIXER:
                work = Work(work.bytes + weights_of(mixer(operator, shape, dtype, "meta")), work.flops)
            row = {"operator": operator, "shape": list(shape), "dtype": dtype, "what": what}
            rows.append(device.judged(row | {"implementation": name} | measure(run), work, limits))
    return device.with_ratios(rows, OURS, SAME)


def runs(operator: str, shape: Shape, dtype: str, what: str, place: str = "cuda") -> Iterator[tuple[str, Run]]:
    """(name, call) of every implementation; of a whole mixer ours alone."""
    if what == MIXER:
        yield from mixer_runs(operator, shape, dtype, place)
        return
    tensors = token(shape, dtype, place, operator)
    for name, make in IMPLEMENTATIONS.items():
        compute = make(operator)
        if compute is not None:
            yield name, without_gradient(compute, tensors)


def mixer(operator: str, shape: Shape, dtype: str, place: str) -> FastWeightLayer:
    """The rule's default mixer, values as wide as keys."""
    _, heads, size = shape
    options = MixerOptions(rule=RULE_OF[operator], hidden_size=heads * size, num_attention_heads=heads)
    return FastWeightLayer(options, 0).to(place, device.DTYPES[dtype]).requires_grad_(False)


def weights_of(layer: FastWeightLayer) -> int:
    """Bytes of the weights that stand before what o_proj reads."""
    return sum(x.numel() * x.element_size() for name, x in layer.named_parameters() if "o_proj" not in name)


def mixer_runs(operator: str, shape: Shape, dtype: str, place: str) -> Iterator[tuple[str, Run]]:
    """In one launch where the kernel serves the mixer, and in many."""
    layer = mixer(operator, shape, dtype, place)
    given = MixerInputs(torch.randn(shape[0], 1, layer.options.hidden_size, device=place).to(device.DTYPES[dtype]))
    states = layer._mix(given, {})[1]
    if can_decode(layer, given, states):
        yield OURS, without_gradient(lambda states: decode(layer, given, states), states)
    yield MANY, without_gradient(lambda states: layer._mix(given, states, in_place=True)[0], states)


def token(shape: Shape, dtype: str, place: str, operator: str = "gated_delta_rule") -> dict[str, Tensor]:
    """q, k, v, beta, g of one token and the state of every sequence."""
    sequences, heads, size = shape
    state = torch.randn(sequences, heads, size, size, device=place)
    return inputs((sequences, 1, heads, size), dtype, place, operator) | {"state": state}


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
    apply, gates = RULES[RULE_OF[operator]].apply, GATES[operator]
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
        given = {gate: x[gate] for gate in GATES[operator]}
        carried = {"initial_state": x["state"], "output_final_state": True}
        return function(x["q"], x["k"], x["v"], **given, **carried, **keywords)[0]

    return compute


def transformers_fallback(operator: str) -> Operator | None:
    """transformers has them for the gated delta rules alone, the one with a decay per channel since Kimi Linear."""
    if operator not in STOCK:
        return None
    stock, carried = device.peer(*STOCK[operator]), {"output_final_state": True, **NORMALIZED}
    return stock and (
        lambda x: stock(x["q"], x["k"], x["v"], x["g"], x["beta"], initial_state=x["state"], **carried)[0]
    )


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
    decays = size if DIMENSIONS_OF_G.get(operator) == 4 else 1
    small = pairs * (4 * size * word + sum({"beta": word, "g": 4 * decays}[gate] for gate in GATES[operator]))
    if name == "SDPA":
        return Work(2 * pairs * CONTEXT * size * word + 4 * pairs * size * word, 4 * pairs * CONTEXT * size)
    return Work(2 * pairs * size * size * 4 + small, (6 if GATES[operator] else 4) * pairs * size * size)
