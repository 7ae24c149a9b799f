"""rules/srwm.py on a GPU. A token's input is x; the state is the whole matrix W_t, its blocks y | q | k | β as tiles.

So the gradient of the learned start value is that of the state, and no weight comes into the kernel.
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
from ..rules.sequential import LARGEST, in_pieces
from ..rules.srwm import RATES
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


@triton.jit
def load(s, K, V, BK: tl.constexpr, BV: tl.constexpr):
    """The four blocks."""
    width = V + 2 * K + 4
    w_y, w_q = load_tile(s, K, V, width, BK, BV), load_tile(s + V, K, K, width, BK, BK)
    return w_y, w_q, load_tile(s + V + K, K, K, width, BK, BK), load_tile(s + V + 2 * K, K, 4, width, BK, 4)


@triton.jit
def store(s, state, K, V, BK: tl.constexpr, BV: tl.constexpr):
    w_y, w_q, w_k, w_b = state
    width = V + 2 * K + 4
    store_tile(s, w_y, K, V, width, BK, BV)
    store_tile(s + V, w_q, K, K, width, BK, BK)
    store_tile(s + V + K, w_k, K, K, width, BK, BK)
    store_tile(s + V + 2 * K, w_b, K, 4, width, BK, 4)


@triton.jit
def programmed(state, x, K, BK: tl.constexpr):
    """q, k and the four rates, which the matrix gives itself."""
    _, w_q, w_k, w_b = state
    return softmax(read(w_q, x), K, BK), softmax(read(w_k, x), K, BK), sigmoid(read(w_b, x))


@triton.jit
def rate(beta, block):
    """One of the four."""
    return tl.sum(tl.where(tl.arange(0, 4) == block, beta, 0.0), 0)


@triton.jit
def step(state, x, w, K, V, BK: tl.constexpr, BV: tl.constexpr, OPT: tl.constexpr):
    w_y, w_q, w_k, w_b = state
    x = load_vector(x, K, BK)
    y = read(w_y, x)
    q, k, beta = programmed(state, x, K, BK)
    # Wᵀq - Wᵀk is what a write erases at the key k - q
    w_y = write(w_y, k, k - q, 0.0, rate(beta, 0))
    w_q = write(w_q, k, k - q, 0.0, rate(beta, 1))
    w_k = write(w_k, k, k - q, 0.0, rate(beta, 2))
    w_b = write(w_b, k, k - q, 0.0, rate(beta, 3))
    return (w_y, w_q, w_k, w_b), y


@triton.jit
def back(before, d_state, d_out, x, w, d_x, note, K, V, BK: tl.constexpr, BV: tl.constexpr, OPT: tl.constexpr):
    w_y, w_q, w_k, w_b = before
    d_y_block, d_q_block, d_k_block, d_b_block = d_state
    x = load_vector(x, K, BK)
    q, k, beta = programmed(before, x, K, BK)
    e = k - q
    d_y_block, d_k_y, d_e_y, _, d_rate_y = write_back(w_y, k, e, 0.0, rate(beta, 0), d_y_block)
    d_q_block, d_k_q, d_e_q, _, d_rate_q = write_back(w_q, k, e, 0.0, rate(beta, 1), d_q_block)
    d_k_block, d_k_k, d_e_k, _, d_rate_k = write_back(w_k, k, e, 0.0, rate(beta, 2), d_k_block)
    d_b_block, d_k_b, d_e_b, _, d_rate_b = write_back(w_b, k, e, 0.0, rate(beta, 3), d_b_block)
    d_e = d_e_y + d_e_q + d_e_k + d_e_b
    d_a_q = softmax_back(q, -d_e)
    d_a_k = softmax_back(k, d_k_y + d_k_q + d_k_k + d_k_b + d_e)
    block = tl.arange(0, 4)
    d_beta = tl.where(block < 2, tl.where(block == 0, d_rate_y, d_rate_q), tl.where(block == 2, d_rate_k, d_rate_b))
    d_a_b = d_beta * beta * (1.0 - beta)
    store_vector(d_x, spread(w_y, d_out) + spread(w_q, d_a_q) + spread(w_k, d_a_k) + spread(w_b, d_a_b), K, BK)
    return (
        d_y_block + outer(x, d_out),
        d_q_block + outer(x, d_a_q),
        d_k_block + outer(x, d_a_k),
        d_b_block + outer(x, d_a_b),
    )


TWIN = frame.Twin(
    load=load,
    store=store,
    step=step,
    back=back,
    tiles=lambda BK, BV: BK * (BV + 2 * BK),
)


def walk(
    inputs: dict[str, Tensor],
    states: States,
    *,
    weights: dict[str, Tensor],
    mask: Tensor | None,
    input_softmax: bool,
    **init: Any,
) -> tuple[Tensor, States]:
    """The whole sequence: as rules/walk.py with the rule's step from a shift."""
    x = inputs["x"].softmax(-1) if input_softmax else inputs["x"]
    begin, own = weights["W_0"] + states["state"], 2 * x.shape[-1] + RATES
    size = begin.shape[-1] - own
    # nothing depends on the columns of y: pieces of them are heads, each with a copy of the blocks q, k and β
    pieces = -(-size // LARGEST)
    columns = in_pieces(begin[..., :size], pieces).movedim(3, 2)
    copies = begin[:, :, None, :, size:].expand(-1, -1, pieces, -1, -1)
    start = torch.cat([columns, copies], dim=-1).flatten(1, 2)
    sizes = x.shape[-1], columns.shape[-1]
    out, (final,) = frame.walk("srwm", (x.repeat_interleave(pieces, dim=2),), (), (start,), sizes=sizes, mask=mask)
    # the change, not final - W_0: a shift that nothing changes stays what it is, bit for bit
    of_columns, of_own = (final - start).unflatten(1, (-1, pieces)).split((sizes[1], own), dim=-1)
    change = torch.cat([of_columns.movedim(2, 3).flatten(3)[..., :size], of_own[:, :, 0]], dim=-1)
    return out.unflatten(2, (-1, pieces)).flatten(3)[..., :size], {"state": states["state"] + change}
