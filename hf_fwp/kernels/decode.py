"""One token of the linear class in one launch: what generate() runs on a GPU.

    S̃ = Diag(exp(g)) S;   r = β (v - S̃ᵀ e);   S ← S̃ + k ⊗ r;   o = scale · Sᵀ q

e = k (delta rules), 0 (sum rule), a vector of its own, or a gate on k. g is a number per head, or per key channel.
The letters are those of rules/linear_class.py and rules/general.py.
A program holds some columns of one state, [K, BLOCK_V]: a column is corrected and read without the others, so the state
is read once and written once, in float32.
Nothing is read on the host and the launch depends on shapes alone: a step can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rules.blocks import L2NORM_EPS

EPS = tl.constexpr(L2NORM_EPS)
TILE = 8192  # numbers of a state that one program holds: 64 registers of each of 128 threads
WARPS = 4


@triton.jit
def _load_row(x, row, offsets, size, valid, L2NORM: tl.constexpr):
    """x[row, offsets] in float32, 0 beyond the size or where nothing is valid; of length 1 with L2NORM."""
    value = tl.load(x + row * size + offsets, mask=(offsets < size) & valid, other=0.0).to(tl.float32)
    if L2NORM:
        value = value * tl.rsqrt(tl.sum(value * value, 0) + EPS)
    return value


@triton.jit
def _decode_kernel(
    q,
    k,
    v,
    beta,
    g,
    along,
    mask,
    before,
    after,
    out,
    scale,
    HEADS: tl.constexpr,
    VALUE_HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    SHARE: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ERASE: tl.constexpr,
    L2NORM: tl.constexpr,
    ALONG: tl.constexpr,
    HAS_BETA: tl.constexpr,
    GK: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_STATE: tl.constexpr,
):
    """Program (n · HV + head, tile of V). `before` and `after` may be the same memory. g has GK channels, 0: there is
    none; with ALONG = 1, e is given, with 2 a gate on k."""
    pair = tl.program_id(0).to(tl.int64)
    n, head = pair // VALUE_HEADS, pair % VALUE_HEADS
    rows = tl.arange(0, BLOCK_K)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    key_row = n * HEADS + head // (VALUE_HEADS // HEADS)
    valid = True
    if HAS_MASK:
        valid = tl.load(mask + n) != 0

    key = _load_row(k, key_row, rows, K, valid, L2NORM)
    write = _load_row(v, pair, columns, V, valid, False)
    at = pair * (K * V) + rows[:, None] * V + columns[None, :]
    here = (rows < K)[:, None] & (columns < V)[None, :]
    state = tl.load(before + at, mask=here & HAS_STATE, other=0.0)
    decayed = state
    if GK == 1:
        decayed = state * tl.exp(tl.load(g + pair, mask=valid, other=0.0).to(tl.float32))
    elif GK > 1:
        decayed = state * tl.exp(_load_row(g, pair, rows, K, valid, False))[:, None]
    if ERASE:
        erase = key
        if ALONG > 0:
            erase = _load_row(along, pair, rows, K, valid, False)
        if ALONG == 2:
            erase = erase * key
        write = write - tl.sum(erase[:, None] * decayed, 0)
    if HAS_BETA:
        write = write * tl.load(beta + pair, mask=valid, other=0.0).to(tl.float32)
    new = decayed + key[:, None] * write[None, :]
    if HAS_MASK:
        new = tl.where(valid, new, state)  # a state that is not finite would turn 0 · write into NaN
    tl.store(after + at, new, mask=here)

    for i in range(QUERIES):
        query_row = key_row if SHARE else pair * QUERIES + i
        query = _load_row(q, query_row, rows, K, valid, L2NORM) * scale
        read = tl.sum(query[:, None] * new, 0)
        if HAS_MASK:
            read = tl.where(valid, read, 0.0)
        tl.store(out + (pair * QUERIES + i) * V + columns, read.to(out.dtype.element_ty), mask=columns < V)


def decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    beta: Tensor | None,
    g: Tensor | None,
    state: Tensor | None,
    mask: Tensor | None,
    scale: float,
    erase: bool,
    l2norm: bool,
    in_place: bool,
    along: Tensor | None = None,
    gated: bool = False,
) -> tuple[Tensor, Tensor]:
    """One token per row: q [B,1,HQ,K], k [B,1,H,K], v [B,1,HV,V]; beta [B,1,HV]; g [B,1,HV] or [B,1,HV,K]; mask [B,1];
    state [B,HV,K,V]. What is erased lies along k, or `along` [B,1,HV,K], or with `gated` their product.

    Returns out [B, 1, HV or HQ, V] and the state in float32, which is the given one, overwritten,
    with `in_place`. No gradients.
    """
    arguments = (q, k, v, beta, g, along, mask, scale, erase, gated, l2norm)
    if in_place and state is not None and state.is_contiguous():
        return decode_in_place(state, *arguments), state
    out, new = decode_anew(state, *arguments)
    if in_place and state is not None:
        return out, state.copy_(new)
    return out, new


def new_out(q: Tensor, v: Tensor) -> Tensor:
    return v.new_empty(v.shape[0], 1, max(q.shape[2], v.shape[2]), v.shape[3])


@torch.library.custom_op("hf_fwp::decode_in_place", mutates_args=("state",))
def decode_in_place(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    g: Tensor | None,
    along: Tensor | None,
    mask: Tensor | None,
    scale: float,
    erase: bool,
    gated: bool,
    l2norm: bool,
) -> Tensor:
    """The reads; `state` is overwritten."""
    out = new_out(q, v)
    _launch(state, state, out, q, k, v, beta, g, along, mask, scale, erase, gated, l2norm)
    return out


@decode_in_place.register_fake
def _(state, q, k, v, beta, g, along, mask, scale, erase, gated, l2norm):
    return new_out(q, v)


@torch.library.custom_op("hf_fwp::decode_anew", mutates_args=())
def decode_anew(
    state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    g: Tensor | None,
    along: Tensor | None,
    mask: Tensor | None,
    scale: float,
    erase: bool,
    gated: bool,
    l2norm: bool,
) -> tuple[Tensor, Tensor]:
    """The reads and a new state; without a state it starts from zero."""
    out, after = new_out(q, v), _new_state(k, v)
    before = state if state is None else state.contiguous()
    _launch(before, after, out, q, k, v, beta, g, along, mask, scale, erase, gated, l2norm)
    return out, after


@decode_anew.register_fake
def _(state, q, k, v, beta, g, along, mask, scale, erase, gated, l2norm):
    return new_out(q, v), _new_state(k, v)


def _new_state(k: Tensor, v: Tensor) -> Tensor:
    return v.new_empty(v.shape[0], v.shape[2], k.shape[3], v.shape[3], dtype=torch.float32)


def _launch(
    before: Tensor | None,
    after: Tensor,
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    g: Tensor | None,
    along: Tensor | None,
    mask: Tensor | None,
    scale: float,
    erase: bool,
    gated: bool,
    l2norm: bool,
) -> None:
    batch, _, heads, K = k.shape
    value_heads, V = v.shape[2:]
    block_k, block_v = blocks(K, V)
    given = [x if x is None else x.contiguous() for x in (q, k, v, beta, g, along, mask)]
    with torch.accelerator.device_index(v.device.index):
        launch: Any = _decode_kernel[(batch * value_heads, -(-V // block_v))]
        launch(
            *(after if x is None else x for x in given),  # any address: what is not there is not read
            after if before is None else before,
            after,
            out,
            scale,
            HEADS=heads,
            VALUE_HEADS=value_heads,
            QUERIES=out.shape[2] // value_heads,
            SHARE=q.shape[2] == heads,
            K=K,
            V=V,
            BLOCK_K=block_k,
            BLOCK_V=block_v,
            ERASE=erase,
            ALONG=0 if along is None else 1 + gated,
            L2NORM=l2norm,
            HAS_BETA=beta is not None,
            GK=0 if g is None else 1 if g.ndim == 3 else g.shape[3],
            HAS_MASK=mask is not None,
            HAS_STATE=before is not None,
            num_warps=WARPS,
        )


def blocks(K: int, V: int) -> tuple[int, int]:
    """(BLOCK_K, BLOCK_V): all of K in one program, as many columns as TILE leaves."""
    block_k, all_columns = (1 << (size - 1).bit_length() for size in (K, V))
    return block_k, min(all_columns, max(TILE // block_k, 1), 32)
