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

from .tiles import dot, load_column, load_tile, split_sum

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
def lies_between(level, C: tl.constexpr):
    """Whether the decay of token t lies between token i and the last token m of an earlier block: [i, t]."""
    i, t = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    later = ((i >> level) & 1) == 1
    return ((i >> level) == (t >> level)) & tl.where(later, t <= i, t > i)


@triton.jit
def level_decay(step, level, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """The factors of one level: exp(G - G_m) in the later blocks, exp(G_m - G) in the earlier ones."""
    between = lies_between(level, step.shape[0])
    total = dot(between, step, DOT, PRECISION)
    if tl.float32 != DOT:
        # in two parts: 8 bits of bf16 would leave exp with two digits
        total += dot(between, step - step.to(DOT).to(tl.float32), DOT, PRECISION)
    return tl.exp(total)


@triton.jit
def meets(level, C: tl.constexpr):
    """Which pairs i > j meet at this level."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return (i > j) & (((i ^ j) >> level) == 1)


@triton.jit
def inverse(a, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """(I + A)⁻¹ of a strictly lower A, by halves: [[X1, 0], [-X2 A21 X1, X2]], for all blocks of a level at once."""
    i, j = tl.arange(0, a.shape[0])[:, None], tl.arange(0, a.shape[0])[None, :]
    x = tl.where(i == j, 1.0, tl.where(meets(0, a.shape[0]), -a, 0.0))
    for level in range(1, LEVELS):
        part = tl.where(meets(level, a.shape[0]), a, 0.0)
        x -= tl.dot(x, tl.dot(part, x, input_precision=PRECISION), input_precision=PRECISION)
    return x
