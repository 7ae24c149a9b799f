"""The memory of rules/fast_weight_memory.py on a GPU, without the LSTM that programs it (lstm.py).

A token's inputs are s | r | t | β | q | r_1 | ... | r_n, squashed. K = V here; F [K², K] is one tile, its rows padded
in both keys. The numbers: 1 for clipping, and n.
"""

# pyright: reportGeneralTypeIssues=false
# (the bodies of kernels are another language)

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..rules.base import States
from ..rules.fast_weight_memory import LN_EPS
from . import walk as frame
from .cells import load_vector, normalized, normalized_back, outer, read, spread, store_vector, write, write_back

EPS = tl.constexpr(LN_EPS)


@triton.jit
def places(K, BK: tl.constexpr):
    """Where the numbers of F stand, and which are there."""
    row, column = tl.arange(0, BK * BK)[:, None], tl.arange(0, BK)[None, :]
    a, b = row // BK, row % BK
    return (a * K + b) * K + column, (a < K) & (b < K) & (column < K)


@triton.jit
def load(s, K, V, BK: tl.constexpr, BV: tl.constexpr):
    """F."""
    at, there = places(K, BK)
    return (tl.load(s + at, mask=there, other=0.0),)


@triton.jit
def store(s, state, K, V, BK: tl.constexpr, BV: tl.constexpr):
    at, there = places(K, BK)
    tl.store(s + at, state[0], mask=there)


@triton.jit
def pair(a, b, BK: tl.constexpr):
    """vec(a bᵀ)"""
    return tl.reshape(outer(a, b), [BK * BK])


@triton.jit
def unpair(d_pair, a, b, BK: tl.constexpr):
    """Gradients of a and b from that of vec(a bᵀ)."""
    d_outer = tl.reshape(d_pair, [BK, BK])
    return spread(d_outer, b), read(d_outer, a)


@triton.jit
def association(x, K, BK: tl.constexpr):
    """s, r, t and β."""
    return load_vector(x, K, BK), load_vector(x + K, K, BK), load_vector(x + 2 * K, K, BK), tl.load(x + 3 * K)


@triton.jit
def shrinking(memory, CLIP: tl.constexpr):
    """1 / max(1, ‖F‖)"""
    factor = 1.0
    if CLIP == 1:
        square = tl.sum(tl.sum(memory * memory, 1), 0)
        factor = tl.where(square > 1.0, tl.rsqrt(tl.maximum(square, 1.0)), 1.0)
    return factor


@triton.jit
def answered(memory, asked, K, BK: tl.constexpr, READS: tl.constexpr):
    """q after some reads, of [q; r_1; ...] = asked."""
    q = load_vector(asked, K, BK)
    for i in tl.static_range(READS):
        q, _ = normalized(read(memory, pair(q, load_vector(asked + (1 + i) * K, K, BK), BK)), K, EPS, BK)
    return q


@triton.jit
def step(state, x, w, K, V, BK: tl.constexpr, BV: tl.constexpr, OPT: tl.constexpr):
    s, r, t, beta = association(x, K, BK)
    key = pair(s, r, BK)
    memory = write(state[0], key, key, t, beta)
    memory *= shrinking(memory, OPT[0])
    return (memory,), answered(memory, x + 3 * K + 1, K, BK, OPT[1])


@triton.jit
def back(before, d_state, d_out, x, w, d_x, note, K, V, BK: tl.constexpr, BV: tl.constexpr, OPT: tl.constexpr):
    s, r, t, beta = association(x, K, BK)
    key = pair(s, r, BK)
    memory = write(before[0], key, key, t, beta)
    factor = shrinking(memory, OPT[0])
    memory *= factor
    asked, d_asked = x + 3 * K + 1, d_x + 3 * K + 1
    d_memory, d_q = d_state[0], d_out
    reads: tl.constexpr = OPT[1]
    for i in tl.static_range(reads):
        q, r_i = answered(memory, asked, K, BK, reads - 1 - i), load_vector(asked + (reads - i) * K, K, BK)
        n, inverse = normalized(read(memory, pair(q, r_i, BK)), K, EPS, BK)
        d_read = normalized_back(n, inverse, d_q, K, BK)
        d_memory += outer(pair(q, r_i, BK), d_read)
        d_q, d_r_i = unpair(spread(memory, d_read), q, r_i, BK)
        store_vector(d_asked + (reads - i) * K, d_r_i, K, BK)
    store_vector(d_asked, d_q, K, BK)
    if OPT[0] == 1:
        along = tl.where(factor < 1.0, tl.sum(tl.sum(d_memory * memory, 1), 0), 0.0)
        d_memory = factor * (d_memory - along * memory)
    d_memory, d_k, d_e, d_t, d_beta = write_back(before[0], key, key, t, beta, d_memory)
    d_s, d_r = unpair(d_k + d_e, s, r, BK)
    store_vector(d_x, d_s, K, BK)
    store_vector(d_x + K, d_r, K, BK)
    store_vector(d_x + 2 * K, d_t, K, BK)
    tl.store(d_x + 3 * K, d_beta)
    return (d_memory,)


TWIN = frame.Twin(
    load=load,
    store=store,
    step=step,
    back=back,
    tiles=lambda BK, BV: BK * BK * BK,
)


def walk(
    inputs: dict[str, Tensor],
    states: States,
    *,
    weights: dict[str, Tensor],
    mask: Tensor | None,
    clip: bool,
    n_reads: int,
    **programmed: Any,
) -> tuple[Tensor, States]:
    """The whole sequence: as rules/walk.py with the step of the memory."""
    x, sizes = [inputs[name] for name in ("s", "r", "t", "beta", "q", "r_i")], (inputs["t"].shape[-1],) * 2
    out, (state,) = frame.walk(
        "fast_weight_memory", x, (), (states["state"],), sizes=sizes, mask=mask, numbers=(clip, n_reads)
    )
    return out, {"state": state}
