"""The transposed form on a GPU (Oja's rule): M is written like the state of channel_decay.py and read along the values.

    M̃_t = Diag(exp(g_t)) M_{t-1};   r_t = β_t (v_t - M̃_tᵀ e_t);   M_t = M̃_t + k_t ⊗ r_t;   o_t = M_t q_t

Here q has the size of v, and o that of k. o · y = q · (Mᵀ y): with the gradient y of o as the query of
channel_decay.py, its output is the gradient of q, and its backward with q as the gradient of the output gives all the
others. So only the forward has a kernel of its own, and nothing is kept for the backward but the inputs.
"""

# pyright: reportGeneralTypeIssues=false
# (the bodies of kernels are another language)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .channel_decay import channel_decay_backward, channel_decay_forward, new_results, prepare
from .channel_decay_forward import prepare_chunks, scan_forward
from .channel_decay_tiles import chunk_decay, level_decay, load_steps, meets
from .linear_class import contiguous, device_of
from .tiles import chunk_in_slot, dot, load_matrix, load_tile, store_tile


@triton.jit(do_not_specialize=["length", "sequences", "halvings"])
def read_across(
    q, k, g, cu, written, states, out, length, sequences, halvings,
    H: tl.constexpr, HV: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, KB: tl.constexpr, LEVELS: tl.constexpr, GK: tl.constexpr, PACKED: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """o of one chunk and query head: exp(G) ⊙ (Q M0ᵀ) + Σ_{j≤i} (q_i · r_j) exp(G_i - G_j) ⊙ k_j."""
    slot, reader = tl.program_id(0) // (HV * R), tl.program_id(0) % (HV * R)
    hv = reader // R
    _n, _i, at, left = chunk_in_slot(slot.to(tl.int64), cu, length, sequences, halvings, C, PACKED)
    if left <= 0:
        return
    rows, others = tl.arange(0, C), tl.arange(0, C)
    here = rows < left
    index = slot.to(tl.int64) * HV + hv
    similar = tl.zeros([C, C], tl.float32)
    for part in range(0, V, BV):
        values = part + tl.arange(0, BV)
        q_tile = load_tile(q, at, reader, HV * R, V, rows, values, here)
        similar += dot(q_tile, tl.trans(load_tile(written, at, hv, HV, V, rows, values, here)), DOT, PRECISION)
    itself = tl.sum(tl.where(rows[:, None] == others[None, :], similar, 0.0), 1)
    for piece in range(0, K, KB):
        keys = piece + tl.arange(0, KB)
        o = tl.zeros([C, KB], tl.float32)
        for part in range(0, V, BV):
            values = part + tl.arange(0, BV)
            q_tile = load_tile(q, at, reader, HV * R, V, rows, values, here)
            o += dot(q_tile, tl.trans(load_matrix(states, index, keys, values, K, V)), DOT, PRECISION)
        k_tile = load_tile(k, at, hv // (HV // H), H, K, rows, keys, here).to(tl.float32)
        step = load_steps(g, at, hv, HV, rows, keys, here, K, GK)
        decay, _rest, _last = chunk_decay(step)
        o = o * decay + itself[:, None] * k_tile
        for level in range(LEVELS):
            decay = level_decay(step, level, DOT, PRECISION)
            o += decay * dot(tl.where(meets(level, C), similar, 0.0), k_tile * decay, DOT, PRECISION)
        store_tile(out, at, reader, HV * R, K, rows, keys, here, o)


@torch.library.custom_op("hf_fwp::transposed_triton_forward", mutates_args=())
def transposed_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    erase: Tensor | None,
    beta: Tensor | None,
    g: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(out, final state)."""
    call = prepare(q, k, v, erase, beta, g, None, cu_seqlens, False)
    written, final, solve, _, states = new_results(k, k, v, erase, cu_seqlens, True)
    out = q.new_empty(*q.shape[:3], k.shape[3])
    q, k, v, erase, beta, g, state, cu_seqlens = contiguous(q, k, v, erase, beta, g, state, cu_seqlens)
    with device_of(v):
        call.every_chunk(
            prepare_chunks, call.launches.prepare, None, k, erase, beta, g, None, cu_seqlens, solve, None, 1.0,
            HAS_READS=False,
        )  # fmt: skip
        call.scan(
            scan_forward, call.launches.forward, None, k, erase, v, beta, g, None, cu_seqlens, state, solve, None,
            written, final, states, 1.0, HAS_STATE=state is not None, HAS_READS=False, KEEP=True,
        )  # fmt: skip
        call.every_chunk(read_across, call.launches.gradients, q, k, g, cu_seqlens, written, states, out)
    return out, final


@transposed_forward.register_fake
def _(q, k, v, erase, beta, g, state, cu_seqlens):
    return q.new_empty(*q.shape[:3], k.shape[3]), new_results(k, k, v, erase, cu_seqlens, False)[1]


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_out: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, erase, beta, g, state, cu_seqlens = ctx.saved_tensors
    if d_out is None:
        d_out = q.new_zeros(*q.shape[:3], k.shape[3])
    dq, _, *kept = channel_decay_forward(d_out, k, v, erase, beta, g, state, None, cu_seqlens, 1.0, False, True)
    _, dk, dv, *optional, d_state = channel_decay_backward(
        q, d_final, d_out, k, v, erase, beta, g, None, cu_seqlens, *kept, 1.0, False
    )
    given = (None if x is None else dx for x, dx in zip((erase, beta, g), optional, strict=True))
    return dq, dk, dv, *given, None if state is None else d_state, None


transposed_forward.register_autograd(_backward, setup_context=_keep_for_backward)


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    erase: Tensor | None,
    beta: Tensor | None,
    g: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, HQ, K] and final state [N, HV, K, V]; q [B, T, HQ, V] has one query head or more per state."""
    return transposed_forward(q, k, v, erase, beta, g, state, cu_seqlens)
