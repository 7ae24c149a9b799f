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
# exp is 0 in float32 from here on; sums of lower steps lose digits, and differences of -inf are NaN
LOWEST = tl.constexpr(-104.0)


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
def first_slot(n, first, length, C, PACKED: tl.constexpr):
    """Slot of the first chunk of sequence n; C may be known at run time only: segments have slots too."""
    return first // C + n if PACKED else n.to(tl.int64) * tl.cdiv(length, C)


@triton.jit
def chunk_in_slot(slot, cu, length, sequences, halvings, C, PACKED: tl.constexpr):
    """The chunk in a slot: its sequence, its number there, its first token, and how many tokens of the sequence are
    left from there on; none in a slot that stays empty."""
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
    i = slot - first_slot(n, first, length, C, PACKED)
    return n, i, first + i * C, count - i * C


@triton.jit
def chunks_to_walk(
    pair, cu, length, span, sequences, halvings,
    H: tl.constexpr, HV: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr, SEGMENTED: tl.constexpr,
):  # fmt: skip
    """What one program of a scan walks: a value head and its key head; a sequence, its first token, the number of its
    tokens and the slot of its first chunk; the first chunk to walk and the one after the last. `pair` is a value head
    of a sequence, or with SEGMENTED of the slot of a segment of `span` tokens."""
    index, hv = pair // HV, pair % HV
    if SEGMENTED:
        n, i, _, left = chunk_in_slot(index.to(tl.int64), cu, length, sequences, halvings, span, PACKED)
        first, count = sequence_span(n, cu, length, PACKED)
        start = i * (span // C)
        end = start + tl.cdiv(tl.minimum(tl.maximum(left, 0), span), C)
    else:
        n = index
        first, count = sequence_span(n, cu, length, PACKED)
        start, end = count * 0, tl.cdiv(count, C)
    return hv, hv // (HV // H), n, first, count, first_slot(n, first, length, C, PACKED), start, end


@triton.jit
def query_head(reader, h, readers, H, SHARE: tl.constexpr):
    """The head of q that a reader takes, and how many q has: as many as k, or one for every reader."""
    return (h, H) if SHARE else (reader, readers)


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
def load_solve(solve, n, first, length, i, head, heads, C: tl.constexpr, PACKED: tl.constexpr):
    """T of chunk i of a sequence. It is kept for 64 tokens: for shorter chunks, a square on its diagonal."""
    slot = first_slot(n, first, length, 64, PACKED) + i * C // 64
    rows = tl.arange(0, C)
    at = solve + (slot * heads + head) * 4096 + (i * C % 64) * 65
    return tl.load(at + rows[:, None] * 64 + rows[None, :])


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
def load_rate(beta, first, head, heads, rows, valid, HAS_BETA: tl.constexpr, RANGE: tl.constexpr):
    """β, 1 when there is none, 0 where nothing is written; with RANGE it is RANGE · sigmoid of what is loaded."""
    rate = valid.to(tl.float32)
    if HAS_BETA:
        rate = load_column(beta, first, head, heads, rows, valid)
        if RANGE > 0.0:
            rate = tl.where(valid, RANGE * tl.sigmoid(rate), 0.0)
    return rate


@triton.jit
def softplus(x):
    """log(1 + exp(x)) = max(x, 0) + log1p(y), y = exp(-|x|) ≤ 1: twice the series of artanh at y / (2 + y), to 2e-8.

    A logarithm of 1 + y would lose the digits of small steps, which are what long memories are made of.
    """
    y = tl.exp(-tl.abs(x))
    s = y / (2.0 + y)
    z = s * s
    series = 1 / 3 + z * (1 / 5 + z * (1 / 7 + z * (1 / 9 + z * (1 / 11 + z * (1 / 13)))))
    return tl.maximum(x, 0.0) + 2.0 * s * (1.0 + z * series)


@triton.jit
def load_step(
    g, a_log, dt_bias, first, head, heads, rows, valid, HAS_G: tl.constexpr, RAW_G: tl.constexpr
):  # fmt: skip
    """g; with RAW_G it is -exp(A) softplus(a + d) of what is loaded, a. And its derivative by that."""
    step = rows * 0.0
    slope = step + 1.0
    if HAS_G:
        step = load_column(g, first, head, heads, rows, valid)
        if RAW_G:
            speed = -tl.exp(tl.load(a_log + head).to(tl.float32))
            a = step + tl.load(dt_bias + head).to(tl.float32)
            step = tl.where(valid, speed * softplus(a), 0.0)
            slope = speed * tl.sigmoid(a)
        step = tl.where(step < LOWEST, LOWEST, step)
    return step, slope


@triton.jit
def split_sum(step):
    """G as two sums, of a multiple of 2^-12 and of a rest: differences of the first are exact up to |G| = 2048.

    A single float32 sum loses 1e-6 in exp(G_i - G_j) at G = -32.
    """
    coarse = tl.floor(step * 4096.0 + 0.5) * (1.0 / 4096.0)
    return tl.cumsum(coarse, 0), tl.cumsum(step - coarse, 0)


@triton.jit
def decay_of(step, rows):
    """G, the inclusive sum of g over the chunk (in two parts); exp(G); exp(G_C - G); exp(G_C)."""
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


# whether TRITON_INTERPRET was set when triton was imported
INTERPRETED = tl.constexpr(not isinstance(sequence_span, triton.JITFunction))


@triton.jit
def operand(x, DOT: tl.constexpr):
    """x as `dot` takes it."""
    if INTERPRETED and tl.bfloat16 == DOT:  # numpy has no bf16
        return rounded(x)
    return x.to(DOT)


@triton.jit
def dot(a, b, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """a b with operands in the type DOT and the sum in float32."""
    return tl.dot(operand(a, DOT), operand(b, DOT), input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def fine_dot(a, b, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """a b where the 8 bits of bf16 would lose too much: operands have 11 at least. So are T x and Tᵀ x, which must keep
    what correlated keys leave of a value."""
    how: tl.constexpr = "tf32" if tl.float32 != DOT and PRECISION == "tf32x3" else PRECISION  # pyright: ignore[reportAssignmentType] Triton makes it one
    return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=how, out_dtype=tl.float32)


@triton.jit
def rounded(x):
    """x with the 8 bits of bf16, in float32; ties to even."""
    bits = x.to(tl.float32).to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return bits.to(tl.float32, bitcast=True)
