"""The map of a segment of chunks under a channel decay; linear_class_segments.py has what it is for, and `carry`."""

# pyright: reportGeneralTypeIssues=false
# (the bodies of kernels are another language)

import triton
import triton.language as tl

from .channel_decay_tiles import load_erase, load_keys, load_values, replace_in_chunk
from .linear_class_forward import UNSPECIALIZED
from .tiles import (
    chunks_to_walk,
    dot,
    load_rate,
    store_matrix,
    valid_rows,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def map_segments(
    k, v, erase, write, beta, g, a_log, dt_bias, mask, cu, solve, added, transitions, length, span, sequences, halvings,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, GK: tl.constexpr, RAW_G: tl.constexpr, LOWER: tl.constexpr, ERASE: tl.constexpr,
    ERASE_RANGE: tl.constexpr, HAS_WRITE: tl.constexpr, WRITE_RANGE: tl.constexpr, HAS_BETA: tl.constexpr,
    RANGE: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr, L2NORM: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """BV columns of [B, M] of one segment and value head, [K, V + K] with each part padded to tiles."""
    value_parts: tl.constexpr = (V + BV - 1) // BV
    parts: tl.constexpr = value_parts + (K + BV - 1) // BV
    pair, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    hv, h, _n, first, count, slot, start, end = chunks_to_walk(
        pair, cu, length, span, sequences, halvings, H, HV, C, PACKED, True
    )
    gate = (g, a_log, dt_bias)
    if start >= end:
        return
    rows, keys = tl.arange(0, C), tl.arange(0, BK)
    adds = part < value_parts
    columns = tl.where(adds, part, part - value_parts) * BV + tl.arange(0, BV)
    state = tl.where((keys[:, None] == columns[None, :]) & (part >= value_parts), 1.0, 0.0)

    for i in range(start, end):
        at = first + i * C
        valid = valid_rows(mask, at, rows, rows < count - i * C, HAS_MASK)
        k_tile, _, decay, remaining, left = load_keys(
            k, gate, at, h, H, hv, HV, rows, keys, valid, K, GK, RAW_G, LOWER, L2NORM
        )  # fmt: skip
        e_tile = load_erase(erase, k_tile, at, hv, HV, rows, keys, valid, K, ERASE, ERASE_RANGE)
        v_tile = load_values(v, write, at, hv, HV, rows, columns, valid & adds, V, HAS_WRITE, WRITE_RANGE)
        rate = load_rate(beta, at, hv, HV, rows, valid, HAS_BETA, RANGE)
        kept = (slot + i) * HV + hv
        written = replace_in_chunk(v_tile, e_tile * decay, rate, solve, kept, state, C, DOT, PRECISION)
        state = left[:, None] * state
        state += dot(tl.trans(k_tile * remaining), written, DOT, PRECISION)
    if adds:
        store_matrix(added, pair.to(tl.int64), keys, columns, K, V, state)
    else:
        store_matrix(transitions, pair.to(tl.int64), keys, columns, K, K, state)
