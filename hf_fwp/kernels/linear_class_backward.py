"""Backward kernels of the linear class; the letters are those of rules/chunked.py.

    scan_backward    from the last chunk to the first: dY, and dS after every chunk
    gradients        parallel over chunks: dq, dk, dv, dβ, dg, from S0, dS, dY and the inputs; R is computed again

With N = -(β dY Rᵀ) ⊙ Γ (strict), Ω = (dO Rᵀ) ⊙ Γ, and the erase gradient along its key,
    η = -exp(G) Σ_v dY ⊙ (K S0) - Σ_j (dY Rᵀ)_ij Γ_ij (k_i·k_j):
    dβ = η + Σ_v dY ⊙ V            dG = Σ_k (Q ⊙ dQ - K ⊙ dK) + 2 β η,   dG_C += ⟨S1, dS1⟩
"""

# pyright: reportGeneralTypeIssues=false
# (the bodies of kernels are another language)

import triton
import triton.language as tl

from .linear_class_forward import UNSPECIALIZED
from .tiles import (
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
    store_matrix,
    store_tile,
    valid_rows,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def scan_backward(
    q, k, beta, g, a_log, dt_bias, mask, cu, solve, d_out, d_final, d_initial, d_states, d_written, scale,
    length, span, sequences, halvings,
    H: tl.constexpr, HV: tl.constexpr, R: tl.constexpr, SHARE: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, ERASE: tl.constexpr, HAS_BETA: tl.constexpr,
    RANGE: tl.constexpr, HAS_G: tl.constexpr, RAW_G: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr,
    HAS_FINAL: tl.constexpr, L2NORM: tl.constexpr, KEEP: tl.constexpr, SEGMENTED: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dY, and dS at the end of every chunk and at the start, of one sequence, value head and BV value columns. With
    SEGMENTED, of one segment: first dS at its start alone, then with KEEP the rest."""
    parts: tl.constexpr = (V + BV - 1) // BV
    pair = tl.program_id(0) // parts
    hv, h, n, first, count, slot, start, end = chunks_to_walk(
        pair, cu, length, span, sequences, halvings, H, HV, C, PACKED, SEGMENTED
    )
    rows, keys = tl.arange(0, C), tl.arange(0, BK)
    values = (tl.program_id(0) % parts) * BV + tl.arange(0, BV)
    lower = rows[:, None] >= tl.arange(0, C)[None, :]
    d_state = tl.zeros([BK, BV], tl.float32)
    if HAS_FINAL:
        d_state = load_matrix(d_final, pair.to(tl.int64), keys, values, K, V)

    for back in range(start, end):
        i = end - 1 - (back - start)
        at = first + i * C
        here = rows < count - i * C
        valid = valid_rows(mask, at, rows, here, HAS_MASK)
        k_tile = load_tile(k, at, h, H, K, rows, keys, valid)
        k_norm = inverse_length(k_tile, L2NORM)
        step, _ = load_step(g, a_log, dt_bias, at, hv, HV, rows, valid, HAS_G, RAW_G)
        coarse, fine, decay, remaining, after = decay_of(step, rows)
        if KEEP:
            store_matrix(d_states, (slot + i) * HV + hv, keys, values, K, V, d_state)
        dw = (remaining * k_norm)[:, None] * dot(k_tile, d_state, DOT, PRECISION)
        d_state = after * d_state
        gamma = decay_between(coarse, fine, coarse, fine, lower)
        for r in range(R):
            hq, heads = query_head(hv * R + r, h, HV * R, H, SHARE)
            q_tile = load_tile(q, at, hq, heads, K, rows, keys, valid)
            q_norm = scale * inverse_length(q_tile, L2NORM)
            do = load_tile(d_out, at, hv * R + r, HV * R, V, rows, values, valid).to(tl.float32)
            reads = dot(q_tile, tl.trans(k_tile), DOT, PRECISION) * gamma * q_norm[:, None] * k_norm[None, :]
            dw += dot(tl.trans(reads), do, DOT, PRECISION)
            d_state += dot(tl.trans(q_tile), (q_norm * decay)[:, None] * do, DOT, PRECISION)
        if ERASE:
            t = load_solve(solve, n, first, length, i, hv, HV, C, PACKED)
            dw = fine_dot(tl.trans(t), dw, DOT, PRECISION)
            rate = load_rate(beta, at, hv, HV, rows, valid, HAS_BETA, RANGE) * decay * k_norm
            d_state -= dot(tl.trans(k_tile), rate[:, None] * dw, DOT, PRECISION)
        if KEEP:
            store_tile(d_written, at, hv, HV, V, rows, values, here, tl.where(valid[:, None], dw, 0.0))
    if not (SEGMENTED and KEEP):
        store_matrix(d_initial, pair.to(tl.int64), keys, values, K, V, d_state)


@triton.jit
def _through_length(gradient, x, norm):
    """The gradient of x from that of x / |x|; `norm` is 1 / |x|."""
    x = x.to(tl.float32)
    along = norm * norm * tl.sum(x * gradient, 1)
    return (gradient - x * along[:, None]) * norm[:, None]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def gradients(
    q, k, v, beta, g, a_log, dt_bias, mask, cu, solve, states, d_states, d_written, d_out,
    dq, dk, dv, d_beta, d_g, d_rates, scale, length, span, sequences, halvings,
    H: tl.constexpr, HV: tl.constexpr, R: tl.constexpr, SHARE: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, ERASE: tl.constexpr, HAS_BETA: tl.constexpr,
    RANGE: tl.constexpr, HAS_G: tl.constexpr, RAW_G: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr,
    L2NORM: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one chunk and one key head, from its readers (query heads) one after the other.

    What does not depend on the query is added by the first reader of a state. With RAW_G, `d_rates` [slots, HV, 2]
    gets this chunk's part of the gradients of A and d.
    """
    readers: tl.constexpr = HV // H * R
    slot, h = tl.program_id(0) // H, tl.program_id(0) % H
    n, i, at, left = chunk_in_slot(slot.to(tl.int64), cu, length, sequences, halvings, C, PACKED)
    if left <= 0:
        return
    rows, keys = tl.arange(0, C), tl.arange(0, BK)
    here = rows < left
    valid = valid_rows(mask, at, rows, here, HAS_MASK)
    earlier = rows[:, None] > tl.arange(0, C)[None, :]
    d_q = tl.zeros([C, BK], tl.float32)
    d_k = tl.zeros([C, BK], tl.float32)
    d_step = tl.zeros([C], tl.float32)  # dg of a state, over its readers
    for member in tl.range(0, readers, disable_licm=True):
        reader = h * readers + member
        hv = reader // R
        leads, ends = member % R == 0, member % R == R - 1
        hq, heads = query_head(reader, h, HV * R, H, SHARE)
        k_tile = load_tile(k, at, h, H, K, rows, keys, valid)
        q_tile = load_tile(q, at, hq, heads, K, rows, keys, valid)
        k_norm, q_norm = inverse_length(k_tile, L2NORM), inverse_length(q_tile, L2NORM)
        step, slope = load_step(g, a_log, dt_bias, at, hv, HV, rows, valid, HAS_G, RAW_G)
        coarse, fine, decay, remaining, after = decay_of(step, rows)
        rate = load_rate(beta, at, hv, HV, rows, valid, HAS_BETA, RANGE)
        share = tl.where(leads, 1.0, 0.0)
        index = slot.to(tl.int64) * HV + hv

        if not SHARE:
            d_q = tl.zeros([C, BK], tl.float32)
        # what readers before this one have left
        along_q_before = q_norm * tl.sum(q_tile.to(tl.float32) * d_q, 1)
        along_k_before = k_norm * tl.sum(k_tile.to(tl.float32) * d_k, 1)
        omega = tl.zeros([C, C], tl.float32)
        erased = tl.zeros([C, C], tl.float32)
        along_value = tl.zeros([C], tl.float32)  # Σ_v dY ⊙ V
        along_key = tl.zeros([C], tl.float32)  # exp(G) Σ_v dY ⊙ (K S0)
        along_state = 0.0  # ⟨S0, dS1⟩
        if ERASE:
            t = load_solve(solve, n, at - i * C, length, i, hv, HV, C, PACKED)
        for part in tl.range(0, V, BV, disable_licm=True):
            values = part + tl.arange(0, BV)
            s = load_matrix(states, index, keys, values, K, V)
            ds = load_matrix(d_states, index, keys, values, K, V)
            v_tile = load_tile(v, at, hv, HV, V, rows, values, valid).to(tl.float32)
            dw = load_tile(d_written, at, hv, HV, V, rows, values, valid).to(tl.float32)
            do = load_tile(d_out, at, reader, HV * R, V, rows, values, valid)
            written = v_tile
            if ERASE:
                old = (decay * k_norm)[:, None] * dot(k_tile, s, DOT, PRECISION)
                written -= old
                along_key += tl.sum(dw * old, 1)
            if HAS_BETA:
                written *= rate[:, None]
            if ERASE:
                written = fine_dot(t, written, DOT, PRECISION)
                erased += dot(dw, tl.trans(written), DOT, PRECISION)
                d_k -= dot((share * rate * decay)[:, None] * dw, tl.trans(s), DOT, PRECISION)
            omega += dot(do, tl.trans(written), DOT, PRECISION)
            d_q += (scale * decay)[:, None] * dot(do, tl.trans(s), DOT, PRECISION)
            d_k += dot((share * remaining)[:, None] * written, tl.trans(ds), DOT, PRECISION)
            along_value += tl.sum(dw * v_tile, 1)
            along_state += tl.sum(s.to(tl.float32) * ds.to(tl.float32))
            if HAS_BETA:
                store_tile(dv, at, hv, HV, V, rows, values, here & leads, rate[:, None] * dw)

        # loaded again: kept over the loop they would take registers from the sums
        k_tile = load_tile(k, at, h, H, K, rows, keys, valid)
        q_tile = load_tile(q, at, hq, heads, K, rows, keys, valid)
        gamma = decay_between(coarse, fine, coarse, fine, rows[:, None] >= tl.arange(0, C)[None, :])
        omega *= scale * gamma
        along_end = k_norm * tl.sum(k_tile.to(tl.float32) * d_k, 1) - along_k_before
        along_state = share * along_state * after + tl.sum(along_end, 0)
        along_state += share * tl.sum(rate * along_key, 0)
        if HAS_G and tl.float32 != DOT:
            later = q_norm * tl.sum(q_tile.to(tl.float32) * d_q, 1) - along_q_before
            later -= along_end + 2.0 * share * rate * along_key
            met = omega * dot(q_tile, tl.trans(k_tile), DOT, PRECISION) * q_norm[:, None] * k_norm[None, :]
            met = tl.where(earlier, met, 0.0)
            later += tl.sum(met, 1) - tl.sum(met, 0)
        d_q += dot(omega * k_norm[None, :], k_tile, DOT, PRECISION)
        d_k += dot(tl.trans(omega * q_norm[:, None]), q_tile, DOT, PRECISION)
        eta = -along_key
        if ERASE:
            erased *= tl.where(earlier, gamma, 0.0)
            similar = dot(k_tile, tl.trans(k_tile), DOT, PRECISION) * k_norm[:, None] * k_norm[None, :]
            eta -= tl.sum(erased * similar, 1)
            erased *= (share * rate)[:, None]
            if HAS_G and tl.float32 != DOT:
                later += tl.sum(erased * similar, 0) - tl.sum(erased * similar, 1)
            d_k -= dot((erased + tl.trans(erased)) * k_norm[None, :], k_tile, DOT, PRECISION)
        if HAS_BETA:
            at_row = at * HV + hv + rows * HV
            found = tl.where(valid, eta + along_value, 0.0)
            if RANGE > 0.0:
                found *= rate * (1.0 - rate / RANGE)
            tl.store(d_beta + at_row, found.to(d_beta.dtype.element_ty), mask=here & leads)
        if HAS_G:
            # dG: in float32 by the identity Σ Q dQ - K dK + 2 ε; where operands are rounded, by what exp(G) multiplies,
            # one after the other, since the identity would keep what rounding leaves of dQ and dK
            if tl.float32 == DOT:
                later = q_norm * tl.sum(q_tile.to(tl.float32) * d_q, 1) - along_q_before
                later -= k_norm * tl.sum(k_tile.to(tl.float32) * d_k, 1) - along_k_before
                later += 2.0 * share * rate * eta
            found = tl.where(valid, tl.sum(later, 0) - tl.cumsum(later, 0) + later + along_state, 0.0)
            d_step = tl.where(leads, found, d_step + found)
            found = d_step
            if RAW_G:
                at_rates = d_rates + (slot.to(tl.int64) * HV + hv) * 2
                tl.store(at_rates, tl.sum(found * step, 0), mask=ends)
                found = tl.where(valid, found * slope, 0.0)
                tl.store(at_rates + 1, tl.sum(found, 0), mask=ends)
            tl.store(d_g + at * HV + hv + rows * HV, found.to(d_g.dtype.element_ty), mask=here & ends)
        # a query of this reader alone, or of all of them
        if not SHARE or member == readers - 1:
            if L2NORM:
                d_q = _through_length(d_q, q_tile, q_norm)
            store_tile(dq, at, hq, heads, K, rows, keys, here, d_q)
    if L2NORM:
        k_tile = load_tile(k, at, h, H, K, rows, keys, valid)
        d_k = _through_length(d_k, k_tile, inverse_length(k_tile, L2NORM))
    store_tile(dk, at, h, H, K, rows, keys, here, d_k)
