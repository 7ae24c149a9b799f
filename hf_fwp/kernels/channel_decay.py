"""The general linear rule with a decay for every key channel on a GPU: its Triton kernels as operators of PyTorch.

    S̃_t = Diag(exp(g_t)) S_{t-1};   r_t = β_t (v_t - S̃_tᵀ e_t);   S_t = S̃_t + k_t ⊗ r_t;   o_t = scale · S_tᵀ q_t

Forward: the inverse of every chunk's triangle, then one scan. Backward: one scan in reverse, then all chunks at once.
Of every chunk the forward leaves the inverse and the state at its start, in the type of the inputs.

Read `across` (Oja's rule), o_t = scale · S_t q_t: q has the size of v, and o that of k. o · y = q · (Sᵀ y): with the
gradient y of o as the query of the form above, its output is the gradient of q, and its backward with q as the gradient
of the output gives all the others. So only the forward has a scan of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..rules.chunked_op import new_gradients
from .channel_decay_backward import gradients, scan_backward
from .channel_decay_forward import invert_chunks, scan_across, scan_forward
from .linear_class import INVERSE, call_of, contiguous, device_of
from .linear_class_launches import Call, Launch, Launches, Sizes, padded, readers_of, sizes_of

# By bytes per number and padded head size. Chosen by the memory and registers that the compiler reports for sm_90; not
# yet measured on a device. Shorter chunks take less of both, but leave more states to the backward.
TABLE = {
    (2, 64): Launches(64, Launch(32, 4, 1), Launch(64, 4, 1), Launch(64, 4, 1), Launch(32, 8, 1)),
    (2, 128): Launches(64, Launch(32, 4, 1), Launch(32, 8, 1), Launch(32, 8, 1), Launch(32, 8, 1)),
    (2, 256): Launches(64, Launch(32, 4, 1), Launch(16, 8, 1), Launch(16, 8, 1), Launch(32, 8, 1)),
    (4, 64): Launches(32, Launch(32, 4, 1), Launch(32, 4, 1), Launch(32, 4, 1), Launch(32, 8, 1)),
    (4, 128): Launches(32, Launch(32, 4, 1), Launch(16, 8, 1), Launch(16, 8, 1), Launch(32, 8, 1)),
    (4, 256): Launches(16, Launch(32, 4, 1), Launch(16, 8, 1), Launch(16, 8, 1), Launch(32, 4, 1)),
}


def channel_sizes(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Sizes:
    return sizes_of(q, k, v, cu_seqlens, TABLE)._replace(span=0, segments=0)


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    erase: Tensor | None,
    beta: Tensor | None,
    g: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    l2norm: bool,
    across: bool,
) -> Call:
    sizes = channel_sizes(q, k, v, cu_seqlens)
    own = {
        "KB": min(sizes.launches.invert.columns, padded(k.shape[3])),
        "LEVELS": sizes.launches.chunk.bit_length() - 1,
        "GK": 0 if g is None else g.shape[-1],
        "HAS_ERASE": erase is not None,
        "HAS_BETA": beta is not None,
        "ACROSS": across,
    }
    return call_of(sizes, q, k, v, mask, cu_seqlens, l2norm, **own)


def new_results(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, across: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty tensors: outputs, final state, T [slots, HV, C, C] and S0 [slots, HV, K, V]."""
    sizes, heads, state = channel_sizes(q, k, v, cu_seqlens), v.shape[2], (k.shape[3], v.shape[3])
    chunk, slots = sizes.launches.chunk, sizes.chunks
    out = v.new_empty(*v.shape[:2], max(q.shape[2], heads), state[0] if across else state[1])
    final = v.new_empty(sizes.sequences, heads, *(state[::-1] if across else state), dtype=torch.float32)
    solve = v.new_empty(slots, heads, chunk, chunk, dtype=INVERSE[sizes.word])
    return out, final, solve, v.new_empty(slots if keep else 0, heads, *state, dtype=sizes.word)


