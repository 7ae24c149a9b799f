"""One token of a whole mixer in one launch, from the projections of its hidden state to what o_proj reads.

    q, k, v   short convolution;  q, k: head norm, rotation, bias, feature map, norm
    β = b_max sigmoid(b);   g = -exp(A) softplus(a + d)
    S ← exp(g) S;     S ← S + k ⊗ β (v - Sᵀ e);    o = scale · Sᵀ q              e = k (delta rules) or 0 (sum rule)
    y = gate · RMSNorm(c o)

The letters are those of layer.py. States and what the convolutions remember are overwritten. A program owns one key
head of one sequence and all that hangs on it, so that nobody else reads the history it shifts; without a convolution
nothing is shifted and every state has a program of its own. Nothing is read on the host and the launch depends on
shapes alone: a step can be captured in a CUDA graph.
"""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# (the bodies of kernels are another language)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rules.base import SUM_EPS
from ..rules.blocks import L2NORM_EPS

L2_EPS = tl.constexpr(L2NORM_EPS)
SUM_NORM_EPS = tl.constexpr(SUM_EPS)
FLAGS = 62  # states whose rotation one integer tells
WORD = tl.constexpr(FLAGS)
NUMBERS_PER_WARP = 1024  # 32 registers of every thread hold the state
MOST_WARPS = 32 if torch.version.hip is None else 16  # a program has at most 1024 threads


@triton.jit
def log1p(x):
    """log(1 + x) for x ≥ 0 that keeps the digits of a small x: what 1 + x rounds away is put back as a factor."""
    one_more = 1.0 + x
    kept = one_more - 1.0
    return tl.where(kept == 0.0, x, tl.log(one_more) * (x / tl.where(kept == 0.0, 1.0, kept)))


@triton.jit
def convolved(x, history, weight, n, stride, channels, at, here, CONV: tl.constexpr):
    """y_t = sum_j w_j x_{t-j} at some channels, in float32. `history` holds x_{t-CONV+1} ... x_{t-1} of a sequence."""
    y = tl.load(x + n * channels + at, mask=here, other=0.0).to(tl.float32)
    if CONV > 0:
        y *= tl.load(weight + at * CONV + (CONV - 1), mask=here, other=0.0).to(tl.float32)
        for i in tl.static_range(CONV - 1):
            before = tl.load(history + n * stride + i * channels + at, mask=here, other=0.0).to(tl.float32)
            y += before * tl.load(weight + at * CONV + i, mask=here, other=0.0).to(tl.float32)
    return y


@triton.jit
def shift(x, history, n, stride, channels, at, here, CONV: tl.constexpr):
    """Forget the oldest input and remember the newest."""
    for i in tl.static_range(CONV - 2):
        newer = tl.load(history + n * stride + (i + 1) * channels + at, mask=here)
        tl.store(history + n * stride + i * channels + at, newer, mask=here)
    if CONV > 1:
        now = tl.load(x + n * channels + at, mask=here).to(history.dtype.element_ty)
        tl.store(history + n * stride + (CONV - 2) * channels + at, now, mask=here)


@triton.jit
def mapped(x, here, FEATURE: tl.constexpr, NORM: tl.constexpr):
    """The feature map and the norm that follows it; 0 where there is nothing."""
    if FEATURE == "silu":
        x = x * tl.sigmoid(x)
    if FEATURE == "relu":
        x = tl.maximum(x, 0.0)
    if FEATURE == "elu1":
        x = tl.where(x > 0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))
    x = tl.where(here, x, 0.0)
    if NORM == "l2":
        x = x * tl.rsqrt(tl.sum(x * x, 0) + L2_EPS)
    if NORM == "sum":
        x = x / (tl.sum(x, 0) + SUM_NORM_EPS)
    return x


