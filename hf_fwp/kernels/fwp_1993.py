"""rules/fwp_1993.py on a GPU.

A token's inputs are x | c with c = W_sᵀ [x; 0; 1]; the kernel's output is h, and o = W_yᵀ h follows outside.
A head's weights are W_h, the rows of W_s that meet h, then W_f and W_t. The numbers: the squash, τ, the start, η.
"""

# pyright: reportGeneralTypeIssues=false
# (the bodies of kernels are another language)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rules.base import States
from ..rules.fwp_1991 import STARTS
from . import walk as frame
from .cells import load_tile, load_vector, outer, read, spread, store_tile, store_vector, tanh
from .fwp_1991 import SQUASHES, squash, squash_back


@triton.jit
def load(s, K, V, BK: tl.constexpr, BV: tl.constexpr):
    """The rows of S that meet x, h and 1; h."""
    s_x, s_h = load_tile(s, K, V, V, BK, BV), load_tile(s + K * V, V, V, V, BV, BV)
    s += K * V + V * V
    return s_x, s_h, load_vector(s, V, BV), load_vector(s + V, V, BV)


@triton.jit
def store(s, state, K, V, BK: tl.constexpr, BV: tl.constexpr):
    s_x, s_h, s_1, h = state
    store_tile(s, s_x, K, V, V, BK, BV)
    store_tile(s + K * V, s_h, V, V, V, BV, BV)
    store_vector(s + K * V + V * V, s_1, V, BV)
    store_vector(s + K * V + V * V + V, h, V, BV)


@triton.jit
def weights(w, K, V, BK: tl.constexpr, BV: tl.constexpr):
    """W_h; the columns of W_f for x, h and 1; W_t."""
    w_h, w, width = load_tile(w, V, V, V, BV, BV), w + V * V, K + V + 1
    f_x, f_h = load_tile(w, V, K, width, BV, BK), load_tile(w + K, V, V, width, BV, BV)
    return w_h, f_x, f_h, load_vector(w + K + V, V, BV, width), load_tile(w + V * width, V, V, V, BV, BV)


@triton.jit
def fired(state, x, w, K, V, BK: tl.constexpr, BV: tl.constexpr, OPT: tl.constexpr):
    """x; h of this token; FROM for x, h and 1; TO."""
    s_x, s_h, s_1, h = state
    w_h, f_x, f_h, f_1, w_t = weights(w, K, V, BK, BV)
    c, x = load_vector(x + K, V, BV), load_vector(x, K, BK)
    a = c + read(w_h, h) + read(OPT[2] + s_x, x) + read(OPT[2] + s_h, h) + OPT[2] + s_1
    h = tl.where(tl.arange(0, BV) < V, tanh(a), 0.0)
    return x, h, tanh(read(f_x, h)), tanh(read(f_h, h)), tanh(tl.sum(f_1 * h, 0)), tanh(read(w_t, h))


@triton.jit
def changed(state, from_x, from_h, from_1, to, OPT: tl.constexpr):
    """S after the write, in three parts."""
    s_x = squash(OPT[2] + state[0] + OPT[3] * outer(from_x, to), OPT[0], OPT[1])
    s_h = squash(OPT[2] + state[1] + OPT[3] * outer(from_h, to), OPT[0], OPT[1])
    return s_x, s_h, squash(OPT[2] + state[2] + OPT[3] * from_1 * to, OPT[0], OPT[1])


@triton.jit
def step(state, x, w, K, V, BK: tl.constexpr, BV: tl.constexpr, OPT: tl.constexpr):
    x, h, from_x, from_h, from_1, to = fired(state, x, w, K, V, BK, BV, OPT)
    s_x, s_h, s_1 = changed(state, from_x, from_h, from_1, to, OPT)
    return (s_x - OPT[2], s_h - OPT[2], s_1 - OPT[2], h), h


