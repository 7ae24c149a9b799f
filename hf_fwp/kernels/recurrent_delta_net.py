"""rules/recurrent_delta_net.py on a GPU. A token's inputs are q | k | v | b, a head's weights R_q | R_k | R_v | r_b.

What R adds to an input has the gradient of that input; so the gradient of R is the sum over tokens of h ⊗ (gradient of
the inputs), and the backward notes h.
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
from .cells import (
    load_tile,
    load_vector,
    outer,
    read,
    sigmoid,
    softmax,
    softmax_back,
    spread,
    store_tile,
    store_vector,
    tanh,
    write,
    write_back,
)


@triton.jit
def load(s, K, V, BK: tl.constexpr, BV: tl.constexpr):
    """S and y."""
    return load_tile(s, K, V, V, BK, BV), load_vector(s + K * V, V, BV)


@triton.jit
def store(s, state, K, V, BK: tl.constexpr, BV: tl.constexpr):
    memory, y = state
    store_tile(s, memory, K, V, V, BK, BV)
    store_vector(s + K * V, y, V, BV)


@triton.jit
def weights(w, K, V, BK: tl.constexpr, BV: tl.constexpr):
    """R_q, R_k, R_v and r_b."""
    r_q, r_k = load_tile(w, V, K, K, BV, BK), load_tile(w + V * K, V, K, K, BV, BK)
    return r_q, r_k, load_tile(w + 2 * V * K, V, V, V, BV, BV), load_vector(w + 2 * V * K + V * V, V, BV)


@triton.jit
def programmed(h, x, w, K, V, BK: tl.constexpr, BV: tl.constexpr):
    """q, k, v and β of this token."""
    r_q, r_k, r_v, r_b = weights(w, K, V, BK, BV)
    q = softmax(load_vector(x, K, BK) + read(r_q, h), K, BK)
    k = softmax(load_vector(x + K, K, BK) + read(r_k, h), K, BK)
    v = load_vector(x + 2 * K, V, BV) + read(r_v, h)
    return q, k, v, sigmoid(tl.load(x + 2 * K + V) + tl.sum(r_b * h, 0))


@triton.jit
def step(state, x, w, K, V, BK: tl.constexpr, BV: tl.constexpr, OPT: tl.constexpr):
    memory, y = state
    q, k, v, beta = programmed(tanh(y), x, w, K, V, BK, BV)
    memory = write(memory, k, k, v, beta)
    y = read(memory, q)
    return (memory, y), y


@triton.jit
def back(before, d_state, d_out, x, w, d_x, note, K, V, BK: tl.constexpr, BV: tl.constexpr, OPT: tl.constexpr):
    memory, y = before
    d_memory, d_y = d_state
    d_y += d_out
    h = tanh(y)
    q, k, v, beta = programmed(h, x, w, K, V, BK, BV)
    d_q = softmax_back(q, spread(write(memory, k, k, v, beta), d_y))
    d_memory, d_k, d_e, d_v, d_beta = write_back(memory, k, k, v, beta, d_memory + outer(q, d_y))
    d_k = softmax_back(k, d_k + d_e)
    d_b = d_beta * beta * (1.0 - beta)
    store_vector(d_x, d_q, K, BK)
    store_vector(d_x + K, d_k, K, BK)
    store_vector(d_x + 2 * K, d_v, V, BV)
    tl.store(d_x + 2 * K + V, d_b)
    store_vector(note, h, V, BV)
    r_q, r_k, r_v, r_b = weights(w, K, V, BK, BV)
    d_h = spread(r_q, d_q) + spread(r_k, d_k) + spread(r_v, d_v) + r_b * d_b
    return d_memory, d_h * (1.0 - h * h)


def of_weights(note: Tensor, d_x: Tensor, key_size: int, value_size: int) -> Tensor:
    """Σ_t h ⊗ d_x, part by part."""
    parts = d_x.split((key_size, key_size, value_size, 1), dim=-1)
    return torch.cat([torch.einsum("nthi,ntho->hio", note, part).flatten(1) for part in parts], dim=-1)


TWIN = frame.Twin(
    load=load,
    store=store,
    step=step,
    back=back,
    notes=lambda K, V: V,
    tiles=lambda BK, BV: BK * BV,
    of_weights=of_weights,
)


def walk(
    inputs: dict[str, Tensor], states: States, *, weights: dict[str, Tensor], mask: Tensor | None, **options: Any
) -> tuple[Tensor, States]:
    """The whole sequence: as rules/walk.py with the rule's step."""
    x, w = [inputs[name] for name in "qkvb"], [weights[name] for name in ("R_q", "R_k", "R_v", "r_b")]
    sizes = inputs["k"].shape[-1], inputs["v"].shape[-1]
    out, (state, y) = frame.walk("recurrent_delta_net", x, w, (states["state"], states["y"]), sizes=sizes, mask=mask)
    return out, {"state": state, "y": y}
