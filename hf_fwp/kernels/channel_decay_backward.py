"""Backward kernels of the channel decay; the letters are those of rules/general.py, with a rate β for e and u.

    scan_backward    from the last chunk to the first: dY, and dS after every chunk
    gradients        parallel over chunks: dq, dk, de, dv, dβ, dg; R is computed again

With every product a sum over the levels of a chunk (channel_decay_tiles.py), and ê = βe:
    dA = -strict_tril(dY Rᵀ)       dP = tril(dO Rᵀ)
    dq̂ = exp(G) ⊙ (dO S0ᵀ) + Σ_j dP_ij exp(G_i - G_j) ⊙ k_j
    dê = -exp(G) ⊙ (dY S0ᵀ) + Σ_j dA_ij exp(G_i - G_j) ⊙ k_j
    dk = exp(G_C - G) ⊙ (R dSᵀ) + Σ_i (dP_ij q̂_i + dA_ij ê_i) ⊙ exp(G_i - G_j)
The gradient of a factor exp(Σ g) times the factor belongs to every g of the sum. Adding up
q̂ ⊙ dq̂ + ê ⊙ dê - k ⊙ dk from the end of the chunk would give the same, but most of it cancels.
The projections that the gradient of a unit vector needs are sums over the values, known before:
    Σ_k q̂ ⊙ dq̂ = Σ_v dO ⊙ O         Σ_k ê ⊙ dê = Σ_v dY ⊙ (R - βU)       Σ_k k ⊙ dk = Σ_v dY ⊙ R
What pairs of tokens give is multiplied with 11 bits: with the 8 of bf16 `gradients` would spill more (at 128, 208 bytes
per thread instead of 160; sm_90, Triton 3.7.1), and be a third less exact (5.6e-3 instead of 4.2e-3 for dk).
"""

# pyright: reportGeneralTypeIssues=false
# (the bodies of kernels are another language)

import triton
import triton.language as tl

