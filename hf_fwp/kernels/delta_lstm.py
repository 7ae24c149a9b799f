"""The recurrent part of rules/delta_lstm.py on a GPU.

A token's inputs are z | k | v | β, each of the gates i, u, o side by side, with k and β squashed.
"""

# pyright: reportGeneralTypeIssues=false
# (the bodies of kernels are another language)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..rules.base import States
from ..rules.delta_lstm import GATES
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
    write,
    write_back,
)

VARIANTS = ("v1", "v2", "v3", "v4")


@triton.jit
def load(s, K, V, BK: tl.constexpr, BV: tl.constexpr):
    """R of the three gates, h and c."""
    r_i, r_u = load_tile(s, V, V, V, BV, BV), load_tile(s + V * V, V, V, V, BV, BV)
    r_o, s = load_tile(s + 2 * V * V, V, V, V, BV, BV), s + 3 * V * V
    return r_i, r_u, r_o, load_vector(s, V, BV), load_vector(s + V, V, BV)


@triton.jit
def store(s, state, K, V, BK: tl.constexpr, BV: tl.constexpr):
    r_i, r_u, r_o, h, c = state
    store_tile(s, r_i, V, V, V, BV, BV)
    store_tile(s + V * V, r_u, V, V, V, BV, BV)
    store_tile(s + 2 * V * V, r_o, V, V, V, BV, BV)
    store_vector(s + 3 * V * V, h, V, BV)
    store_vector(s + 3 * V * V + V, c, V, BV)


@triton.jit
def token(x, gate, V, BV: tl.constexpr):
    """z, k, v and β of one gate."""
    x += gate * V
    k, v = load_vector(x + 3 * V, V, BV), load_vector(x + 6 * V, V, BV)
    return load_vector(x, V, BV), k, v, tl.load(x + 9 * V - gate * (V - 1))


@triton.jit
def updated(matrix, x, gate, V, BV: tl.constexpr):
    """z of one gate, and its R after the write."""
    z, k, v, beta = token(x, gate, V, BV)
    return z, write(matrix, k, k, v, beta)


@triton.jit
def gates(a_i, a_u, a_o, VARIANT: tl.constexpr):
    """i, u and o of what the gates read."""
    u = a_u
    if VARIANT != 4:
        u = sigmoid(a_u)
    return sigmoid(a_i), u, sigmoid(a_o)


@triton.jit
def step(state, x, w, K, V, BK: tl.constexpr, BV: tl.constexpr, OPT: tl.constexpr):
    r_i, r_u, r_o, h, c = state
    s = h
    if OPT[0] != 1:
        s = softmax(h, V, BV)
    z_i, r_i = updated(r_i, x, 0, V, BV)
    z_u, r_u = updated(r_u, x, 1, V, BV)
    z_o, r_o = updated(r_o, x, 2, V, BV)
    i, u, o = gates(z_i + read(r_i, s), z_u + read(r_u, s), z_o + read(r_o, s), OPT[0])
    c = i * u + (1.0 - i) * c
    h = o * c
    if OPT[0] == 1:
        h = softmax(h, V, BV)
    if OPT[0] == 3:
        h += z_u
    return (r_i, r_u, r_o, h, c), h


@triton.jit
def gate_back(matrix, d_matrix, s, d_a, d_z, x, d_x, gate, V, BV: tl.constexpr):
    """Gradients of R and s from that of what a gate has read, and those of the gate's inputs stored."""
    _, k, v, beta = token(x, gate, V, BV)
    d_s = spread(write(matrix, k, k, v, beta), d_a)
    d_matrix, d_k, d_e, d_v, d_beta = write_back(matrix, k, k, v, beta, d_matrix + outer(s, d_a))
    d_x += gate * V
    store_vector(d_x, d_z, V, BV)
    store_vector(d_x + 3 * V, d_k + d_e, V, BV)
    store_vector(d_x + 6 * V, d_v, V, BV)
    tl.store(d_x + 9 * V - gate * (V - 1), d_beta)
    return d_matrix, d_s


@triton.jit
def back(before, d_state, d_out, x, w, d_x, note, K, V, BK: tl.constexpr, BV: tl.constexpr, OPT: tl.constexpr):
    r_i, r_u, r_o, h, c = before
    d_i_matrix, d_u_matrix, d_o_matrix, d_h, d_c = d_state
    d_h += d_out
    s = h
    if OPT[0] != 1:
        s = softmax(h, V, BV)
    z_i, after_i = updated(r_i, x, 0, V, BV)
    z_u, after_u = updated(r_u, x, 1, V, BV)
    z_o, after_o = updated(r_o, x, 2, V, BV)
    i, u, o = gates(z_i + read(after_i, s), z_u + read(after_u, s), z_o + read(after_o, s), OPT[0])
    new_c = i * u + (1.0 - i) * c
    d_beside = d_h * 0.0
    if OPT[0] == 3:
        d_beside = d_h
    if OPT[0] == 1:
        d_h = softmax_back(softmax(o * new_c, V, BV), d_h)
    d_c += o * d_h
    d_a_i, d_a_u = (u - c) * d_c * i * (1.0 - i), i * d_c
    if OPT[0] != 4:
        d_a_u *= u * (1.0 - u)
    d_a_o = new_c * d_h * o * (1.0 - o)
    d_i_matrix, d_s_i = gate_back(r_i, d_i_matrix, s, d_a_i, d_a_i, x, d_x, 0, V, BV)
    d_u_matrix, d_s_u = gate_back(r_u, d_u_matrix, s, d_a_u, d_a_u + d_beside, x, d_x, 1, V, BV)
    d_o_matrix, d_s_o = gate_back(r_o, d_o_matrix, s, d_a_o, d_a_o, x, d_x, 2, V, BV)
    d_s = d_s_i + d_s_u + d_s_o
    if OPT[0] != 1:
        d_s = softmax_back(s, d_s)
    return d_i_matrix, d_u_matrix, d_o_matrix, d_s, (1.0 - i) * d_c


TWIN = frame.Twin(
    load=load,
    store=store,
    step=step,
    back=back,
    tiles=lambda BK, BV: 3 * BV * BV,
)


def walk(
    inputs: dict[str, Tensor], states: States, *, weights: dict[str, Tensor], mask: Tensor | None, variant: str
) -> tuple[Tensor, States]:
    """The whole sequence: as rules/walk.py with the rule's recurrent step."""
    k = inputs["k_r"].unflatten(-1, (GATES, -1)).softmax(-1)
    x = inputs["z"], k, inputs["v_r"], inputs["b_r"].sigmoid()
    names, number = ("recurrent_state", "h", "c"), 1.0 + VARIANTS.index(variant)
    out, final = frame.walk(
        "delta_lstm", x, (), [states[name] for name in names], sizes=(k.shape[-1],) * 2, mask=mask, numbers=(number,)
    )
    return out, dict(zip(names, final, strict=True))
