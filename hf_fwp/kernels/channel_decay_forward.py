"""Forward kernels of the channel decay; the letters are those of rules/general.py, with a rate β for e and u.

    prepare_chunks   parallel over chunks: T = (I + A)⁻¹ and P
    scan_forward     from chunk to chunk:  R = T (β (U - (E ⊙ exp(G)) S0)),  O,  S1;  S0 is kept for the backward only

P goes to memory beside T: every program of the scan serves a few value columns only and would compute it again.
"""

# pyright: reportGeneralTypeIssues=false
# (the bodies of kernels are another language)

import triton
import triton.language as tl

from .channel_decay_tiles import chunk_decay, inverse, level_decay, load_erase, load_steps, meets
from .tiles import (
    EPS,
    chunk_in_slot,
    dot,
    first_slot,
    inverse_length,
    load_matrix,
    load_rate,
    load_tile,
    sequence_span,
    solve_dot,
    store_matrix,
    store_tile,
    valid_rows,
)


@triton.jit(do_not_specialize=["length", "sequences", "halvings"])
def prepare_chunks(
    q, k, erase, beta, g, mask, cu, solve, reads, scale, length, sequences, halvings,
    H: tl.constexpr, HV: tl.constexpr, R: tl.constexpr, SHARE: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
    KB: tl.constexpr, LEVELS: tl.constexpr, GK: tl.constexpr,
    HAS_ERASE: tl.constexpr, HAS_BETA: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr,
    HAS_READS: tl.constexpr, L2NORM: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """T and, with HAS_READS, P of one chunk and query head; T is stored by the first reader of a state."""
    slot, reader = tl.program_id(0) // (HV * R), tl.program_id(0) % (HV * R)
    hv = reader // R
    h = hv // (HV // H)
    if SHARE:
        hq, heads = h, H
    else:
        hq, heads = reader, HV * R
    _n, _i, at, left = chunk_in_slot(slot.to(tl.int64), cu, length, sequences, halvings, C, PACKED)
    if left <= 0:
        return
    rows, others = tl.arange(0, C), tl.arange(0, C)
    valid = valid_rows(mask, at, rows, rows < left, HAS_MASK)
    rate = load_rate(beta, at, hv, HV, rows, valid, HAS_BETA, 0)
    a = tl.zeros([C, C], tl.float32)
    p = tl.zeros([C, C], tl.float32)
    same = tl.zeros([C], tl.float32)
    k_square = tl.zeros([C], tl.float32)
    q_square = tl.zeros([C], tl.float32)
    for part in range(0, K, KB):
        keys = part + tl.arange(0, KB)
        k_tile = load_tile(k, at, h, H, K, rows, keys, valid).to(tl.float32)
        if HAS_READS:
            q_tile = load_tile(q, at, hq, heads, K, rows, keys, valid).to(tl.float32)
            same += tl.sum(q_tile * k_tile, 1)
        e_tile = load_erase(erase, k_tile, at, hv, HV, rows, keys, valid, K, HAS_ERASE)
        step = load_steps(g, at, hv, HV, rows, keys, valid, K, GK)
        if L2NORM:
            k_square += tl.sum(k_tile * k_tile, 1)
            q_square += tl.sum(q_tile * q_tile, 1)
        for level in range(LEVELS):
            decay = level_decay(step, level, DOT, PRECISION)
            earlier, met = tl.trans(k_tile * decay), meets(level, C)
            a += tl.where(met, dot(e_tile * decay, earlier, DOT, PRECISION), 0.0)
            if HAS_READS:
                p += tl.where(met, dot(q_tile * decay, earlier, DOT, PRECISION), 0.0)
    p = tl.where(rows[:, None] == others[None, :], same[:, None], p) * scale
    a *= rate[:, None]
    if L2NORM:
        k_norm = tl.rsqrt(k_square + EPS)
        p *= tl.rsqrt(q_square + EPS)[:, None] * k_norm[None, :]
        a *= k_norm[:, None] * k_norm[None, :]
    if HAS_READS:
        store_matrix(reads, slot.to(tl.int64) * (HV * R) + reader, rows, others, C, C, p)
    if reader % R == 0:
        store_matrix(solve, slot.to(tl.int64) * HV + hv, rows, others, C, C, inverse(a, LEVELS, PRECISION))


@triton.jit(do_not_specialize=["length"])
def scan_forward(
    q, k, erase, v, beta, g, mask, cu, initial, solve, reads, out, final, states, scale, length,
    H: tl.constexpr, HV: tl.constexpr, R: tl.constexpr, SHARE: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, GK: tl.constexpr,
    HAS_ERASE: tl.constexpr, HAS_BETA: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_READS: tl.constexpr, L2NORM: tl.constexpr, KEEP: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs and final state of one sequence, one value head and BV of its value columns; without HAS_READS the
    outputs are R."""
    parts: tl.constexpr = (V + BV - 1) // BV
    pair = tl.program_id(0) // parts
    n, hv = pair // HV, pair % HV
    h = hv // (HV // H)
    first, count = sequence_span(n, cu, length, PACKED)
    slot = first_slot(n, first, length, C, PACKED)
    rows, others, keys = tl.arange(0, C), tl.arange(0, C), tl.arange(0, BK)
    values = (tl.program_id(0) % parts) * BV + tl.arange(0, BV)
    state = tl.zeros([BK, BV], tl.float32)
    if HAS_STATE:
        state = load_matrix(initial, pair.to(tl.int64), keys, values, K, V)

    for i in range(0, tl.cdiv(count, C)):
        at = first + i * C
        here = rows < count - i * C
        valid = valid_rows(mask, at, rows, here, HAS_MASK)
        decay, remaining, left = chunk_decay(load_steps(g, at, hv, HV, rows, keys, valid, K, GK))
        k_tile = load_tile(k, at, h, H, K, rows, keys, valid).to(tl.float32)
        k_tile *= inverse_length(k_tile, L2NORM)[:, None]
        e_tile = load_erase(erase, k_tile, at, hv, HV, rows, keys, valid, K, HAS_ERASE)
        written = load_tile(v, at, hv, HV, V, rows, values, valid).to(tl.float32)
        written -= dot(e_tile * decay, state, DOT, PRECISION)
        if HAS_BETA:
            written *= load_rate(beta, at, hv, HV, rows, valid, HAS_BETA, 0)[:, None]
        t = load_matrix(solve, (slot + i) * HV + hv, rows, others, C, C)
        written = solve_dot(t, written, DOT, PRECISION)
        if KEEP:
            store_matrix(states, (slot + i) * HV + hv, keys, values, K, V, state)
        if HAS_READS:
            for r in range(R):
                if SHARE:
                    hq, heads = h, H
                else:
                    hq, heads = hv * R + r, HV * R
                q_tile = load_tile(q, at, hq, heads, K, rows, keys, valid).to(tl.float32)
                q_norm = scale * inverse_length(q_tile, L2NORM)
                o = q_norm[:, None] * dot(q_tile * decay, state, DOT, PRECISION)
                p = load_matrix(reads, (slot + i) * (HV * R) + hv * R + r, rows, others, C, C)
                o += dot(p, written, DOT, PRECISION)
                store_tile(out, at, hv * R + r, HV * R, V, rows, values, here, o)
        else:
            store_tile(out, at, hv, HV, V, rows, values, here, written)
        state = left[:, None] * state
        state += dot(tl.trans(k_tile * remaining), written, DOT, PRECISION)
    store_matrix(final, pair.to(tl.int64), keys, values, K, V, state)
