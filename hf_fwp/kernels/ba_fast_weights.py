"""rules/ba_fast_weights.py on a GPU. A token's input is c, a head's weights W_h | gain | bias.

The numbers: λ, η, the inner steps, and 1 for tanh. The inner steps are computed again for the backward of each.
"""

# pyright: reportGeneralTypeIssues=false
# (the bodies of kernels are another language)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rules.ba_fast_weights import LN_EPS
from ..rules.base import States
from . import walk as frame
from .cells import (
    load_tile,
    load_vector,
    normalized,
    normalized_back,
    outer,
    read,
    spread,
    store_tile,
    store_vector,
    tanh,
)

EPS = tl.constexpr(LN_EPS)


@triton.jit
def load(s, K, V, BK: tl.constexpr, BV: tl.constexpr):
    """A and h."""
    return load_tile(s, V, V, V, BV, BV), load_vector(s + V * V, V, BV)


@triton.jit
def store(s, state, K, V, BK: tl.constexpr, BV: tl.constexpr):
    matrix, h = state
    store_tile(s, matrix, V, V, V, BV, BV)
    store_vector(s + V * V, h, V, BV)


@triton.jit
def act(a, TANH: tl.constexpr):
    return tanh(a) if TANH == 1 else tl.maximum(a, 0.0)


@triton.jit
def act_back(h, d_h, TANH: tl.constexpr):
    """From the gradient of h = act(a) to that of a."""
    if TANH == 1:
        d_h *= 1.0 - h * h
    else:
        d_h = tl.where(h > 0, d_h, 0.0)
    return d_h


@triton.jit
def settled(base, matrix, w, V, BV: tl.constexpr, STEPS: tl.constexpr, TANH: tl.constexpr):
    """h after some inner steps."""
    gain, bias = load_vector(w + V * V, V, BV), load_vector(w + V * V + V, V, BV)
    h = act(base, TANH)
    for _ in tl.static_range(STEPS):
        n, _ = normalized(base + read(matrix, h), V, EPS, BV)
        h = act(n * gain + bias, TANH)
    return h


@triton.jit
def begun(state, x, w, V, BV: tl.constexpr, OPT: tl.constexpr):
    """A and b of this token."""
    matrix, h = state
    base = read(load_tile(w, V, V, V, BV, BV), h) + load_vector(x, V, BV)
    return OPT[0] * matrix + OPT[1] * outer(h, h), base


@triton.jit
def step(state, x, w, K, V, BK: tl.constexpr, BV: tl.constexpr, OPT: tl.constexpr):
    matrix, base = begun(state, x, w, V, BV, OPT)
    h = settled(base, matrix, w, V, BV, OPT[2], OPT[3])
    return (matrix, h), h


@triton.jit
def back(before, d_state, d_out, x, w, d_x, note, K, V, BK: tl.constexpr, BV: tl.constexpr, OPT: tl.constexpr):
    d_matrix, d_h = d_state
    d_h += d_out
    matrix, base = begun(before, x, w, V, BV, OPT)
    gain, bias = load_vector(w + V * V, V, BV), load_vector(w + V * V + V, V, BV)
    d_base, d_gain, d_bias = d_h * 0.0, d_h * 0.0, d_h * 0.0
    steps: tl.constexpr = OPT[2]
    for i in tl.static_range(steps):
        h = settled(base, matrix, w, V, BV, steps - 1 - i, OPT[3])
        n, inverse = normalized(base + read(matrix, h), V, EPS, BV)
        d_a = act_back(act(n * gain + bias, OPT[3]), d_h, OPT[3])
        d_gain += d_a * n
        d_bias += d_a
        d_sum = normalized_back(n, inverse, d_a * gain, V, BV)
        d_base += d_sum
        d_matrix += outer(h, d_sum)
        d_h = spread(matrix, d_sum)
    d_base += act_back(act(base, OPT[3]), d_h, OPT[3])
    h = before[1]
    store_vector(d_x, d_base, V, BV)
    store_vector(note, h, V, BV)
    store_vector(note + V, d_gain, V, BV)
    store_vector(note + 2 * V, d_bias, V, BV)
    d_h = spread(load_tile(w, V, V, V, BV, BV), d_base) + OPT[1] * (spread(d_matrix, h) + read(d_matrix, h))
    return OPT[0] * d_matrix, d_h


def of_weights(note: Tensor, d_x: Tensor, key_size: int, value_size: int) -> Tensor:
    """Σ_t h_{t-1} ⊗ d_c, and the sums of what was noted of gain and bias."""
    of_h = torch.einsum("nthi,ntho->hio", note[..., :value_size], d_x)
    return torch.cat([of_h.flatten(1), note[..., value_size:].sum((0, 1))], dim=-1)


TWIN = frame.Twin(
    load=load,
    store=store,
    step=step,
    back=back,
    tiles=lambda BK, BV: BV * BV,
    notes=lambda K, V: 3 * V,
    of_weights=of_weights,
)


def walk(
    inputs: dict[str, Tensor],
    states: States,
    *,
    weights: dict[str, Tensor],
    mask: Tensor | None,
    decay: float,
    eta: float,
    n_steps: int,
    activation: str,
) -> tuple[Tensor, States]:
    """The whole sequence: as rules/walk.py with the rule's step."""
    w, sizes = [weights[name] for name in ("W_h", "gain", "bias")], (inputs["c"].shape[-1],) * 2
    given, numbers = (states["state"], states["h"]), (decay, eta, n_steps, activation == "tanh")
    out, (state, h) = frame.walk("ba_fast_weights", (inputs["c"],), w, given, sizes=sizes, mask=mask, numbers=numbers)
    return out, {"state": state, "h": h}