from .channel_decay_tiles import (
    add_tile,
    chunk_decay,
    computed_step,
    inverse_lengths,
    level_decay,
    lies_between,
    lies_later,
    load_erase,
    load_gate,
    load_keys,
    load_queries,
    load_steps,
    load_turned,
    load_values,
    next_level,
    pair_products,
    parts_at,
    sigmoid_backward,
    store_turned,
    with_diagonal,
)
from .linear_class_forward import UNSPECIALIZED
from .tiles import (
    chunk_in_slot,
    chunks_to_walk,
    dot,
    fine_dot,
    load_matrix,
    load_rate,
    load_tile,
    operand,
    query_head,
    store_matrix,
    store_tile,
    valid_rows,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def scan_backward(
    q, k, erase, write, beta, g, a_log, dt_bias, mask, cu, solve, d_out, d_final, d_initial, d_states, d_written, scale,
    length, span, sequences, halvings,
    H: tl.constexpr, HV: tl.constexpr, R: tl.constexpr, SHARE: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, KB: tl.constexpr, LEVELS: tl.constexpr, GK: tl.constexpr,
    RAW_G: tl.constexpr, LOWER: tl.constexpr, ERASE: tl.constexpr, ERASE_RANGE: tl.constexpr, HAS_BETA: tl.constexpr,
    RANGE: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr, HAS_FINAL: tl.constexpr, L2NORM: tl.constexpr,
    ACROSS: tl.constexpr, KEEP: tl.constexpr, SEGMENTED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dY, and dS at the end of every chunk and at the start, of one sequence, value head and BV value columns. With
    SEGMENTED, of one segment: first dS at its start alone, then with KEEP the rest. With ACROSS, states of whole
    sequences are turned, [V, K]."""
    parts: tl.constexpr = (V + BV - 1) // BV
    pair = tl.program_id(0) // parts
    hv, h, _n, first, count, slot, start, end = chunks_to_walk(
        pair, cu, length, span, sequences, halvings, H, HV, C, PACKED, SEGMENTED
    )
    gate = (g, a_log, dt_bias)
    rows, others, keys = tl.arange(0, C), tl.arange(0, C), tl.arange(0, BK)
    values = (tl.program_id(0) % parts) * BV + tl.arange(0, BV)
    d_state = tl.zeros([BK, BV], tl.float32)
    if HAS_FINAL:
        d_state = load_turned(d_final, pair.to(tl.int64), keys, values, K, V, ACROSS and not SEGMENTED)

    for back in tl.range(start, end, disable_licm=True):
        i = end - 1 - (back - start)
        at = first + i * C
        here = rows < count - i * C
        valid = valid_rows(mask, at, rows, here, HAS_MASK)
        k_tile, k_norm, decay, remaining, left = load_keys(
            k, gate, at, h, H, hv, HV, rows, keys, valid, K, GK, RAW_G, LOWER, L2NORM
        )  # fmt: skip
        if KEEP:
            store_matrix(d_states, (slot + i) * HV + hv, keys, values, K, V, d_state)
        dw = dot(k_tile * remaining, d_state, DOT, PRECISION)
        d_state = left[:, None] * d_state
        for r in range(R):
            p, q_tile, q_norm = load_queries(
                q, k, k_norm, gate, at, hv * R + r, HV * R, h, H, hv, HV, rows, keys, valid, scale,
                SHARE, K, KB, LEVELS, GK, RAW_G, LOWER, L2NORM, DOT, PRECISION,
            )  # fmt: skip
            do = load_tile(d_out, at, hv * R + r, HV * R, V, rows, values, valid).to(tl.float32)
            dw += dot(tl.trans(p), do, DOT, PRECISION)
            d_state += dot(tl.trans(q_tile * decay), q_norm[:, None] * do, DOT, PRECISION)
        t = load_matrix(solve, (slot + i) * HV + hv, rows, others, C, C)
        dw = tl.where(valid[:, None], fine_dot(tl.trans(t), dw, DOT, PRECISION), 0.0)
        e_tile = load_erase(erase, k_tile, at, hv, HV, rows, keys, valid, K, ERASE, ERASE_RANGE)
        rate = load_rate(beta, at, hv, HV, rows, valid, HAS_BETA, RANGE)
        d_state -= dot(tl.trans(e_tile * decay), rate[:, None] * dw, DOT, PRECISION)
        if KEEP:
            store_tile(d_written, at, hv, HV, V, rows, values, here, dw)
    if not (SEGMENTED and KEEP):
        turned: tl.constexpr = ACROSS and not SEGMENTED
        store_turned(d_initial, pair.to(tl.int64), keys, values, K, V, d_state, turned)


@triton.jit
def _both_ways(x):
    """The symmetric matrix with what is below the diagonal of x."""
    i = tl.arange(0, x.shape[0])
    below = tl.where(i[:, None] > i[None, :], x, 0.0)
    return below + tl.trans(below)


@triton.jit
def _add_pairs(
    d_q, d_e, d_k, d_g, d_a, d_p, q_tile, e_tile, k_tile, step,
    LEVELS: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of q̂, ê, k and g with the sums over pairs of tokens added, level by level. `d_a` and `d_p` are
    symmetric: a later token takes from earlier ones by the same product as these from it."""
    before, after = step, step * 0.0
    for level in range(LEVELS):
        decay, met, later = level_decay(before, after, level), parts_at(level, C), lies_later(level, C)[:, None]
        read, erased = tl.where(later, q_tile, k_tile), tl.where(later, e_tile, k_tile)
        d_read = decay * fine_dot(tl.where(met, d_p, 0.0), read * decay, DOT, PRECISION)
        d_erased = decay * fine_dot(tl.where(met, d_a, 0.0), erased * decay, DOT, PRECISION)
        moved = read * d_read + erased * d_erased
        d_g += fine_dot(tl.trans(lies_between(level, C).to(tl.float32)), moved, DOT, PRECISION)
        d_q += tl.where(later, d_read, 0.0)
        d_e += tl.where(later, d_erased, 0.0)
        d_k += tl.where(later, 0.0, d_read + d_erased)
        before, after = next_level(before, after, level)
    return d_q, d_e, d_k, d_g


@triton.jit
def _store_values(
    dv, d_write, du, v, write, at, hv, HV, rows, columns, valid, here,
    V: tl.constexpr, HAS_WRITE: tl.constexpr, WRITE_RANGE: tl.constexpr,
):  # fmt: skip
    """The gradients of v and of its gate, from that of u."""
    if HAS_WRITE:
        v_tile = load_tile(v, at, hv, HV, V, rows, columns, valid).to(tl.float32)
        gate_tile = load_gate(write, at, hv, HV, V, rows, columns, valid, WRITE_RANGE)
        store_tile(d_write, at, hv, HV, V, rows, columns, here, sigmoid_backward(du * v_tile, gate_tile, WRITE_RANGE))
        du *= gate_tile
    store_tile(dv, at, hv, HV, V, rows, columns, here, du)


@triton.jit
def _store_rates(at_rates, d_step, gate, at, hv, HV, rows, columns, valid, K: tl.constexpr, LOWER: tl.constexpr):
    """This chunk's part of the gradients of A and d is stored; what is left is the gradient of a."""
    a = load_tile(gate[0], at, hv, HV, K, rows, columns, valid).to(tl.float32)
    _, slope, by_rate = computed_step(a, gate, hv, columns, K, LOWER)
    tl.store(at_rates, tl.sum(d_step * by_rate, 0), mask=columns < K)
    tl.store(at_rates + K, tl.sum(d_step * slope, 0), mask=columns < K)
    return d_step * slope


@triton.jit
def _add_erase(
    d_erase, parts, d_e, erase, k_tile, at, hv, HV, rows, columns, valid, here, begins, ends,
    K: tl.constexpr, ERASE: tl.constexpr, ERASE_RANGE: tl.constexpr,
):  # fmt: skip
    """The gradient of `erase` is stored; what is left is that of k."""
    d_k = d_e
    if ERASE == 1:
        add_tile(d_erase, parts, at, hv, HV, K, rows, columns, here, begins, ends, d_e)
        d_k = d_e * 0.0
    elif ERASE == 2:
        gate_tile = load_gate(erase, at, hv, HV, K, rows, columns, valid, ERASE_RANGE)
        d_gate = sigmoid_backward(d_e * k_tile, gate_tile, ERASE_RANGE)
        add_tile(d_erase, parts, at, hv, HV, K, rows, columns, here, begins, ends, d_gate)
        d_k = d_e * gate_tile
    return d_k


@triton.jit
def _through_states(
    states, d_states, index, written, room, d_written, d_out, at, reader, readers, hv, HV, rows, keys, valid,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, KB: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dO S0ᵀ, -dY S0ᵀ, R dSᵀ and, of every channel, Σ_v S0 ⊙ dS1. R is `written`, or is in the `room`."""
    d_q = tl.zeros([C, KB], tl.float32)
    d_e = tl.zeros([C, KB], tl.float32)
    d_k = tl.zeros([C, KB], tl.float32)
    along_state = tl.zeros([KB], tl.float32)
    for part in range(0, V, BV):
        values = part + tl.arange(0, BV)
        s = load_matrix(states, index, keys, values, K, V)
        ds = load_matrix(d_states, index, keys, values, K, V)
        dw = load_tile(d_written, at, hv, HV, V, rows, values, valid)
        do = load_tile(d_out, at, reader, readers, V, rows, values, valid)
        if room is not None:
            written = load_tile(room, at, reader, readers, V, rows, values, valid)
        d_q += dot(do, tl.trans(s), DOT, PRECISION)
        d_e -= dot(dw, tl.trans(s), DOT, PRECISION)
        d_k += dot(written, tl.trans(ds), DOT, PRECISION)
        along_state += tl.sum(s.to(tl.float32) * ds.to(tl.float32), 1)
    return d_q, d_e, d_k, along_state


@triton.jit
def _read_state(
    q, k, erase, gate, states, k_norm, index, at, hq, heads, h, H, hv, HV, rows, values, valid,
    K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, KB: tl.constexpr, GK: tl.constexpr,
    RAW_G: tl.constexpr, LOWER: tl.constexpr, ERASE: tl.constexpr, ERASE_RANGE: tl.constexpr, ACROSS: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(E ⊙ exp(G)) S0 and, with ACROSS, (Q ⊙ exp(G)) S0."""
    before, read = tl.zeros([C, BV], tl.float32), tl.zeros([C, BV], tl.float32)
    for piece in range(0, K, KB):
        keys = piece + tl.arange(0, KB)
        s = load_matrix(states, index, keys, values, K, V)
        decay, _rest, _last = chunk_decay(load_steps(gate, at, hv, HV, rows, keys, valid, K, GK, RAW_G, LOWER))
        k_tile = load_tile(k, at, h, H, K, rows, keys, valid).to(tl.float32) * k_norm[:, None]
        e_tile = load_erase(erase, k_tile, at, hv, HV, rows, keys, valid, K, ERASE, ERASE_RANGE)
        before += dot(e_tile * decay, s, DOT, PRECISION)
        if ACROSS:
            q_tile = load_tile(q, at, hq, heads, K, rows, keys, valid).to(tl.float32)
            read += dot(q_tile * decay, s, DOT, PRECISION)
    return before, read


@triton.jit
def _written_again(
    q, k, v, erase, write, gate, solve, states, d_written, out, d_out, room, dq, dv, d_write, p, rate, k_norm, scale,
    index, at, leads, reader, readers, hq, heads, h, H, hv, HV, rows, valid, here,
    K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, KB: tl.constexpr, GK: tl.constexpr,
    RAW_G: tl.constexpr, LOWER: tl.constexpr, ERASE: tl.constexpr, ERASE_RANGE: tl.constexpr, HAS_WRITE: tl.constexpr,
    WRITE_RANGE: tl.constexpr, HAS_BETA: tl.constexpr, L2NORM: tl.constexpr, ACROSS: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """R is computed again: -dY Rᵀ, dO Rᵀ, the sums Σ_v of dY ⊙ U, dY ⊙ R and dO ⊙ O, and R, unless it is in the `room`.
    What only the values need is stored: the gradients of v and its gate, and with ACROSS the outputs."""
    d_a, d_p = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    along_value, along_written, along_read = tl.sum(d_a, 1), tl.sum(d_a, 1), tl.sum(d_a, 1)
    written = operand(tl.zeros([C, BV], tl.float32), DOT)
    for part in range(0, V, BV):
        values = part + tl.arange(0, BV)
        u_tile = load_values(v, write, at, hv, HV, rows, values, valid, V, HAS_WRITE, WRITE_RANGE)
        dw = load_tile(d_written, at, hv, HV, V, rows, values, valid).to(tl.float32)
        do = load_tile(d_out, at, reader, readers, V, rows, values, valid).to(tl.float32)
        before, read = _read_state(
            q, k, erase, gate, states, k_norm, index, at, hq, heads, h, H, hv, HV, rows, values, valid,
            K, V, BV, C, KB, GK, RAW_G, LOWER, ERASE, ERASE_RANGE, ACROSS, DOT, PRECISION,
        )  # fmt: skip
        t = load_matrix(solve, index, rows, tl.arange(0, C), C, C)
        r = fine_dot(t, rate[:, None] * (u_tile - before), DOT, PRECISION)
        if room is None:
            written = operand(r, DOT)
        else:
            store_tile(room, at, reader, readers, V, rows, values, here, r)
        if ACROSS:
            read = scale * read + dot(p, r, DOT, PRECISION)
            store_tile(dq, at, reader, readers, V, rows, values, here, read)
        d_a -= fine_dot(dw, tl.trans(r), DOT, PRECISION)
        d_p += fine_dot(do, tl.trans(r), DOT, PRECISION)
        along_value += tl.sum(dw * u_tile, 1)
        along_written += tl.sum(dw * r, 1)
        if L2NORM:
            along_read += tl.sum(do * load_tile(out, at, reader, readers, V, rows, values, valid).to(tl.float32), 1)
        if HAS_BETA or HAS_WRITE:
            _store_values(
                dv, d_write, rate[:, None] * dw, v, write, at, hv, HV, rows, values, valid, here & leads,
                V, HAS_WRITE, WRITE_RANGE,
            )  # fmt: skip
    return d_a, d_p, along_value, along_written, along_read, written


@triton.jit(do_not_specialize=UNSPECIALIZED)
def gradients(
    q, k, v, erase, write, beta, g, a_log, dt_bias, mask, cu, solve, states, d_states, d_written, out, d_out, room,
    dq, dk, dv, d_erase, d_write, d_beta, d_g, q_parts, k_parts, erase_parts, g_parts, d_rates, scale,
    length, span, sequences, halvings,
    H: tl.constexpr, HV: tl.constexpr, R: tl.constexpr, SHARE: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, KB: tl.constexpr, LEVELS: tl.constexpr, GK: tl.constexpr, RAW_G: tl.constexpr,
    LOWER: tl.constexpr, ERASE: tl.constexpr, ERASE_RANGE: tl.constexpr, HAS_WRITE: tl.constexpr,
    WRITE_RANGE: tl.constexpr, HAS_BETA: tl.constexpr, RANGE: tl.constexpr, HAS_MASK: tl.constexpr,
    PACKED: tl.constexpr, L2NORM: tl.constexpr, ACROSS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one chunk and one key head, from its readers (query heads) one after the other. What several of them
    give to is added up in float32, in the `parts` of each gradient; those of A and d, `d_rates` [slots, HV R, 2, K],
    are summed later.

    What does not depend on the query is added by the first reader of a state. R stays on the chip where BV is all of V;
    otherwise there is `room` for it. With ACROSS, `q` is the gradient of the outputs and `d_out` the query, and `dq`
    gets the outputs for that.
    """
    readers: tl.constexpr = HV // H * R
    slot, h = tl.program_id(0) // H, tl.program_id(0) % H
    gate = (g, a_log, dt_bias)
    _, _, at, left = chunk_in_slot(slot.to(tl.int64), cu, length, sequences, halvings, C, PACKED)
    if left <= 0:
        return
    rows, others = tl.arange(0, C), tl.arange(0, C)
    here = rows < left
    valid = valid_rows(mask, at, rows, here, HAS_MASK)
    k_norm = inverse_lengths(k, at, h, H, rows, valid, K, KB, L2NORM)
    d_steps = tl.zeros([C], tl.float32)  # dg of a state with one decay, over its readers
    for member in tl.range(0, readers, disable_licm=True):
        reader = h * readers + member
        hv = reader // R
        hq, heads = query_head(reader, h, HV * R, H, SHARE)
        first, last = member == 0, member == readers - 1
        leads, ends = member % R == 0, member % R == R - 1
        rate = load_rate(beta, at, hv, HV, rows, valid, HAS_BETA, RANGE)
        q_norm = inverse_lengths(q, at, hq, heads, rows, valid, K, KB, L2NORM)
        share = tl.where(leads, 1.0, 0.0)
        index = slot.to(tl.int64) * HV + hv

        p = None
        if ACROSS:
            p, same = pair_products(
                q, k, gate, at, hq, heads, h, H, hv, HV, rows, valid, K, KB, LEVELS, GK, RAW_G, LOWER, False, 0.0, DOT,
                PRECISION,
            )  # fmt: skip
            p = scale * with_diagonal(p, same)
        d_a, d_p, along_value, along_written, along_read, written = _written_again(
            q, k, v, erase, write, gate, solve, states, d_written, out, d_out, room, dq, dv, d_write, p, rate, k_norm,
            scale, index, at, leads, reader, HV * R, hq, heads, h, H, hv, HV, rows, valid, here,
            K, V, BV, C, KB, GK, RAW_G, LOWER, ERASE, ERASE_RANGE, HAS_WRITE, WRITE_RANGE, HAS_BETA, L2NORM, ACROSS,
            DOT, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()  # what is in the `room` is read by other threads than wrote it

        met_itself = scale * tl.sum(tl.where(rows[:, None] == others[None, :], d_p, 0.0), 1)
        d_a, d_p = _both_ways(share * d_a), _both_ways(scale * d_p)
        eta = along_value
        d_steps = tl.where(leads, 0.0, d_steps)
        for piece in tl.range(0, K, KB, disable_licm=True):
            keys = piece + tl.arange(0, KB)
            d_q, d_e, d_k, along_state = _through_states(
                states, d_states, index, written, room, d_written, d_out, at, reader, HV * R, hv, HV, rows, keys, valid,
                K, V, C, KB, BV, DOT, PRECISION,
            )  # fmt: skip
            k_tile = load_tile(k, at, h, H, K, rows, keys, valid).to(tl.float32) * k_norm[:, None]
            q_tile = load_tile(q, at, hq, heads, K, rows, keys, valid).to(tl.float32) * q_norm[:, None]
            e_tile = load_erase(erase, k_tile, at, hv, HV, rows, keys, valid, K, ERASE, ERASE_RANGE)
            step = load_steps(gate, at, hv, HV, rows, keys, valid, K, GK, RAW_G, LOWER)
            decay, remaining, after = chunk_decay(step)
            d_e *= share * decay
            d_k *= share * remaining
            along_state *= share * after
            d_q *= scale * decay
            later = rate[:, None] * e_tile
            d_step = tl.cumsum(q_tile * d_q + later * d_e, 0, reverse=True)
            d_step += tl.cumsum(k_tile * d_k, 0) - k_tile * d_k + along_state[None, :]
            d_q, d_e, d_k, d_step = _add_pairs(
                d_q, d_e, d_k, d_step, d_a, d_p, q_tile, later, k_tile, step, LEVELS, C, DOT, PRECISION
            )
            d_q += met_itself[:, None] * k_tile
            d_k += met_itself[:, None] * q_tile
            eta += tl.sum(e_tile * d_e, 1)
            d_e *= rate[:, None]
            if GK == 1:
                d_steps += tl.sum(d_step, 1)
            elif GK > 1:
                d_step = tl.where(valid[:, None], d_step, 0.0)
                if RAW_G:
                    at_rates = d_rates + (slot.to(tl.int64) * (HV * R) + reader) * (2 * K) + keys
                    d_step = _store_rates(at_rates, d_step, gate, at, hv, HV, rows, keys, valid, K, LOWER)
                add_tile(d_g, g_parts, at, hv, HV, K, rows, keys, here, leads, ends, d_step)
            d_k += _add_erase(
                d_erase, erase_parts, d_e, erase, k_tile, at, hv, HV, rows, keys, valid, here, leads, ends,
                K, ERASE, ERASE_RANGE,
            )  # fmt: skip
            if L2NORM:
                d_q -= q_tile * along_read[:, None]
                d_k -= k_tile * (share * (2.0 * along_written - rate * along_value))[:, None]
            if not ACROSS:
                d_q *= q_norm[:, None]
                if SHARE:
                    add_tile(dq, q_parts, at, h, H, K, rows, keys, here, first, last, d_q)
                else:
                    store_tile(dq, at, reader, HV * R, K, rows, keys, here, d_q)
            add_tile(dk, k_parts, at, h, H, K, rows, keys, here, first, last, d_k * k_norm[:, None])
        at_row = at * HV + hv + rows * HV
        if GK == 1:
            tl.store(d_g + at_row, tl.where(valid, d_steps, 0.0).to(d_g.dtype.element_ty), mask=here & ends)
        if HAS_BETA:
            found = sigmoid_backward(tl.where(valid, eta, 0.0), rate, RANGE)
            tl.store(d_beta + at_row, found.to(d_beta.dtype.element_ty), mask=here & leads)
        tl.debug_barrier()  # so are the parts, by the next reader
