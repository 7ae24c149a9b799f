"""Forward kernels of the channel decay; the letters are those of rules/general.py, with a rate β for e and u.

    invert_chunks   parallel over chunks: T = (I + A)⁻¹
    scan_forward    from chunk to chunk:  R = T (β (U - (E ⊙ exp(G)) S0)),  P,  O,  S1;  S0 kept for the backward only
    scan_across     the same, but read along the values:
                    o_i = exp(G_i) ⊙ (S0 q_i) + Σ_{j≤i} (q_i · r_j) exp(G_i - G_j) ⊙ k_j

A and P are sums of log2 C products of C x C x K each. P stays on the chip: every program of the scan computes it, which
for C = 64 costs 6 C² K multiplications beside the 3 C K BV + 2 C² BV of its other products.
"""

# pyright: reportGeneralTypeIssues=false
# (the bodies of kernels are another language)

import triton
import triton.language as tl

from .channel_decay_tiles import (
    inverse,
    inverse_lengths,
    level_decay,
    load_erase,
    load_keys,
    load_queries,
    load_steps,
    load_turned,
    load_values,
    meets,
    next_level,
    pair_products,
    replace_in_chunk,
    store_turned,
)
from .linear_class_forward import UNSPECIALIZED
from .tiles import (
    chunk_in_slot,
    chunks_to_walk,
    dot,
    load_matrix,
    load_rate,
    load_tile,
    store_matrix,
    store_tile,
    valid_rows,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def invert_chunks(
    k, erase, write, beta, g, a_log, dt_bias, mask, cu, solve, length, span, sequences, halvings,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, C: tl.constexpr, KB: tl.constexpr, LEVELS: tl.constexpr,
    GK: tl.constexpr, RAW_G: tl.constexpr, LOWER: tl.constexpr, ERASE: tl.constexpr, ERASE_RANGE: tl.constexpr,
    HAS_BETA: tl.constexpr, RANGE: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr, L2NORM: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """T of one chunk and value head."""
    slot, hv = tl.program_id(0) // HV, tl.program_id(0) % HV
    h = hv // (HV // H)
    gate = (g, a_log, dt_bias)
    _, _, at, left = chunk_in_slot(slot.to(tl.int64), cu, length, sequences, halvings, C, PACKED)
    if left <= 0:
        return
    rows = tl.arange(0, C)
    valid = valid_rows(mask, at, rows, rows < left, HAS_MASK)
    if ERASE > 0:
        a, _ = pair_products(
            erase, k, gate, at, hv, HV, h, H, hv, HV, rows, valid, K, KB, LEVELS, GK, RAW_G, LOWER, ERASE == 2,
            ERASE_RANGE, DOT, PRECISION,
        )  # fmt: skip
    else:
        a, _ = pair_products(
            k, k, gate, at, h, H, h, H, hv, HV, rows, valid, K, KB, LEVELS, GK, RAW_G, LOWER, False, 0.0, DOT,
            PRECISION,
        )  # fmt: skip
    k_norm = inverse_lengths(k, at, h, H, rows, valid, K, KB, L2NORM)
    rate = load_rate(beta, at, hv, HV, rows, valid, HAS_BETA, RANGE)
    a *= (rate * k_norm)[:, None] * k_norm[None, :]
    store_matrix(solve, slot.to(tl.int64) * HV + hv, rows, tl.arange(0, C), C, C, inverse(a, LEVELS, DOT, PRECISION))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def scan_forward(
    q, k, v, erase, write, beta, g, a_log, dt_bias, mask, cu, initial, solve, out, final, states, scale, length, span,
    sequences, halvings,
    H: tl.constexpr, HV: tl.constexpr, R: tl.constexpr, SHARE: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, KB: tl.constexpr, LEVELS: tl.constexpr, GK: tl.constexpr,
    RAW_G: tl.constexpr, LOWER: tl.constexpr, ERASE: tl.constexpr, ERASE_RANGE: tl.constexpr, HAS_WRITE: tl.constexpr,
    WRITE_RANGE: tl.constexpr, HAS_BETA: tl.constexpr, RANGE: tl.constexpr, HAS_MASK: tl.constexpr,
    PACKED: tl.constexpr, HAS_STATE: tl.constexpr, L2NORM: tl.constexpr, KEEP: tl.constexpr, SEGMENTED: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs and final state of one sequence, one value head and BV of its value columns. With SEGMENTED, outputs of
    one segment, whose `initial` state `carry` has left."""
    parts: tl.constexpr = (V + BV - 1) // BV
    pair = tl.program_id(0) // parts
    hv, h, _n, first, count, slot, start, end = chunks_to_walk(
        pair, cu, length, span, sequences, halvings, H, HV, C, PACKED, SEGMENTED
    )
    gate = (g, a_log, dt_bias)
    rows, keys = tl.arange(0, C), tl.arange(0, BK)
    values = (tl.program_id(0) % parts) * BV + tl.arange(0, BV)
    state = tl.zeros([BK, BV], tl.float32)
    if HAS_STATE:
        state = load_matrix(initial, pair.to(tl.int64), keys, values, K, V)

    for i in tl.range(start, end, disable_licm=True):
        at = first + i * C
        here = rows < count - i * C
        valid = valid_rows(mask, at, rows, here, HAS_MASK)
        k_tile, k_norm, decay, remaining, left = load_keys(
            k, gate, at, h, H, hv, HV, rows, keys, valid, K, GK, RAW_G, LOWER, L2NORM
        )  # fmt: skip
        e_tile = load_erase(erase, k_tile, at, hv, HV, rows, keys, valid, K, ERASE, ERASE_RANGE)
        v_tile = load_values(v, write, at, hv, HV, rows, values, valid, V, HAS_WRITE, WRITE_RANGE)
        rate = load_rate(beta, at, hv, HV, rows, valid, HAS_BETA, RANGE)
        kept = (slot + i) * HV + hv
        written = replace_in_chunk(v_tile, e_tile * decay, rate, solve, kept, state, C, DOT, PRECISION)
        if KEEP:
            store_matrix(states, kept, keys, values, K, V, state)
        for r in range(R):
            p, q_tile, q_norm = load_queries(
                q, k, k_norm, gate, at, hv * R + r, HV * R, h, H, hv, HV, rows, keys, valid, scale,
                SHARE, K, KB, LEVELS, GK, RAW_G, LOWER, L2NORM, DOT, PRECISION,
            )  # fmt: skip
            o = q_norm[:, None] * dot(q_tile * decay, state, DOT, PRECISION)
            o += dot(p, written, DOT, PRECISION)
            store_tile(out, at, hv * R + r, HV * R, V, rows, values, here, o)
        state = left[:, None] * state
        state += dot(tl.trans(k_tile * remaining), written, DOT, PRECISION)
    if not SEGMENTED:
        store_matrix(final, pair.to(tl.int64), keys, values, K, V, state)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def scan_across(
    q, k, v, erase, write, beta, g, a_log, dt_bias, mask, cu, initial, solve, out, room, states, scale, length, span,
    sequences, halvings,
    H: tl.constexpr, HV: tl.constexpr, R: tl.constexpr, SHARE: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, GK: tl.constexpr, RAW_G: tl.constexpr,
    LOWER: tl.constexpr, ERASE: tl.constexpr, ERASE_RANGE: tl.constexpr, HAS_WRITE: tl.constexpr,
    WRITE_RANGE: tl.constexpr, HAS_BETA: tl.constexpr, RANGE: tl.constexpr, HAS_MASK: tl.constexpr,
    PACKED: tl.constexpr, HAS_STATE: tl.constexpr, L2NORM: tl.constexpr, KEEP: tl.constexpr, SEGMENTED: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs and final state of one sequence or segment and one value head. An output takes all columns of the state,
    which need not fit the chip together: it lies in `room`, where the final state will be, and is walked through by BV
    columns in every chunk. States of whole sequences are turned, [V, K]."""
    pair = tl.program_id(0)
    hv, h, _n, first, count, slot, start, end = chunks_to_walk(
        pair, cu, length, span, sequences, halvings, H, HV, C, PACKED, SEGMENTED
    )
    gate = (g, a_log, dt_bias)
    index = pair.to(tl.int64)
    rows, others, keys = tl.arange(0, C), tl.arange(0, C), tl.arange(0, BK)
    if not SEGMENTED:
        for part in range(0, V, BV):
            values = part + tl.arange(0, BV)
            state = tl.zeros([BK, BV], tl.float32)
            if HAS_STATE:
                state = load_turned(initial, index, keys, values, K, V, True)
            store_turned(room, index, keys, values, K, V, state, True)
        tl.debug_barrier()  # the state is read by other threads than wrote it

    for i in tl.range(start, end, disable_licm=True):
        at = first + i * C
        here = rows < count - i * C
        valid = valid_rows(mask, at, rows, here, HAS_MASK)
        k_tile, _, decay, remaining, left = load_keys(
            k, gate, at, h, H, hv, HV, rows, keys, valid, K, GK, RAW_G, LOWER, L2NORM
        )  # fmt: skip
        e_tile = load_erase(erase, k_tile, at, hv, HV, rows, keys, valid, K, ERASE, ERASE_RANGE)
        rate = load_rate(beta, at, hv, HV, rows, valid, HAS_BETA, RANGE)
        kept = (slot + i) * HV + hv
        for r in range(R):
            o = tl.zeros([C, BK], tl.float32)
            similar = tl.zeros([C, C], tl.float32)
            for part in tl.range(0, V, BV, disable_licm=True):
                values = part + tl.arange(0, BV)
                state = load_turned(room, index, keys, values, K, V, not SEGMENTED)
                v_tile = load_values(v, write, at, hv, HV, rows, values, valid, V, HAS_WRITE, WRITE_RANGE)
                written = replace_in_chunk(v_tile, e_tile * decay, rate, solve, kept, state, C, DOT, PRECISION)
                q_tile = load_tile(q, at, hv * R + r, HV * R, V, rows, values, valid)
                o += dot(q_tile, tl.trans(state), DOT, PRECISION)
                similar += dot(q_tile, tl.trans(written), DOT, PRECISION)
                if r == R - 1:  # every query has met the state
                    if KEEP:
                        store_matrix(states, kept, keys, values, K, V, state)
                    state = left[:, None] * state
                    state += dot(tl.trans(k_tile * remaining), written, DOT, PRECISION)
                    store_turned(room, index, keys, values, K, V, state, not SEGMENTED)
            itself = tl.sum(tl.where(rows[:, None] == others[None, :], similar, 0.0), 1)
            o = o * decay + itself[:, None] * k_tile
            before = load_steps(gate, at, hv, HV, rows, keys, valid, K, GK, RAW_G, LOWER)
            after = before * 0.0
            for level in range(LEVELS):
                between = level_decay(before, after, level)
                o += between * dot(tl.where(meets(level, C), similar, 0.0), k_tile * between, DOT, PRECISION)
                before, after = next_level(before, after, level)
            store_tile(out, at, hv * R + r, HV * R, K, rows, keys, here, scale * o)
        tl.debug_barrier()
