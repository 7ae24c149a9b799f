"""Forward kernels of the linear class; the letters are those of rules/chunked.py.

    invert_chunks   parallel over chunks: T = (I + A)⁻¹, A = strictly lower part of β ⊙ (K Kᵀ) ⊙ Γ
    scan_forward    from chunk to chunk:  R = T (β ⊙ (V - exp(G) ⊙ K S0)),  O,  S1;  S0 is kept for the backward only

q and k are never normalised in memory: with unit vectors asked for, what was multiplied with them is divided by their
lengths, in float32.
"""

# pyright: reportGeneralTypeIssues=false
# (the bodies of kernels are another language)

import triton
import triton.language as tl

from .tiles import (
    EPS,
    chunk_in_slot,
    chunks_to_walk,
    decay_between,
    decay_of,
    dot,
    fine_dot,
    inverse_length,
    load_matrix,
    load_rate,
    load_solve,
    load_step,
    load_tile,
    query_head,
    split_sum,
    store_matrix,
    store_tile,
    valid_rows,
)

UNSPECIALIZED = ["length", "span", "sequences", "halvings"]  # a new length must not mean a new compilation


@triton.jit
def _gates_of_rows(beta, g, a_log, dt_bias, mask, first, left, rows, hv, HV, HAS_BETA: tl.constexpr,
                   RANGE: tl.constexpr, HAS_G: tl.constexpr, RAW_G: tl.constexpr, HAS_MASK: tl.constexpr):  # fmt: skip
    """Validity, β and g of some rows of a chunk."""
    valid = valid_rows(mask, first, rows, rows < left, HAS_MASK)
    rate = load_rate(beta, first, hv, HV, rows, valid, HAS_BETA, RANGE)
    step, _ = load_step(g, a_log, dt_bias, first, hv, HV, rows, valid, HAS_G, RAW_G)
    return valid, rate, step


@triton.jit
def _square(k):
    k = k.to(tl.float32)
    return tl.sum(k * k, 1)


@triton.jit
def _sum_after(coarse, fine, step):
    """G of 16 rows, continued from that of the rows before."""
    last = tl.arange(0, 16) == 15
    coarse_next, fine_next = split_sum(step)
    return coarse_next + tl.sum(tl.where(last, coarse, 0.0), 0), fine_next + tl.sum(tl.where(last, fine, 0.0), 0)