@triton.jit
def back(before, d_state, d_out, x, w, d_x, note, K, V, BK: tl.constexpr, BV: tl.constexpr, OPT: tl.constexpr):
    d_s_x, d_s_h, d_s_1, d_h = d_state
    x, h, from_x, from_h, from_1, to = fired(before, x, w, K, V, BK, BV, OPT)
    s_x, s_h, s_1 = changed(before, from_x, from_h, from_1, to, OPT)
    d_s_x = squash_back(s_x, d_s_x, OPT[0], OPT[1])
    d_s_h = squash_back(s_h, d_s_h, OPT[0], OPT[1])
    d_s_1 = squash_back(s_1, d_s_1, OPT[0], OPT[1])
    d_from_x = OPT[3] * spread(d_s_x, to) * (1.0 - from_x * from_x)
    d_from_h = OPT[3] * spread(d_s_h, to) * (1.0 - from_h * from_h)
    d_from_1 = OPT[3] * tl.sum(d_s_1 * to, 0) * (1.0 - from_1 * from_1)
    d_to = OPT[3] * (read(d_s_x, from_x) + read(d_s_h, from_h) + d_s_1 * from_1) * (1.0 - to * to)
    w_h, f_x, f_h, f_1, w_t = weights(w, K, V, BK, BV)
    d_h += d_out + spread(f_x, d_from_x) + spread(f_h, d_from_h) + f_1 * d_from_1 + spread(w_t, d_to)
    d_a = d_h * (1.0 - h * h)
    old_x, old_h, _, h_before = before
    store_vector(d_x, spread(OPT[2] + old_x, d_a), K, BK)
    store_vector(d_x + K, d_a, V, BV)
    store_vector(note, h_before, V, BV)
    store_vector(note + V, h, V, BV)
    store_vector(note + 2 * V, d_from_x, K, BK)
    store_vector(note + 2 * V + K, d_from_h, V, BV)
    tl.store(note + 3 * V + K, d_from_1)
    store_vector(note + 3 * V + K + 1, d_to, V, BV)
    # the start is in the rows beyond V too
    d_h = tl.where(tl.arange(0, BV) < V, spread(w_h, d_a) + spread(OPT[2] + old_h, d_a), 0.0)
    return d_s_x + outer(x, d_a), d_s_h + outer(h_before, d_a), d_s_1 + d_a, d_h


def of_weights(note: Tensor, d_x: Tensor, key_size: int, value_size: int) -> Tensor:
    """Σ_t h_{t-1} ⊗ d_c, h_t ⊗ d_from and h_t ⊗ d_to."""
    before, h, d_from, d_to = note.split((value_size, value_size, key_size + value_size + 1, value_size), dim=-1)
    pairs = (before, d_x[..., key_size:]), (h, d_from), (h, d_to)
    return torch.cat([torch.einsum("nthi,ntho->hio", *pair).flatten(1) for pair in pairs], dim=-1)


TWIN = frame.Twin(
    load=load,
    store=store,
    step=step,
    back=back,
    tiles=lambda BK, BV: (BK + BV) * BV,
    notes=lambda K, V: K + 4 * V + 1,
    of_weights=of_weights,
)


def walk(
    inputs: dict[str, Tensor],
    states: States,
    *,
    weights: dict[str, Tensor],
    mask: Tensor | None,
    squashing: str,
    eta: float,
    tau: float,
) -> tuple[Tensor, States]:
    """The whole sequence: as rules/walk.py with the rule's step."""
    x, value_size = inputs["x"], weights["W_y"].shape[-1]
    w_x, w_h, w_1 = weights["W_s"].split((x.shape[-1], value_size, 1), dim=1)
    c = torch.einsum("hio,nthi->ntho", w_x, x) + w_1[:, 0]
    h, (state, last) = frame.walk(
        "fwp_1993", (x, c), (w_h, weights["W_f"], weights["W_t"]), (states["state"], states["h"]),
        sizes=(x.shape[-1], value_size), mask=mask, numbers=(SQUASHES.index(squashing), tau, STARTS[squashing], eta),
    )  # fmt: skip
    return torch.einsum("hio,nthi->ntho", weights["W_y"], h), {"state": state, "h": last}
