"""The recurrent part of rules/delta_rnn.py on a GPU. A token's inputs are z | k | v | β, with k and β squashed."""

# pyright: reportGeneralTypeIssues=false
# (the bodies of kernels are another language)

from __future__ import annotations

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
    softmax,
    softmax_back,
    spread,
    store_tile,
    store_vector,
    write,
    write_back,
)


@triton.jit
def load(s, K, V, BK: tl.constexpr, BV: tl.constexpr):
    """R and y."""
    return load_tile(s, V, V, V, BV, BV), load_vector(s + V * V, V, BV)


@triton.jit
def store(s, state, K, V, BK: tl.constexpr, BV: tl.constexpr):
    matrix, y = state
    store_tile(s, matrix, V, V, V, BV, BV)
    store_vector(s + V * V, y, V, BV)


@triton.jit
def token(x, V, BV: tl.constexpr):
    """z, k, v and β."""
    k, v = load_vector(x + V, V, BV), load_vector(x + 2 * V, V, BV)
    return load_vector(x, V, BV), k, v, tl.load(x + 3 * V)


@triton.jit
def step(state, x, w, K, V, BK: tl.constexpr, BV: tl.constexpr, OPT: tl.constexpr):
    matrix, y = state
    z, k, v, beta = token(x, V, BV)
    matrix = write(matrix, k, k, v, beta)
    y = softmax(z + read(matrix, y), V, BV) if OPT[0] == 1 else z + read(matrix, softmax(y, V, BV))
    return (matrix, y), y


@triton.jit
def back(before, d_state, d_out, x, w, d_x, note, K, V, BK: tl.constexpr, BV: tl.constexpr, OPT: tl.constexpr):
    matrix, y = before
    d_matrix, d_y = d_state
    d_y += d_out
    z, k, v, beta = token(x, V, BV)
    after = write(matrix, k, k, v, beta)
    if OPT[0] == 1:
        d_z = softmax_back(softmax(z + read(after, y), V, BV), d_y)
        d_matrix += outer(y, d_z)
        d_y = spread(after, d_z)
    else:
        d_z, s = d_y, softmax(y, V, BV)
        d_matrix += outer(s, d_z)
        d_y = softmax_back(s, spread(after, d_z))
    d_matrix, d_k, d_e, d_v, d_beta = write_back(matrix, k, k, v, beta, d_matrix)
    store_vector(d_x, d_z, V, BV)
    store_vector(d_x + V, d_k + d_e, V, BV)
    store_vector(d_x + 2 * V, d_v, V, BV)
    tl.store(d_x + 3 * V, d_beta)
    return d_matrix, d_y


TWIN = frame.Twin(
    load=load,
    store=store,
    step=step,
    back=back,
    tiles=lambda BK, BV: BV * BV,
)


def walk(
    inputs: dict[str, Tensor], states: States, *, weights: dict[str, Tensor], mask: Tensor | None, variant: str
) -> tuple[Tensor, States]:
    """The whole sequence: as rules/walk.py with the rule's recurrent step."""
    x = inputs["z"], inputs["k_r"].softmax(-1), inputs["v_r"], inputs["b_r"].sigmoid()
    sizes, number = (x[0].shape[-1],) * 2, float(variant == "v1")
    out, (matrix, y) = frame.walk(
        "delta_rnn", x, (), (states["recurrent_state"], states["y"]), sizes=sizes, mask=mask, numbers=(number,)
    )
    return out, {"recurrent_state": matrix, "y": y}
