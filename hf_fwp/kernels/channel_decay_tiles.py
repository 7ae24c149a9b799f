"""What the kernels of the channel decay share: sums of log-decays, the levels of a chunk, the inverse of its triangle.

Two tokens i > j of a chunk meet at the level of the highest bit in which i and j differ. At level l the chunk falls
into blocks of 2^l tokens; i is in the later one of a pair of blocks, j in the earlier one, and with m the last token of
the earlier one exp(G_i - G_j) = exp(G_i - G_m) exp(G_m - G_j): one factor for every token, with an exponent ≤ 0.
The exponents are sums of g over a part of a block, so nothing cancels.
"""

# pyright: reportGeneralTypeIssues=false
# (the bodies of kernels are another language)

import triton
import triton.language as tl

from .tiles import EPS, dot, inverse_length, load_column, load_matrix, load_tile, split_sum, store_matrix

LOWEST = tl.constexpr(-104.0)  # exp is 0 in float32 from here on; -inf would make NaN of a sum


@triton.jit
def load_steps(g, first, head, heads, rows, columns, valid, K: tl.constexpr, GK: tl.constexpr):
    """g of some tokens and key channels in float32; GK is K, 1 for one decay per head, 0 for none."""
    if GK == 0:
        step = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    elif GK == 1:
        step = load_column(g, first, head, heads, rows, valid)[:, None] + tl.zeros([1, columns.shape[0]], tl.float32)
    else:
        step = load_tile(g, first, head, heads, K, rows, columns, valid).to(tl.float32)
    return tl.maximum(step, LOWEST)


@triton.jit
def load_turned(x, index, rows, columns, n_rows, n_columns, TURNED: tl.constexpr):
    """x[index] of [.., rows, columns], or where TURNED of [.., columns, rows]."""
    if TURNED:
        found = tl.trans(load_matrix(x, index, columns, rows, n_columns, n_rows))
    else:
        found = load_matrix(x, index, rows, columns, n_rows, n_columns)
    return found


@triton.jit
def store_turned(x, index, rows, columns, n_rows, n_columns, matrix, TURNED: tl.constexpr):
    """The inverse of `load_turned`."""
    if TURNED:
        store_matrix(x, index, columns, rows, n_columns, n_rows, tl.trans(matrix))
    else:
        store_matrix(x, index, rows, columns, n_rows, n_columns, matrix)


@triton.jit
def load_erase(erase, k_tile, first, hv, HV, rows, columns, valid, K: tl.constexpr, HAS_ERASE: tl.constexpr):
    """e, which is k unless it is given."""
    tile = k_tile
    if HAS_ERASE:
        tile = load_tile(erase, first, hv, HV, K, rows, columns, valid).to(tl.float32)
    return tile


@triton.jit
def chunk_decay(step):
    """exp(G), exp(G_C - G) and, of every channel, exp(G_C)."""
    coarse, fine = split_sum(step)
    last = (tl.arange(0, step.shape[0]) == step.shape[0] - 1)[:, None]
    coarse_last, fine_last = tl.sum(tl.where(last, coarse, 0.0), 0), tl.sum(tl.where(last, fine, 0.0), 0)
    remaining = tl.exp((coarse_last[None, :] - coarse) + (fine_last[None, :] - fine))
    return tl.exp(coarse + fine), remaining, tl.exp(coarse_last + fine_last)


@triton.jit
def load_keys(
    k, g, first, h, H, hv, HV, rows, columns, valid, K: tl.constexpr, GK: tl.constexpr, L2NORM: tl.constexpr
):  # fmt: skip
    """k, of length 1 with L2NORM, and by what it was divided for that; and exp(G), exp(G_C - G), exp(G_C)."""
    decay, remaining, left = chunk_decay(load_steps(g, first, hv, HV, rows, columns, valid, K, GK))
    k_tile = load_tile(k, first, h, H, K, rows, columns, valid).to(tl.float32)
    k_norm = inverse_length(k_tile, L2NORM)
    return k_tile * k_norm[:, None], k_norm, decay, remaining, left