@triton.jit
def addressed(
    x, history, weight, norm, bias, cos, sin, n, stride, channels, head, owner, rows, turned, rotary_stride, eps,
    K: tl.constexpr, ROTARY: tl.constexpr, CONV: tl.constexpr, FEATURE: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """A query or key: projected head `head` as the read or state `owner` takes it."""
    here = rows < K
    y = convolved(x, history, weight, n, stride, channels, head * K + rows, here, CONV)
    inverse = 1.0
    if norm is not None:
        inverse = tl.rsqrt(tl.sum(y * y, 0) / K + eps)
        y = y * inverse * tl.load(norm + rows, mask=here, other=0.0).to(tl.float32)
    if ROTARY > 0:
        first = rows < ROTARY // 2
        partner = tl.where(first, rows + ROTARY // 2, rows - ROTARY // 2)
        paired = rows < ROTARY
        z = convolved(x, history, weight, n, stride, channels, head * K + partner, paired, CONV)
        if norm is not None:
            z = z * inverse * tl.load(norm + partner, mask=paired, other=0.0).to(tl.float32)
        cosine = tl.load(cos + n * rotary_stride + rows, mask=paired, other=1.0).to(tl.float32)
        sine = tl.load(sin + n * rotary_stride + rows, mask=paired, other=0.0).to(tl.float32)
        y = tl.where(turned != 0, y * cosine + tl.where(first, -z, z) * sine, y)
    if bias is not None:
        y += tl.load(bias + owner * K + rows, mask=here, other=0.0).to(tl.float32)
    return mapped(y, here, FEATURE, NORM)


@triton.jit
def gate_of(gate, n, reads, r, columns, here, V: tl.constexpr, GATE: tl.constexpr):
    """What read r is multiplied by."""
    if GATE == "head_sigmoid":
        x = tl.load(gate + n * reads + r).to(tl.float32)
    else:
        x = tl.load(gate + (n * reads + r) * V + columns, mask=here, other=0.0).to(tl.float32)
    open = tl.sigmoid(x)
    if GATE == "silu":
        open = open * x
    if GATE == "sigmoid2":
        open = open * 2.0
    return open


@triton.jit(do_not_specialize=["stride_q", "stride_k", "stride_v", "turned_low", "turned_high", "rotary_stride"])
def mixer_step_kernel(
    q, k, v, history_q, history_k, history_v, stride_q, stride_k, stride_v, filter_q, filter_k, filter_v,
    b, a, rate, step, norm_q, norm_k, bias_q, bias_k, cos, sin, rotary_stride, turned_low, turned_high,
    gate, norm_o, mask, state, out, scale, eps, most, factor,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, STATES: tl.constexpr, SCALES: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, ROTARY: tl.constexpr, CONV: tl.constexpr, SKIP: tl.constexpr,
    ERASE: tl.constexpr, FEATURE: tl.constexpr, NORM: tl.constexpr, GATE: tl.constexpr, MIXED: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Program (n · KEYS + key head, part of its states). STATES, and READS below, are those of one time scale."""
    READS: tl.constexpr = QUERIES if QUERIES > VALUES else VALUES
    GROUP: tl.constexpr = STATES // KEYS
    EACH: tl.constexpr = READS // STATES  # reads of a state
    WIDTH: tl.constexpr = SCALES * READS * V + SKIP * VALUES * V
    n, key_head = (tl.program_id(0) // KEYS).to(tl.int64), tl.program_id(0) % KEYS
    rows, columns = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    in_k, in_v = rows < K, columns < V
    both = in_k[:, None] & in_v[None, :]
    count: tl.constexpr = SCALES * GROUP // PARTS
    begin = tl.program_id(1) * count
    valid = True
    if mask is not None:
        valid = tl.load(mask + n) != 0
    if valid:
        for i in range(begin, begin + count):
            head = key_head * GROUP + i % GROUP
            s = (i // GROUP) * STATES + head
            turned = ROTARY
            if MIXED:
                word = tl.where(s < WORD, turned_low, turned_high)
                turned = (word >> (s % WORD)) & 1

            key = addressed(
                k, history_k, filter_k, norm_k, bias_k, cos, sin, n, stride_k, KEYS * K, key_head, s, rows, turned,
                rotary_stride, eps, K, ROTARY, CONV, FEATURE, NORM,
            )  # fmt: skip
            value_head = head // (STATES // VALUES)
            value = convolved(v, history_v, filter_v, n, stride_v, VALUES * V, value_head * V + columns, in_v, CONV)
            if FEATURE == "silu":
                value = value * tl.sigmoid(value)
            if SKIP:
                at = n * WIDTH + SCALES * READS * V + value_head * V + columns
                tl.store(out + at, value.to(out.dtype.element_ty), mask=in_v)

            pair = n * (SCALES * STATES) + s
            place = state + pair * (K * V) + rows[:, None] * V + columns[None, :]
            kept = tl.load(place, mask=both, other=0.0)
            if a is not None:
                x = tl.load(a + pair).to(tl.float32) + tl.load(step + s).to(tl.float32)
                grown = tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x)))
                kept = kept * tl.exp(-tl.exp(tl.load(rate + s).to(tl.float32)) * grown)
            write = value
            if ERASE:
                write = write - tl.sum(key[:, None] * kept, 0)
            if b is not None:
                write = write * (most * tl.sigmoid(tl.load(b + pair).to(tl.float32)))
            new = kept + key[:, None] * write[None, :]
            tl.store(place, new, mask=both)

            for j in range(EACH):
                r = s * EACH + j
                query_head = (head * EACH + j) // (READS // QUERIES)
                query = addressed(
                    q, history_q, filter_q, norm_q, bias_q, cos, sin, n, stride_q, QUERIES * K, query_head, r, rows,
                    turned, rotary_stride, eps, K, ROTARY, CONV, FEATURE, NORM,
                )  # fmt: skip
                read = factor * tl.sum((query * scale)[:, None] * new, 0)
                if norm_o is not None:
                    read = read * tl.rsqrt(tl.sum(read * read, 0) / V + eps)
                    read = read * tl.load(norm_o + columns, mask=in_v, other=0.0).to(tl.float32)
                if gate is not None:
                    read = read * gate_of(gate, n, SCALES * READS, r, columns, in_v, V, GATE)
                tl.store(out + n * WIDTH + r * V + columns, read.to(out.dtype.element_ty), mask=in_v)

        if CONV > 1:
            tl.debug_barrier()  # every thread has read the histories before one of them is shifted
            shift(k, history_k, n, stride_k, KEYS * K, key_head * K + rows, in_k, CONV)
            for j in range(QUERIES // KEYS):
                at = (key_head * (QUERIES // KEYS) + j) * K + rows
                shift(q, history_q, n, stride_q, QUERIES * K, at, in_k, CONV)
            for j in range(VALUES // KEYS):
                at = (key_head * (VALUES // KEYS) + j) * V + columns
                shift(v, history_v, n, stride_v, VALUES * V, at, in_v, CONV)
    else:
        for i in range(begin, begin + count):
            head = key_head * GROUP + i % GROUP
            for j in range(EACH):
                r = ((i // GROUP) * STATES + head) * EACH + j
                tl.store(out + n * WIDTH + r * V + columns, tl.zeros_like(columns).to(out.dtype.element_ty), mask=in_v)
            if SKIP:
                at = n * WIDTH + SCALES * READS * V + (head // (STATES // VALUES)) * V + columns
                tl.store(out + at, tl.zeros_like(columns).to(out.dtype.element_ty), mask=in_v)


class Sizes(NamedTuple):
    """What the shapes of the tensors do not tell."""

    queries: int
    keys: int
    values: int
    states: int  # of one time scale
    scales: int
    K: int
    V: int


class Inputs(NamedTuple):
    """What one token brings: projections [B, 1, width], rotations [B or 1, 1, size], mask [B, 1]."""

    q: Tensor
    k: Tensor
    v: Tensor
    b: Tensor | None = None
    a: Tensor | None = None
    gate: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    mask: Tensor | None = None


class Weights(NamedTuple):
    """The mixer's own: convolutions [C, 1, size], decay rates A and steps d [S], norms [K] and [V], biases [.., K]."""

    filter_q: Tensor | None = None
    filter_k: Tensor | None = None
    filter_v: Tensor | None = None
    rate: Tensor | None = None
    step: Tensor | None = None
    norm_q: Tensor | None = None
    norm_k: Tensor | None = None
    bias_q: Tensor | None = None
    bias_k: Tensor | None = None
    norm_o: Tensor | None = None


class Factors(NamedTuple):
    """Numbers the results are multiplied by, and the ε of RMSNorm."""

    scale: float
    eps: float
    most: float  # β at its largest
    out: float


def blocks(K: int, V: int) -> tuple[int, int, int]:
    """(BLOCK_K, BLOCK_V, warps): a program holds a whole state."""
    block_k, block_v = (1 << (size - 1).bit_length() for size in (K, V))
    return block_k, block_v, min(max(block_k * block_v // NUMBERS_PER_WARP, 1), MOST_WARPS)


def flags(rotates: Sequence[bool]) -> tuple[int, int]:
    """Which states rotate, as bits."""
    words = [rotates[start : start + FLAGS] for start in (0, FLAGS)]
    low, high = (sum(1 << i for i, turned in enumerate(word) if turned) for word in words)
    return low, high


@torch.library.custom_op("hf_fwp::mixer_step", mutates_args=("state", "histories"))
def mixer_step(
    state: Tensor,
    histories: Sequence[Tensor],
    inputs: Sequence[Tensor | None],
    weights: Sequence[Tensor | None],
    sizes: Sequence[int],
    factors: Sequence[float],
    rotates: Sequence[int],
    feature_map: str,
    qk_norm: str,
    gate: str,
    erase: bool,
    skip: bool,
) -> Tensor:
    """What o_proj reads, [B, 1, reads * V], and after it the values themselves with `skip`; no gradients.

    `state` [B, S, K, V] in float32 and the histories of q, k and v, [B, size - 1, C] each or none, are overwritten.
    `inputs`, `weights`, `sizes` and `factors` are the tuples above; `rotates` the two words of `flags` where some
    states rotate and others do not, else empty.
    """
    given, own, size = Inputs(*inputs), Weights(*weights), Sizes(*sizes)  # pyright: ignore[reportArgumentType]
    out = new_out(given, size, skip)
    constants = {"FEATURE": feature_map, "NORM": qk_norm, "GATE": gate, "ERASE": erase, "SKIP": skip}
    _launch(state, histories, out, given, own, size, Factors(*factors), rotates, constants)
    return out


@mixer_step.register_fake
def _(state, histories, inputs, weights, sizes, factors, rotates, feature_map, qk_norm, gate, erase, skip):
    return new_out(Inputs(*inputs), Sizes(*sizes), skip)


def new_out(given: Inputs, size: Sizes, skip: bool) -> Tensor:
    reads = size.scales * max(size.queries, size.values)
    return given.v.new_empty(given.v.shape[0], 1, (reads + skip * size.values) * size.V)


def _launch(
    state: Tensor,
    histories: Sequence[Tensor],
    out: Tensor,
    given: Inputs,
    own: Weights,
    size: Sizes,
    factors: Factors,
    rotates: Sequence[int],
    constants: dict[str, Any],
) -> None:
    block_k, block_v, warps = blocks(size.K, size.V)
    given = Inputs(*(x if x is None else x.contiguous() for x in given))  # pyright: ignore[reportArgumentType]
    parts = 1 if own.filter_q is not None else size.scales * size.states // size.keys
    kept = tuple(histories) if len(histories) else (None, None, None)
    cos = given.cos
    with torch.accelerator.device_index(out.device.index):
        launch: Any = mixer_step_kernel[(out.shape[0] * size.keys, parts)]
        launch(
            *given[:3],
            *kept,
            *(0 if x is None else x.stride(0) for x in kept),
            *own[:3],
            given.b,
            given.a,
            *own[3:9],
            cos,
            given.sin,
            0 if cos is None or cos.shape[0] < out.shape[0] else cos.shape[-1],
            *(rotates or (0, 0)),
            given.gate,
            own.norm_o,
            given.mask,
            state,
            out,
            *factors,
            QUERIES=size.queries,
            KEYS=size.keys,
            VALUES=size.values,
            STATES=size.states,
            SCALES=size.scales,
            K=size.K,
            V=size.V,
            ROTARY=0 if cos is None else cos.shape[-1],
            CONV=0 if own.filter_q is None else own.filter_q.shape[-1],
            MIXED=bool(rotates),
            PARTS=parts,
            BLOCK_K=block_k,
            BLOCK_V=block_v,
            num_warps=warps,
            **constants,
        )
