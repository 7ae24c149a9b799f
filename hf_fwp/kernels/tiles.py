"""What the kernels of the linear class share: where a chunk lies in memory, loading its tiles, its gates.

A chunk has a slot. Rows of a batch have the same number of slots; of packed sequences, chunk i of sequence n has the
slot start_n // C + n + i, which needs no count of the chunks before: no value of cu_seqlens is read on the host.
"""

# pyright: reportGeneralTypeIssues=false
# (the bodies of kernels are another language)

import triton
import triton.language as tl

from ..rules.blocks import L2NORM_EPS

EPS = tl.constexpr(L2NORM_EPS)


@triton.jit
def sequence_span(n, cu, length, PACKED: tl.constexpr):
    """First token and number of tokens of sequence n, counted over the whole batch."""
    if PACKED:
        first = tl.load(cu + n).to(tl.int64)
        # bounds beyond the tensor must not become addresses
        count = tl.minimum(tl.load(cu + n + 1).to(tl.int64), length) - first
    else:
        first = n.to(tl.int64) * length
        count = first * 0 + length
    return first, count


@triton.jit
def first_slot(n, first, length, C: tl.constexpr, PACKED: tl.constexpr):
    """Slot of the first chunk of sequence n."""
    return first // C + n if PACKED else n.to(tl.int64) * tl.cdiv(length, C)


@triton.jit
def chunk_in_slot(slot, cu, length, sequences, halvings, C: tl.constexpr, PACKED: tl.constexpr):
    """First token of the chunk in a slot and how many of its tokens there are; none in a slot that stays empty."""
    if PACKED:
        n = slot * 0
        last = n + sequences - 1
        for _ in range(halvings):
            middle = (n + last + 1) // 2
            starts = (tl.load(cu + middle) // C + middle) <= slot
            n = tl.where(starts, middle, n)
            last = tl.where(starts, last, middle - 1)
    else:
        n = slot // tl.cdiv(length, C)
    first, count = sequence_span(n, cu, length, PACKED)
    offset = (slot - first_slot(n, first, length, C, PACKED)) * C
    return first + offset, count - offset


@triton.jit
def load_tile(x, first, head, heads, size, rows, columns, valid):
    """x[first + rows, head, columns] of [tokens, heads, size]; 0 beyond the size and where a row is not valid."""
    at = x + (first * heads + head) * size + rows[:, None] * (heads * size) + columns[None, :]
    return tl.load(at, mask=valid[:, None] & (columns < size)[None, :], other=0.0)


@triton.jit
def store_tile(x, first, head, heads, size, rows, columns, here, tile):
    """The inverse of `load_tile`."""
    at = x + (first * heads + head) * size + rows[:, None] * (heads * size) + columns[None, :]
    tl.store(at, tile.to(x.dtype.element_ty), mask=here[:, None] & (columns < size)[None, :])


@triton.jit
def load_column(x, first, head, heads, rows, valid):
    """x[first + rows, head] of [tokens, heads] in float32."""
    return tl.load(x + first * heads + head + rows * heads, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def load_matrix(x, index, rows, columns, n_rows, n_columns):
    """x[index] of [.., rows, columns]."""
    at = x + index * (n_rows * n_columns) + rows[:, None] * n_columns + columns[None, :]
    return tl.load(at, mask=(rows < n_rows)[:, None] & (columns < n_columns)[None, :], other=0.0)


@triton.jit
def store_matrix(x, index, rows, columns, n_rows, n_columns, matrix):
    """The inverse of `load_matrix`."""
    at = x + index * (n_rows * n_columns) + rows[:, None] * n_columns + columns[None, :]
    tl.store(at, matrix.to(x.dtype.element_ty), mask=(rows < n_rows)[:, None] & (columns < n_columns)[None, :])


@triton.jit
def valid_rows(mask, first, rows, here, HAS_MASK: tl.constexpr):
    """The tokens that exist and are no padding."""
    valid = here
    if HAS_MASK:
        valid = here & (tl.load(mask + first + rows, mask=here, other=0) != 0)
    return valid


@triton.jit
def inverse_length(x, L2NORM: tl.constexpr):
    """1 / length of the rows, or 1: every product with q or k is scaled afterwards, in float32."""
    x = x.to(tl.float32)
    total = tl.sum(x * x, 1)
    return tl.rsqrt(total + EPS) if L2NORM else tl.full(total.shape, 1.0, tl.float32)


@triton.jit
def load_rate(beta, first, head, heads, rows, valid, HAS_BETA: tl.constexpr):
    """β, 1 when there is none, 0 where nothing is written."""
    return load_column(beta, first, head, heads, rows, valid) if HAS_BETA else valid.to(tl.float32)


@triton.jit
def split_sum(step):
    """G as two sums, of a multiple of 2^-12 and of a rest: differences of the first are exact up to |G| = 2048.

    A single float32 sum loses 1e-6 in exp(G_i - G_j) at G = -32.
    """
    coarse = tl.floor(step * 4096.0 + 0.5) * (1.0 / 4096.0)
    return tl.cumsum(coarse, 0), tl.cumsum(step - coarse, 0)


@triton.jit
def load_decay(g, first, head, heads, rows, valid, HAS_G: tl.constexpr):
    """G, the inclusive sum of g over the chunk (in two parts); exp(G); exp(G_C - G); exp(G_C)."""
    step = load_column(g, first, head, heads, rows, valid) if HAS_G else rows * 0.0
    coarse, fine = split_sum(step)
    last = rows == rows.shape[0] - 1
    coarse_last, fine_last = tl.sum(tl.where(last, coarse, 0.0), 0), tl.sum(tl.where(last, fine, 0.0), 0)
    remaining = tl.exp((coarse_last - coarse) + (fine_last - fine))
    return coarse, fine, tl.exp(coarse + fine), remaining, tl.exp(coarse_last + fine_last)


@triton.jit
def decay_between(coarse_i, fine_i, coarse_j, fine_j, lower):
    """exp(G_i - G_j) where `lower` (i ≥ j or i > j), else 0; differences only: exp(-G_j) alone would overflow."""
    total = (coarse_i[:, None] - coarse_j[None, :]) + (fine_i[:, None] - fine_j[None, :])
    return tl.exp(tl.where(lower, total, float("-inf")))


@triton.jit
def dot(a, b, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """a b with operands in the type DOT and the sum in float32."""
    return tl.dot(a.to(DOT), b.to(DOT), input_precision=PRECISION, out_dtype=tl.float32)