def without_solve(results: tuple[Tensor, ...], keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The results, without T when no backward will ask for it."""
    out, final, solve, states = results
    return out, final, solve if keep else solve.new_empty(0), states


@torch.library.custom_op("hf_fwp::channel_decay_triton_forward", mutates_args=())
def channel_decay_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    erase: Tensor | None,
    beta: Tensor | None,
    g: Tensor | None,
    state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    l2norm: bool,
    across: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, final state; and of every chunk T and the state at its start)."""
    call = prepare(q, k, v, erase, beta, g, mask, cu_seqlens, l2norm, across)
    results = out, final, solve, states = new_results(q, k, v, cu_seqlens, across, keep)
    q, k, v, state, *gates = contiguous(q, k, v, state, erase, beta, g, mask, cu_seqlens)
    erase, launches = gates.pop(0), call.sizes.launches
    flags = {"HAS_STATE": state is not None, "KEEP": keep}
    with device_of(v):
        call.run(invert_chunks, call.sizes.chunks * v.shape[2], launches.invert, k, erase, *gates, solve)
        given = (q, k, erase, v, *gates, state, solve, out, final, states, scale)
        if across:
            width = call.width(launches.forward)
            call.run(scan_across, call.walks, launches.forward, *given, BV=width, SEGMENTED=False, **flags)
        else:
            call.scan(scan_forward, launches.forward, *given, **flags)
    return without_solve(results, keep)


@channel_decay_forward.register_fake
def _(q, k, v, erase, beta, g, state, mask, cu_seqlens, scale, l2norm, across, keep):
    return without_solve(new_results(q, k, v, cu_seqlens, across, keep), keep)


@torch.library.custom_op("hf_fwp::channel_decay_triton_backward", mutates_args=())
def channel_decay_backward(
    d_out: Tensor,
    d_final: Tensor | None,
    out: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    erase: Tensor | None,
    beta: Tensor | None,
    g: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    solve: Tensor,
    states: Tensor,
    scale: float,
    l2norm: bool,
    across: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, erase, beta, g and the initial state; empty for what is absent. `out` is needed with
    l2norm only."""
    call = prepare(q, k, v, erase, beta, g, mask, cu_seqlens, l2norm, across)
    results = dq, dk, dv, d_erase, d_beta, d_g, d_initial = new_results_backward(
        q, k, v, erase, beta, g, cu_seqlens, across
    )
    shares = [readers_of(call, x) for x in (dq, dk, d_erase, d_g)]
    q, k, v, d_out, d_final, out, *gates = contiguous(q, k, v, d_out, d_final, out, erase, beta, g, mask, cu_seqlens)
    query, d_read = (d_out, q) if across else (q, d_out)
    erase, launches = gates.pop(0), call.sizes.launches
    d_states, written = torch.empty_like(states), torch.empty_like(d_read)
    # without β the gradient of what was written is that of v
    d_written = dv if beta is None else torch.empty_like(v)
    with device_of(v):
        call.scan(
            scan_backward, launches.backward, query, k, erase, *gates, solve, d_read, d_final, d_initial, d_states,
            d_written, scale, HAS_FINAL=d_final is not None, KEEP=True,
        )  # fmt: skip
        call.run(
            gradients, call.sizes.chunks * call.readers, launches.gradients, query, k, erase, v, *gates, solve, states,
            d_states, d_written, out, d_read, written, shares[0], shares[1], shares[2], dv, d_beta, shares[3], scale,
            BV=call.width(launches.gradients),
        )  # fmt: skip
    for total, parts in zip((dq, dk, d_erase, d_g), shares, strict=True):
        if parts is not total:
            total.copy_(parts.unflatten(2, (total.shape[2], -1)).sum(3))
    return results


def new_results_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    erase: Tensor | None,
    beta: Tensor | None,
    g: Tensor | None,
    cu_seqlens: Tensor | None,
    across: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Empty tensors for the gradients."""
    (dq, dk, dv, d_beta, d_g), d_initial = new_gradients(q, k, v, beta, g, cu_seqlens)
    d_erase = v.new_empty(0) if erase is None else erase.new_empty(erase.shape)
    return dq, dk, dv, d_erase, d_beta, d_g, d_initial.new_empty(d_initial.mT.shape) if across else d_initial


@channel_decay_backward.register_fake
def _(
    d_out, d_final, out, q, k, v, erase, beta, g, mask, cu_seqlens, solve, states, scale, l2norm, across
):  # fmt: skip
    return new_results_backward(q, k, v, erase, beta, g, cu_seqlens, across)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, state, mask, cu_seqlens, scale, l2norm, across, _ = inputs
    out, _, *kept = output
    ctx.settings, ctx.has_state, ctx.shape = (scale, l2norm, across), state is not None, out.shape
    ctx.save_for_backward(out if l2norm else None, *tensors, mask, cu_seqlens, *kept)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_out: Tensor | None, d_final: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    _, _, _, v, *gates = ctx.saved_tensors[:7]
    if d_out is None:
        d_out = v.new_zeros(ctx.shape)
    dq, dk, dv, *optional, d_state = channel_decay_backward(d_out, d_final, *ctx.saved_tensors, *ctx.settings)
    given = (None if x is None else dx for x, dx in zip(gates, optional, strict=True))
    return dq, dk, dv, *given, d_state if ctx.has_state else None, *[None] * 6


channel_decay_forward.register_autograd(_backward, setup_context=_keep_for_backward)


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    erase: Tensor | None,
    beta: Tensor | None,
    g: Tensor | None,
    state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    l2norm: bool,
    across: bool = False,
) -> tuple[Tensor, Tensor]:
    """Outputs and final state. k [B,T,H,K] is written to, e = `erase` [B,T,HV,K] (k without it) erased along, at the
    rate beta [B,T,HV]; g is [B,T,HV,K], or [B,T,HV,1] for one decay per head.

    With `l2norm` q and k have length 1; this needs e = k and one query per state. `across` needs one query per state or
    more, [B,T,HQ,V], and states are turned, [N,HV,V,K].
    The backward's share is kept only when a gradient will be asked for.
    """
    tensors = (q, k, v, erase, beta, g, state)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    out, final, *_ = channel_decay_forward(*tensors, mask, cu_seqlens, scale, l2norm, across, keep)
    return out, final
