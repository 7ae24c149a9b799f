"""The scans of the linear class over segments side by side, for a few long sequences that would not fill the device.

A chunk is affine in the state, so a segment of chunks is too, S ← M S + B:

    map_segments   all segments at once: B, the end of a walk from 0 over the values, and M, the end of a walk from the
                   identity over values that are 0
    carry          from segment to segment: the state at the start of each, and after the last

Then every segment can be scanned from its own start. Backwards dS ← Mᵀ dS + D, where D is what a reverse scan from 0
finds. Segments have slots as chunks have (tiles.py): of packed sequences, no length is read on the host.
"""

# pyright: reportGeneralTypeIssues=false
# (the bodies of kernels are another language)

import triton
import triton.language as tl

from .linear_class_forward import UNSPECIALIZED, replace_in_chunk
from .tiles import (
    chunks_to_walk,
    decay_of,
    dot,
    first_slot,
    inverse_length,
    load_matrix,
    load_rate,
    load_step,
    load_tile,
    sequence_span,
    store_matrix,
    valid_rows,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def map_segments(
    k, v, beta, g, a_log, dt_bias, mask, cu, solve, added, transitions, length, span, sequences, halvings,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, ERASE: tl.constexpr, HAS_BETA: tl.constexpr, RANGE: tl.constexpr, HAS_G: tl.constexpr,
    RAW_G: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr, L2NORM: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BV columns of [B, M] of one segment and value head, [K, V + K] with each part padded to tiles."""
    value_parts: tl.constexpr = (V + BV - 1) // BV
    parts: tl.constexpr = value_parts + (K + BV - 1) // BV
    pair, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    hv, h, n, first, count, _slot, start, end = chunks_to_walk(
        pair, cu, length, span, sequences, halvings, H, HV, C, PACKED, True
    )
    if start >= end:
        return
    rows, keys = tl.arange(0, C), tl.arange(0, BK)
    adds = part < value_parts
    columns = tl.where(adds, part, part - value_parts) * BV + tl.arange(0, BV)
    state = tl.where((keys[:, None] == columns[None, :]) & (part >= value_parts), 1.0, 0.0)

    for i in range(start, end):
        at = first + i * C
        valid = valid_rows(mask, at, rows, rows < count - i * C, HAS_MASK)
        k_tile = load_tile(k, at, h, H, K, rows, keys, valid)
        k_norm = inverse_length(k_tile, L2NORM)
        step, _ = load_step(g, a_log, dt_bias, at, hv, HV, rows, valid, HAS_G, RAW_G)
        _, _, decay, remaining, left = decay_of(step, rows)
        v_tile = load_tile(v, at, hv, HV, V, rows, columns, valid & adds)
        rate = load_rate(beta, at, hv, HV, rows, valid, HAS_BETA, RANGE)
        written = replace_in_chunk(
            v_tile, k_tile, decay * k_norm, rate, solve, n, first, length, i, hv, HV, state,
            C, ERASE, HAS_BETA, PACKED, DOT, PRECISION,
        )  # fmt: skip
        state = left * state
        state += dot(tl.trans(k_tile), (remaining * k_norm)[:, None] * written, DOT, PRECISION)
    if adds:
        store_matrix(added, pair.to(tl.int64), keys, columns, K, V, state)
    else:
        store_matrix(transitions, pair.to(tl.int64), keys, columns, K, K, state)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def carry(
    cu, start, added, transitions, between, end, length, span, sequences, halvings,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, KB: tl.constexpr,
    PACKED: tl.constexpr, HAS_START: tl.constexpr, BACKWARDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """State `between` segments, before each in the order of the walk, and at the `end` of it, of one sequence and
    value head, BV of its value columns; in float32."""
    parts: tl.constexpr = (V + BV - 1) // BV
    pair = tl.program_id(0) // parts
    n, hv = pair // HV, pair % HV
    first, count = sequence_span(n, cu, length, PACKED)
    slot = first_slot(n, first, length, span, PACKED)
    keys = tl.arange(0, BK)
    values = (tl.program_id(0) % parts) * BV + tl.arange(0, BV)
    state = tl.zeros([BK, BV], tl.float32)
    if HAS_START:
        state = load_matrix(start, pair.to(tl.int64), keys, values, K, V)

    segments = tl.cdiv(count, span)
    for walked in range(0, segments):
        i = segments - 1 - walked if BACKWARDS else walked
        index = (slot + i) * HV + hv
        store_matrix(between, index, keys, values, K, V, state)
        tl.debug_barrier()  # the product reads rows of the state that other threads have stored
        state = load_matrix(added, index, keys, values, K, V)
        for some in range(0, K, KB):
            inner = some + tl.arange(0, KB)
            if BACKWARDS:
                m = tl.trans(load_matrix(transitions, index, inner, keys, K, K))
            else:
                m = load_matrix(transitions, index, keys, inner, K, K)
            state += dot(m, load_matrix(between, index, inner, values, K, V), tl.float32, PRECISION)
    store_matrix(end, pair.to(tl.int64), keys, values, K, V, state)
