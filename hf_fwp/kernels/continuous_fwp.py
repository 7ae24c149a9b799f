"""The learning rules of rules/continuous_fwp.py that no chunk serves, on a GPU: Oja's, and delta_post_tanh.

A token's inputs are q | k | v | rate: q after its softmax, for Oja's rule the raw k and tanh(v), for delta_post_tanh k
after its softmax and the raw v. The number: 1 for Oja's rule.
"""

# pyright: reportGeneralTypeIssues=false
# (the bodies of kernels are another language)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..rules.base import States
from ..rules.continuous_fwp import WALKED, rate
from . import walk as frame
from .cells import load_vector, outer, read, softmax, softmax_back, spread, store_vector, tanh
from .fwp_1991 import load, store


@triton.jit
def token(x, K, V, BK: tl.constexpr, BV: tl.constexpr):
    """q, k, v and the rate."""
    q, k, v = load_vector(x, K, BK), load_vector(x + K, K, BK), load_vector(x + 2 * K, V, BV)
    return q, k, v, tl.load(x + 2 * K + V)


@triton.jit
def bound(matrix, k, v, K, BK: tl.constexpr, OJA: tl.constexpr):
    """The key, and what is bound to it."""
    if OJA == 1:
        k = softmax(k - spread(matrix, v), K, BK)
    else:
        v = tanh(v - read(matrix, k))
    return k, v


@triton.jit
def step(state, x, w, K, V, BK: tl.constexpr, BV: tl.constexpr, OPT: tl.constexpr):
    q, k, v, beta = token(x, K, V, BK, BV)
    key, value = bound(state[0], k, v, K, BK, OPT[0])
    matrix = state[0] + outer(key, beta * value)
    return (matrix,), read(matrix, q)


@triton.jit
def back(before, d_state, d_out, x, w, d_x, note, K, V, BK: tl.constexpr, BV: tl.constexpr, OPT: tl.constexpr):
    matrix = before[0]
    q, k, v, beta = token(x, K, V, BK, BV)
    key, value = bound(matrix, k, v, K, BK, OPT[0])
    d_q = spread(matrix + outer(key, beta * value), d_out)
    d_matrix = d_state[0] + outer(q, d_out)
    d_key, d_written = spread(d_matrix, beta * value), read(d_matrix, key)
    if OPT[0] == 1:
        d_k = softmax_back(key, d_key)
        d_v = beta * d_written - read(matrix, d_k)
        d_matrix -= outer(d_k, v)
    else:
        d_v = beta * d_written * (1.0 - value * value)
        d_k = d_key - spread(matrix, d_v)
        d_matrix -= outer(k, d_v)
    store_vector(d_x, d_q, K, BK)
    store_vector(d_x + K, d_k, K, BK)
    store_vector(d_x + 2 * K, d_v, V, BV)
    tl.store(d_x + 2 * K + V, tl.sum(d_written * value, 0))
    return (d_matrix,)


TWIN = frame.Twin(
    load=load,
    store=store,
    step=step,
    back=back,
    tiles=lambda BK, BV: BK * BV,
)


def walk(
    inputs: dict[str, Tensor],
    states: States,
    *,
    weights: dict[str, Tensor],
    mask: Tensor | None,
    learning_rule: str,
    time_step: float,
    solver: str,
) -> tuple[Tensor, States]:
    """The whole sequence: as rules/walk.py with the rule's step."""
    q, k, v, oja = inputs["q"].softmax(-1), inputs["k"], inputs["v"], WALKED.index(learning_rule)
    k, v = (k, v.tanh()) if oja else (k.softmax(-1), v)
    lasting = inputs["dt"][..., 0] if "dt" in inputs else time_step
    beta = rate(inputs["b"], k, lasting, solver=solver, learning_rule=learning_rule)
    x, sizes = (q, k, v, beta[..., None]), (k.shape[-1], v.shape[-1])
    out, (state,) = frame.walk("continuous_fwp", x, (), (states["state"],), sizes=sizes, mask=mask, numbers=(oja,))
    return out, {"state": state}
