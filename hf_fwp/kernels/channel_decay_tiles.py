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

from .tiles import (
    EPS,
    LOWEST,
    dot,
    fine_dot,
    inverse_length,
    load_column,
    load_matrix,
    load_tile,
    query_head,
    softplus,
    split_sum,
    store_matrix,
    store_tile,
)


@triton.jit
def computed_step(a, gate, head, columns, K: tl.constexpr, LOWER: tl.constexpr):
    """g of a, and its derivatives by a and by A (gating.Decay); `gate` is (a, A, d)."""
    speed = tl.exp(tl.load(gate[1] + head).to(tl.float32))
    a += tl.load(gate[2] + head * K + columns, mask=columns < K, other=0.0).to(tl.float32)[None, :]
    if LOWER < 0.0:
        fraction = tl.sigmoid(speed * a)
        step = LOWER * fraction
        slope = speed * step * (1.0 - fraction)
        by_rate = a * slope
    else:
        step = -speed * softplus(a)
        slope = -speed * tl.sigmoid(a)
        by_rate = step
    return step, slope, by_rate


@triton.jit
def load_steps(
    gate, first, head, heads, rows, columns, valid,
    K: tl.constexpr, GK: tl.constexpr, RAW_G: tl.constexpr, LOWER: tl.constexpr,
):  # fmt: skip
    """g of some tokens and key channels in float32; GK is K, 1 for one decay per head, 0 for none. `gate` is (g, A, d),
    with RAW_G (a, A, d)."""
    if GK == 0:
        step = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    elif GK == 1:
        step = load_column(gate[0], first, head, heads, rows, valid)[:, None]
        step += tl.zeros([1, columns.shape[0]], tl.float32)
    else:
        step = load_tile(gate[0], first, head, heads, K, rows, columns, valid).to(tl.float32)
        if RAW_G:
            step, _, _ = computed_step(step, gate, head, columns, K, LOWER)
            step = tl.where(valid[:, None] & (columns < K)[None, :], step, 0.0)
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
def load_gate(x, first, head, heads, size, rows, columns, valid, RANGE: tl.constexpr):
    """A gate of some tokens and channels in float32; with RANGE it is RANGE · sigmoid of what is loaded."""
    tile = load_tile(x, first, head, heads, size, rows, columns, valid).to(tl.float32)
    return RANGE * tl.sigmoid(tile) if RANGE > 0.0 else tile


@triton.jit
def sigmoid_backward(gradient, gate, RANGE: tl.constexpr):
    """The gradient of what a gate was computed from, by that of the gate."""
    return gradient * gate * (1.0 - gate / RANGE) if RANGE > 0.0 else gradient


@triton.jit
def load_erase(
    erase, k_tile, first, hv, HV, rows, columns, valid,
    K: tl.constexpr, ERASE: tl.constexpr, ERASE_RANGE: tl.constexpr,
):  # fmt: skip
    """e, which is k unless it is given (ERASE = 1), or a gate on k (ERASE = 2)."""
    tile = k_tile
    if ERASE > 0:
        tile = load_gate(erase, first, hv, HV, K, rows, columns, valid, ERASE_RANGE)
    if ERASE == 2:
        tile *= k_tile
    return tile


@triton.jit
def load_values(
    v, write, first, hv, HV, rows, columns, valid,
    V: tl.constexpr, HAS_WRITE: tl.constexpr, WRITE_RANGE: tl.constexpr,
):  # fmt: skip
    """u, which is v unless it has a gate."""
    tile = load_tile(v, first, hv, HV, V, rows, columns, valid).to(tl.float32)
    if HAS_WRITE:
        tile *= load_gate(write, first, hv, HV, V, rows, columns, valid, WRITE_RANGE)
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
    k, gate, first, h, H, hv, HV, rows, columns, valid,
    K: tl.constexpr, GK: tl.constexpr, RAW_G: tl.constexpr, LOWER: tl.constexpr, L2NORM: tl.constexpr,
):  # fmt: skip
    """k, of length 1 with L2NORM, and by what it was divided for that; and exp(G), exp(G_C - G), exp(G_C)."""
    decay, remaining, left = chunk_decay(load_steps(gate, first, hv, HV, rows, columns, valid, K, GK, RAW_G, LOWER))
    k_tile = load_tile(k, first, h, H, K, rows, columns, valid).to(tl.float32)
    k_norm = inverse_length(k_tile, L2NORM)
    return k_tile * k_norm[:, None], k_norm, decay, remaining, left


