"""The LSTM of rules/fast_weight_memory.py on a GPU. A token's input is the gates' sums i | f | g | o without h.

A head's weights are W_h [V, 4V]; carried are h and c.
"""

# pyright: reportGeneralTypeIssues=false
# (the bodies of kernels are another language)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rules.base import States
from . import walk as frame
from .cells import load_tile, load_vector, read, sigmoid, spread, store_vector, tanh


@triton.jit
def load(s, K, V, BK: tl.constexpr, BV: tl.constexpr):
    """h and c."""
    return load_vector(s, V, BV), load_vector(s + V, V, BV)


@triton.jit
def store(s, state, K, V, BK: tl.constexpr, BV: tl.constexpr):
    h, c = state
    store_vector(s, h, V, BV)
    store_vector(s + V, c, V, BV)


@triton.jit
def gate_sum(h, x, w, gate, V, BV: tl.constexpr):
    """One of i, f, g and o before it is squashed."""
    return load_vector(x + gate * V, V, BV) + read(load_tile(w + gate * V, V, V, 4 * V, BV, BV), h)


@triton.jit
def gates(h, x, w, V, BV: tl.constexpr):
    """i, f, g and o."""
    i, f = sigmoid(gate_sum(h, x, w, 0, V, BV)), sigmoid(gate_sum(h, x, w, 1, V, BV) + 1.0)
    return i, f, tanh(gate_sum(h, x, w, 2, V, BV)), sigmoid(gate_sum(h, x, w, 3, V, BV))


@triton.jit
def step(state, x, w, K, V, BK: tl.constexpr, BV: tl.constexpr, OPT: tl.constexpr):
    h, c = state
    i, f, g, o = gates(h, x, w, V, BV)
    c = f * c + i * g
    h = o * tanh(c)
    return (h, c), h


@triton.jit
def back_through(d_sum, d_x, w, gate, V, BV: tl.constexpr):
    """Store a gate's gradient; what it sends to h."""
    store_vector(d_x + gate * V, d_sum, V, BV)
    return spread(load_tile(w + gate * V, V, V, 4 * V, BV, BV), d_sum)


@triton.jit
def back(before, d_state, d_out, x, w, d_x, note, K, V, BK: tl.constexpr, BV: tl.constexpr, OPT: tl.constexpr):
    h, c = before
    d_h, d_c = d_state
    d_h += d_out
    i, f, g, o = gates(h, x, w, V, BV)
    squashed = tanh(f * c + i * g)
    d_c += d_h * o * (1.0 - squashed * squashed)
    store_vector(note, h, V, BV)
    d_before = back_through(d_c * g * i * (1.0 - i), d_x, w, 0, V, BV)
    d_before += back_through(d_c * c * f * (1.0 - f), d_x, w, 1, V, BV)
    d_before += back_through(d_c * i * (1.0 - g * g), d_x, w, 2, V, BV)
    d_before += back_through(d_h * squashed * o * (1.0 - o), d_x, w, 3, V, BV)
    return d_before, d_c * f


def of_weights(note: Tensor, d_x: Tensor, key_size: int, value_size: int) -> Tensor:
    """Σ_t h_{t-1} ⊗ d_x."""
    return torch.einsum("nthi,ntho->hio", note, d_x).flatten(1)


TWIN = frame.Twin(
    load=load,
    store=store,
    step=step,
    back=back,
    tiles=lambda BK, BV: BV * BV,
    notes=lambda K, V: V,
    of_weights=of_weights,
)


def walk(
    inputs: dict[str, Tensor], states: States, *, weights: dict[str, Tensor], mask: Tensor | None, **options: Any
) -> tuple[Tensor, States]:
    """The whole sequence: as rules/walk.py with the LSTM's step."""
    x, given, sizes = inputs["gates"] + weights["b_h"], (states["h"], states["c"]), (states["h"].shape[-1],) * 2
    out, (h, c) = frame.walk("lstm", (x,), (weights["W_h"],), given, sizes=sizes, mask=mask)
    return out, {"h": h, "c": c}