@triton.jit
def level_decay(before, after, level):
    """The factors of one level: exp(G - G_m) in the later blocks, exp(G_m - G) in the earlier ones."""
    i = tl.arange(0, before.shape[0])[:, None]
    return tl.exp(tl.where(((i >> level) & 1) == 1, before, after))


@triton.jit
def next_level(before, after, level):
    """Sums of g over a block up to a token, and behind it, from those of the level below: every second block gets the
    whole sum of its neighbour, which every token of that knows."""
    i = tl.arange(0, before.shape[0])[:, None]
    neighbour = (i ^ (1 << level)) + tl.zeros([1, before.shape[1]], tl.int32)
    total = tl.gather(before + after, neighbour, 0)
    later = ((i >> level) & 1) == 1
    return tl.where(later, before + total, before), tl.where(later, after, after + total)


@triton.jit
def lies_between(level, C: tl.constexpr):
    """Whether the decay of token t lies between token i and the last token m of an earlier block: [i, t]."""
    i, t = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    later = ((i >> level) & 1) == 1
    return ((i >> level) == (t >> level)) & tl.where(later, t <= i, t > i)


@triton.jit
def meets(level, C: tl.constexpr):
    """Which pairs i > j meet at this level."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return (i > j) & (((i ^ j) >> level) == 1)


@triton.jit
def pair_products(
    x, k, g, at, hx, x_heads, h, H, hv, HV, rows, valid,
    K: tl.constexpr, KB: tl.constexpr, LEVELS: tl.constexpr, GK: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ_d x_i k_j exp(G_i - G_j) for the tokens i > j of a chunk, else 0; and for i = j, a column. LEVELS products of
    C x C x K."""
    found = tl.zeros([rows.shape[0], rows.shape[0]], tl.float32)
    same = tl.zeros([rows.shape[0]], tl.float32)
    for part in range(0, K, KB):
        keys = part + tl.arange(0, KB)
        k_tile = load_tile(k, at, h, H, K, rows, keys, valid).to(tl.float32)
        x_tile = load_tile(x, at, hx, x_heads, K, rows, keys, valid).to(tl.float32)
        same += tl.sum(x_tile * k_tile, 1)
        before = load_steps(g, at, hv, HV, rows, keys, valid, K, GK)
        after = before * 0.0
        for level in range(LEVELS):
            decay = level_decay(before, after, level)
            met = dot(x_tile * decay, tl.trans(k_tile * decay), DOT, PRECISION)
            found += tl.where(meets(level, rows.shape[0]), met, 0.0)
            before, after = next_level(before, after, level)
    return found, same


@triton.jit
def with_diagonal(found, same):
    """The square with a column on its diagonal."""
    i = tl.arange(0, found.shape[0])
    return tl.where(i[:, None] == i[None, :], same[:, None], found)


@triton.jit
def inverse_lengths(x, at, head, heads, rows, valid, K: tl.constexpr, KB: tl.constexpr, L2NORM: tl.constexpr):
    """1 / length of the rows of x, or 1."""
    found = tl.full([rows.shape[0]], 1.0, tl.float32)
    if L2NORM:
        total = tl.zeros([rows.shape[0]], tl.float32)
        for part in range(0, K, KB):
            tile = load_tile(x, at, head, heads, K, rows, part + tl.arange(0, KB), valid).to(tl.float32)
            total += tl.sum(tile * tile, 1)
        found = tl.rsqrt(total + EPS)
    return found


@triton.jit
def inverse(a, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """(I + A)⁻¹ of a strictly lower A, by halves: [[X1, 0], [-X2 A21 X1, X2]], for all blocks of a level at once."""
    i, j = tl.arange(0, a.shape[0])[:, None], tl.arange(0, a.shape[0])[None, :]
    x = tl.where(i == j, 1.0, tl.where(meets(0, a.shape[0]), -a, 0.0))
    for level in range(1, LEVELS):
        part = tl.where(meets(level, a.shape[0]), a, 0.0)
        x -= tl.dot(x, tl.dot(part, x, input_precision=PRECISION), input_precision=PRECISION)
    return x