@triton.jit
def replace_in_chunk(
    v_tile, e_decayed, rate, solve, index, state,
    C: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """R, what a chunk writes along its keys, from its values and the state at its start."""
    rows = tl.arange(0, C)
    written = rate[:, None] * (v_tile - dot(e_decayed, state, DOT, PRECISION))
    return fine_dot(load_matrix(solve, index, rows, rows, C, C), written, DOT, PRECISION)


@triton.jit
def lies_later(level, C: tl.constexpr):
    """Which tokens lie in the later block of a pair of blocks."""
    return ((tl.arange(0, C) >> level) & 1) == 1


@triton.jit
def parts_at(level, C: tl.constexpr):
    """Which tokens i ≠ j meet at this level."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return ((i ^ j) >> level) == 1


@triton.jit
def meets(level, C: tl.constexpr):
    """Which pairs i > j meet at this level."""
    return parts_at(level, C) & (tl.arange(0, C)[:, None] > tl.arange(0, C)[None, :])


@triton.jit
def lies_between(level, C: tl.constexpr):
    """Whether the decay of token t lies between token i and the last token m of an earlier block: [i, t]."""
    i, t = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return ((i >> level) == (t >> level)) & tl.where(lies_later(level, C)[:, None], t <= i, t > i)


@triton.jit
def level_decay(before, after, level):
    """The factors of one level: exp(G - G_m) in the later blocks, exp(G_m - G) in the earlier ones."""
    return tl.exp(tl.where(lies_later(level, before.shape[0])[:, None], before, after))


@triton.jit
def next_level(before, after, level):
    """Sums of g over a block up to a token, and behind it, from those of the level below: every second block gets the
    whole sum of its neighbour, which every token of that knows."""
    i = tl.arange(0, before.shape[0])[:, None]
    neighbour = (i ^ (1 << level)) + tl.zeros([1, before.shape[1]], tl.int32)
    total = tl.gather(before + after, neighbour, 0)
    later = lies_later(level, before.shape[0])[:, None]
    return tl.where(later, before + total, before), tl.where(later, after, after + total)


@triton.jit
def pair_products(
    x, k, gate, at, hx, x_heads, h, H, hv, HV, rows, valid,
    K: tl.constexpr, KB: tl.constexpr, LEVELS: tl.constexpr, GK: tl.constexpr, RAW_G: tl.constexpr, LOWER: tl.constexpr,
    GATED: tl.constexpr, RANGE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ_d x_i k_j exp(G_i - G_j) for the tokens i > j of a chunk, else 0; and for i = j, a column. LEVELS products of
    C x C x K. With GATED, x is a gate on k."""
    found = tl.zeros([rows.shape[0], rows.shape[0]], tl.float32)
    same = tl.zeros([rows.shape[0]], tl.float32)
    for part in range(0, K, KB):
        keys = part + tl.arange(0, KB)
        k_tile = load_tile(k, at, h, H, K, rows, keys, valid).to(tl.float32)
        x_tile = load_gate(x, at, hx, x_heads, K, rows, keys, valid, RANGE)
        if GATED:
            x_tile *= k_tile
        same += tl.sum(x_tile * k_tile, 1)
        before = load_steps(gate, at, hv, HV, rows, keys, valid, K, GK, RAW_G, LOWER)
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
def load_queries(
    q, k, k_norm, gate, at, reader, readers, h, H, hv, HV, rows, columns, valid, scale,
    SHARE: tl.constexpr, K: tl.constexpr, KB: tl.constexpr, LEVELS: tl.constexpr, GK: tl.constexpr, RAW_G: tl.constexpr,
    LOWER: tl.constexpr, L2NORM: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P of a reader, its queries, and what they must be multiplied with: the scale, over their length with L2NORM."""
    hq, heads = query_head(reader, h, readers, H, SHARE)
    p, same = pair_products(
        q, k, gate, at, hq, heads, h, H, hv, HV, rows, valid, K, KB, LEVELS, GK, RAW_G, LOWER, False, 0.0, DOT,
        PRECISION,
    )  # fmt: skip
    q_tile = load_tile(q, at, hq, heads, K, rows, columns, valid).to(tl.float32)
    q_norm = scale * inverse_length(q_tile, L2NORM)
    return with_diagonal(p, same) * q_norm[:, None] * k_norm[None, :], q_tile, q_norm


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
def inverse(a, LEVELS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """(I + A)⁻¹ of a strictly lower A, by halves: [[X1, 0], [-X2 A21 X1, X2]], for all blocks of a level at once.

    What float32 inputs need is all of float32: where keys are correlated, three products in tf32 lose a bit."""
    how: tl.constexpr = "ieee" if tl.float32 == DOT else PRECISION  # pyright: ignore[reportAssignmentType] Triton makes it one
    i, j = tl.arange(0, a.shape[0])[:, None], tl.arange(0, a.shape[0])[None, :]
    x = tl.where(i == j, 1.0, tl.where(meets(0, a.shape[0]), -a, 0.0))
    for level in range(1, LEVELS):
        part = tl.where(meets(level, a.shape[0]), a, 0.0)
        x -= tl.dot(x, tl.dot(part, x, input_precision=how), input_precision=how)
    return x


@triton.jit
def add_tile(x, parts, at, head, heads, size, rows, columns, here, begins, ends, tile):
    """The first of several readers `begins` a sum in `parts`, the last one stores it in x. Without parts x gets the
    tile itself."""
    if parts is not None:
        tile += load_tile(parts, at, head, heads, size, rows, columns, here & (begins == 0))
        store_tile(parts, at, head, heads, size, rows, columns, here & (ends == 0), tile)
    store_tile(x, at, head, heads, size, rows, columns, here & ends, tile)