@triton.jit
def _product(a, b, sum, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """sum + a b. What float32 inputs need is all of float32: where keys are correlated, three products in tf32 lose a
    bit."""
    how: tl.constexpr = "ieee" if tl.float32 == DOT else PRECISION  # pyright: ignore[reportAssignmentType] Triton makes it one
    return sum + tl.dot(a, b, input_precision=how, out_dtype=tl.float32)


@triton.jit
def _minus(a, b, DOT: tl.constexpr, PRECISION: tl.constexpr):
    return -_product(a, b, 0.0, DOT, PRECISION)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def invert_chunks(
    k, beta, g, a_log, dt_bias, mask, cu, solve, length, span, sequences, halvings,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, KB: tl.constexpr,
    HAS_BETA: tl.constexpr, RANGE: tl.constexpr, HAS_G: tl.constexpr, RAW_G: tl.constexpr, HAS_MASK: tl.constexpr,
    PACKED: tl.constexpr, L2NORM: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """T of one chunk and value head, 64 x 64: elimination in blocks of 16 rows, then merges in float32.

    A Neumann series of this length has no correct digit when keys are correlated.
    """
    slot, hv = tl.program_id(0) // HV, tl.program_id(0) % HV
    h = hv // (HV // H)
    _, _, first, left = chunk_in_slot(slot.to(tl.int64), cu, length, sequences, halvings, 64, PACKED)
    if left <= 0:
        return
    lines = tl.arange(0, 16)
    columns = tl.arange(0, 16)
    valid0, rate0, step0 = _gates_of_rows(
        beta, g, a_log, dt_bias, mask, first, left, lines, hv, HV, HAS_BETA, RANGE, HAS_G, RAW_G, HAS_MASK
    )
    valid1, rate1, step1 = _gates_of_rows(
        beta, g, a_log, dt_bias, mask, first, left, lines + 16, hv, HV, HAS_BETA, RANGE, HAS_G, RAW_G, HAS_MASK
    )
    valid2, rate2, step2 = _gates_of_rows(
        beta, g, a_log, dt_bias, mask, first, left, lines + 32, hv, HV, HAS_BETA, RANGE, HAS_G, RAW_G, HAS_MASK
    )
    valid3, rate3, step3 = _gates_of_rows(
        beta, g, a_log, dt_bias, mask, first, left, lines + 48, hv, HV, HAS_BETA, RANGE, HAS_G, RAW_G, HAS_MASK
    )

    a00 = tl.zeros([16, 16], tl.float32)
    a10, a11, a20, a21, a22, a30, a31, a32, a33 = a00, a00, a00, a00, a00, a00, a00, a00, a00
    square0 = tl.zeros([16], tl.float32)
    square1, square2, square3 = square0, square0, square0
    for start in range(0, K, KB):
        part = start + tl.arange(0, KB)
        k0 = load_tile(k, first, h, H, K, lines, part, valid0)
        k1 = load_tile(k, first, h, H, K, lines + 16, part, valid1)
        k2 = load_tile(k, first, h, H, K, lines + 32, part, valid2)
        k3 = load_tile(k, first, h, H, K, lines + 48, part, valid3)
        if L2NORM:
            square0 += _square(k0)
            square1 += _square(k1)
            square2 += _square(k2)
            square3 += _square(k3)
        a00 += dot(k0, tl.trans(k0), DOT, PRECISION)
        a10 += dot(k1, tl.trans(k0), DOT, PRECISION)
        a11 += dot(k1, tl.trans(k1), DOT, PRECISION)
        a20 += dot(k2, tl.trans(k0), DOT, PRECISION)
        a21 += dot(k2, tl.trans(k1), DOT, PRECISION)
        a22 += dot(k2, tl.trans(k2), DOT, PRECISION)
        a30 += dot(k3, tl.trans(k0), DOT, PRECISION)
        a31 += dot(k3, tl.trans(k1), DOT, PRECISION)
        a32 += dot(k3, tl.trans(k2), DOT, PRECISION)
        a33 += dot(k3, tl.trans(k3), DOT, PRECISION)
    norm0, norm1, norm2, norm3 = 1.0 + square0, 1.0 + square1, 1.0 + square2, 1.0 + square3
    if L2NORM:
        norm0, norm1 = tl.rsqrt(square0 + EPS), tl.rsqrt(square1 + EPS)
        norm2, norm3 = tl.rsqrt(square2 + EPS), tl.rsqrt(square3 + EPS)
    c0, f0 = split_sum(step0)
    c1, f1 = _sum_after(c0, f0, step1)
    c2, f2 = _sum_after(c1, f1, step2)
    c3, f3 = _sum_after(c2, f2, step3)
    rate0, rate1, rate2, rate3 = rate0 * norm0, rate1 * norm1, rate2 * norm2, rate3 * norm3
    strict = lines[:, None] > columns[None, :]
    below = lines[:, None] >= 0
    a00 *= rate0[:, None] * norm0[None, :] * decay_between(c0, f0, c0, f0, strict)
    a11 *= rate1[:, None] * norm1[None, :] * decay_between(c1, f1, c1, f1, strict)
    a22 *= rate2[:, None] * norm2[None, :] * decay_between(c2, f2, c2, f2, strict)
    a33 *= rate3[:, None] * norm3[None, :] * decay_between(c3, f3, c3, f3, strict)
    a10 *= rate1[:, None] * norm0[None, :] * decay_between(c1, f1, c0, f0, below)
    a20 *= rate2[:, None] * norm0[None, :] * decay_between(c2, f2, c0, f0, below)
    a21 *= rate2[:, None] * norm1[None, :] * decay_between(c2, f2, c1, f1, below)
    a30 *= rate3[:, None] * norm0[None, :] * decay_between(c3, f3, c0, f0, below)
    a31 *= rate3[:, None] * norm1[None, :] * decay_between(c3, f3, c1, f1, below)
    a32 *= rate3[:, None] * norm2[None, :] * decay_between(c3, f3, c2, f2, below)

    # the four triangles side by side, [16, 16, 2, 2]
    a = tl.join(tl.join(a00, a22), tl.join(a11, a33))
    line, column = lines[:, None, None, None], columns[None, :, None, None]
    x = tl.where(line == column, 1.0, a * 0.0)
    for j in range(15):
        # column j of A times row j of the solution is taken off
        below_j = tl.sum(tl.where(column == j, a, 0.0), 1, keep_dims=True)
        x -= below_j * tl.sum(tl.where(line == j, x, 0.0), 0, keep_dims=True)
    even, odd = tl.split(x)
    x00, x22 = tl.split(even)
    x11, x33 = tl.split(odd)
    # row by row of blocks: X_ij = -X_ii Σ_l A_il X_lj
    x10 = _minus(x11, _product(a10, x00, 0.0, DOT, PRECISION), DOT, PRECISION)
    x21 = _minus(x22, _product(a21, x11, 0.0, DOT, PRECISION), DOT, PRECISION)
    x32 = _minus(x33, _product(a32, x22, 0.0, DOT, PRECISION), DOT, PRECISION)
    sum20 = _product(a21, x10, _product(a20, x00, 0.0, DOT, PRECISION), DOT, PRECISION)
    x20 = _minus(x22, sum20, DOT, PRECISION)
    sum31 = _product(a32, x21, _product(a31, x11, 0.0, DOT, PRECISION), DOT, PRECISION)
    x31 = _minus(x33, sum31, DOT, PRECISION)
    sum30 = _product(a31, x10, _product(a30, x00, 0.0, DOT, PRECISION), DOT, PRECISION)
    x30 = _minus(x33, _product(a32, x20, sum30, DOT, PRECISION), DOT, PRECISION)

    at = solve + (slot.to(tl.int64) * HV + hv) * 4096 + lines[:, None] * 64 + columns[None, :]
    _store_row(at, x00, tl.zeros_like(x00), tl.zeros_like(x00), tl.zeros_like(x00))
    _store_row(at + 1024, x10, x11, tl.zeros_like(x00), tl.zeros_like(x00))
    _store_row(at + 2048, x20, x21, x22, tl.zeros_like(x00))
    _store_row(at + 3072, x30, x31, x32, x33)


@triton.jit
def _store_row(at, a, b, c, d):
    tl.store(at, a.to(at.dtype.element_ty))
    tl.store(at + 16, b.to(at.dtype.element_ty))
    tl.store(at + 32, c.to(at.dtype.element_ty))
    tl.store(at + 48, d.to(at.dtype.element_ty))


@triton.jit
def replace_in_chunk(
    old, k_tile, k_decay, rate, solve, n, first, length, i, hv, HV, state,
    C: tl.constexpr, ERASE: tl.constexpr, HAS_BETA: tl.constexpr, PACKED: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """R, what a chunk writes along its keys, from its values and the state at its start."""
    written = old.to(tl.float32)
    if ERASE:
        written -= k_decay[:, None] * dot(k_tile, state, DOT, PRECISION)
    if HAS_BETA:
        written *= rate[:, None]
    if ERASE:
        written = fine_dot(load_solve(solve, n, first, length, i, hv, HV, C, PACKED), written, DOT, PRECISION)
    return written


@triton.jit(do_not_specialize=UNSPECIALIZED)
def scan_forward(
    q, k, v, beta, g, a_log, dt_bias, mask, cu, initial, solve, out, final, states, scale,
    length, span, sequences, halvings,
    H: tl.constexpr, HV: tl.constexpr, R: tl.constexpr, SHARE: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, ERASE: tl.constexpr, HAS_BETA: tl.constexpr,
    RANGE: tl.constexpr, HAS_G: tl.constexpr, RAW_G: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr,
    HAS_STATE: tl.constexpr, L2NORM: tl.constexpr, KEEP: tl.constexpr, SEGMENTED: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs and final state of one sequence, one value head and BV of its value columns. With SEGMENTED, outputs of
    one segment, whose `initial` state `carry` has left."""
    parts: tl.constexpr = (V + BV - 1) // BV
    pair = tl.program_id(0) // parts
    hv, h, n, first, count, slot, start, end = chunks_to_walk(
        pair, cu, length, span, sequences, halvings, H, HV, C, PACKED, SEGMENTED
    )
    rows, keys = tl.arange(0, C), tl.arange(0, BK)
    values = (tl.program_id(0) % parts) * BV + tl.arange(0, BV)
    lower = rows[:, None] >= tl.arange(0, C)[None, :]
    state = tl.zeros([BK, BV], tl.float32)
    if HAS_STATE:
        state = load_matrix(initial, pair.to(tl.int64), keys, values, K, V)

    for i in range(start, end):
        at = first + i * C
        here = rows < count - i * C
        valid = valid_rows(mask, at, rows, here, HAS_MASK)
        k_tile = load_tile(k, at, h, H, K, rows, keys, valid)
        k_norm = inverse_length(k_tile, L2NORM)
        step, _ = load_step(g, a_log, dt_bias, at, hv, HV, rows, valid, HAS_G, RAW_G)
        coarse, fine, decay, remaining, left = decay_of(step, rows)
        v_tile = load_tile(v, at, hv, HV, V, rows, values, valid)
        rate = load_rate(beta, at, hv, HV, rows, valid, HAS_BETA, RANGE)
        written = replace_in_chunk(
            v_tile, k_tile, decay * k_norm, rate, solve, n, first, length, i, hv, HV, state,
            C, ERASE, HAS_BETA, PACKED, DOT, PRECISION,
        )  # fmt: skip
        if KEEP:
            store_matrix(states, (slot + i) * HV + hv, keys, values, K, V, state)
        gamma = decay_between(coarse, fine, coarse, fine, lower)
        for r in range(R):
            hq, heads = query_head(hv * R + r, h, HV * R, H, SHARE)
            q_tile = load_tile(q, at, hq, heads, K, rows, keys, valid)
            q_norm = scale * inverse_length(q_tile, L2NORM)
            reads = dot(q_tile, tl.trans(k_tile), DOT, PRECISION) * gamma * q_norm[:, None] * k_norm[None, :]
            o = (q_norm * decay)[:, None] * dot(q_tile, state, DOT, PRECISION)
            o += dot(reads, written, DOT, PRECISION)
            store_tile(out, at, hv * R + r, HV * R, V, rows, values, here, o)
        state = left * state
        state += dot(tl.trans(k_tile), (remaining * k_norm)[:, None] * written, DOT, PRECISION)
    if not SEGMENTED:
        store_matrix(final, pair.to(tl.int64), keys, values, K, V, state)
