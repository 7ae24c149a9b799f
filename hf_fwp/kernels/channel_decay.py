"""The general linear rule with a decay for every key channel on a GPU: its Triton kernels as operators of PyTorch.

    S̃_t = Diag(exp(g_t)) S_{t-1};   r_t = β_t (v_t - S̃_tᵀ e_t);   S_t = S̃_t + k_t ⊗ r_t;   o_t = scale · S_tᵀ q_t

Forward: the inverse of every chunk's triangle, then one scan. Backward: one scan in reverse, then all chunks at once.
Of every chunk the forward leaves the inverse and the state at its start, in the type of the inputs.

Read `across` (Oja's rule), o_t = scale · S_t q_t: q has the size of v, and o that of k. o · y = q · (Sᵀ y): with the
gradient y of o as the query of the form above, its output is the gradient of q, and its backward with q as the gradient
of the output gives all the others. So only the forward has a scan of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..rules.chunked_op import new_gradients
from ..rules.gating import Decay, Rate
from .channel_decay_backward import gradients, scan_backward
from .channel_decay_forward import invert_chunks, scan_across, scan_forward
from .channel_decay_segments import map_segments
from .linear_class import INVERSE, call_of, contiguous, device_of
from .linear_class_launches import Call, Launch, Launches, Sizes, only_if, padded, sizes_of
from .linear_class_segments import carry

# By bytes per number and padded head size. Chosen by the memory and registers that the compiler reports for sm_90; not
# yet measured on a device. Shorter chunks take less of both, but leave more states to the backward.
TABLE = {
    (2, 64): Launches(64, Launch(32, 4, 1), Launch(64, 4, 1), Launch(64, 4, 1), Launch(64, 8, 1)),
    (2, 128): Launches(64, Launch(32, 4, 1), Launch(32, 8, 1), Launch(32, 8, 1), Launch(32, 8, 1)),
    (2, 256): Launches(64, Launch(32, 4, 1), Launch(16, 8, 1), Launch(16, 8, 1), Launch(32, 8, 1)),
    (4, 64): Launches(32, Launch(32, 4, 1), Launch(32, 4, 1), Launch(32, 4, 1), Launch(32, 8, 1)),
    (4, 128): Launches(32, Launch(32, 4, 1), Launch(16, 8, 1), Launch(16, 8, 1), Launch(32, 8, 1)),
    (4, 256): Launches(16, Launch(32, 4, 1), Launch(16, 8, 1), Launch(16, 8, 1), Launch(32, 4, 1)),
}
KEYS = 16  # key columns that `gradients` takes at a time


def channel_sizes(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, across: bool) -> Sizes:
    return sizes_of(q, k, v, cu_seqlens, TABLE, whole=across)


class Form(NamedTuple):
    """What is not a tensor. A range belongs to a gate that comes as what its sigmoid is taken of, and is 0 otherwise;
    `lowest` < 0 says that a decay is bounded by it."""

    scale: float
    erase_range: float
    write_range: float
    beta_range: float
    lowest: float
    erase_gates: bool
    l2norm: bool
    across: bool


def prepare(q: Tensor, k: Tensor, v: Tensor, gates: Sequence[Tensor | None], form: Form) -> Call:
    erase, write, beta, g, a_log, _, mask, cu_seqlens = gates
    sizes = channel_sizes(q, k, v, cu_seqlens, form.across)
    own = {
        "KB": min(sizes.launches.invert.columns, padded(k.shape[3])),
        "LEVELS": sizes.launches.chunk.bit_length() - 1,
        "GK": 0 if g is None else g.shape[-1],
        "RAW_G": a_log is not None,
        "LOWER": form.lowest,
        "ERASE": 0 if erase is None else 1 + form.erase_gates,
        "ERASE_RANGE": form.erase_range,
        "HAS_WRITE": write is not None,
        "WRITE_RANGE": form.write_range,
        "HAS_BETA": beta is not None,
        "RANGE": form.beta_range,
        "ACROSS": form.across,
    }
    return call_of(sizes, q, k, v, mask, cu_seqlens, form.l2norm, **own)


def new_results(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, across: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Empty tensors: outputs, final state, T [slots, HV, C, C], S0 [slots, HV, K, V] and M [slots, HV, K, K]."""
    sizes, heads, state = channel_sizes(q, k, v, cu_seqlens, across), v.shape[2], (k.shape[3], v.shape[3])
    chunk, slots = sizes.launches.chunk, sizes.chunks
    out = v.new_empty(*v.shape[:2], max(q.shape[2], heads), state[0] if across else state[1])
    final = v.new_empty(sizes.sequences, heads, *(state[::-1] if across else state), dtype=torch.float32)
    solve = v.new_empty(slots, heads, chunk, chunk, dtype=INVERSE[sizes.word])
    states = v.new_empty(slots if keep else 0, heads, *state, dtype=sizes.word)
    return out, final, solve, states, final.new_empty(sizes.segments, heads, state[0], state[0])


@contextmanager
def turned(across: bool, given: Tensor | None, result: Tensor) -> Iterator[tuple[Tensor | None, Tensor]]:
    """A state, and room for one, as segments have them: [K, V]. Read across, whole sequences have theirs turned."""
    if not across:
        yield given, result
        return
    room = result.new_empty(result.mT.shape)
    yield None if given is None else given.mT.contiguous(), room
    result.copy_(room.mT)


@torch.library.custom_op("hf_fwp::channel_decay_triton_forward", mutates_args=())
def channel_decay_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    erase: Tensor | None,
    write: Tensor | None,
    beta: Tensor | None,
    g: Tensor | None,
    a_log: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    erase_range: float,
    write_range: float,
    beta_range: float,
    lowest: float,
    erase_gates: bool,
    l2norm: bool,
    across: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out, final state, T of every chunk, state at the start of every chunk, M of every segment)."""
    form = Form(scale, erase_range, write_range, beta_range, lowest, erase_gates, l2norm, across)
    q, k, v, state, *gates = contiguous(q, k, v, state, erase, write, beta, g, a_log, dt_bias, mask, cu_seqlens)
    call = prepare(q, k, v, gates, form)
    out, final, solve, states, transitions = new_results(q, k, v, cu_seqlens, across, keep)
    launches, start = call.sizes.launches, state
    with device_of(v):
        call.run(invert_chunks, call.sizes.chunks * v.shape[2], launches.invert, k, *gates, solve)
        if call.sizes.segments:
            given = (k, v, *gates, solve)
            with turned(across, state, final) as (state, last):
                start = call.segment_starts(map_segments, carry, given, cu_seqlens, state, transitions, last)
        room = start if across and call.sizes.segments else final
        given = (q, k, v, *gates, start, solve, out, room, states, scale)
        scan, flags = scan_across if across else scan_forward, {"HAS_STATE": start is not None, "KEEP": keep}
        call.scan(scan, launches.forward, *given, whole=across, **flags)
    return (out, final, *only_if(keep, solve, states, transitions))


@channel_decay_forward.register_fake
def _(q, k, v, erase, write, beta, g, a_log, dt_bias, state, mask, cu_seqlens, *settings):
    *_, across, keep = settings
    out, final, *rest = new_results(q, k, v, cu_seqlens, across, keep)
    return (out, final, *only_if(keep, *rest))


@torch.library.custom_op("hf_fwp::channel_decay_triton_backward", mutates_args=())
def channel_decay_backward(
    d_out: Tensor,
    d_final: Tensor | None,
    out: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    erase: Tensor | None,
    write: Tensor | None,
    beta: Tensor | None,
    g: Tensor | None,
    a_log: Tensor | None,
    dt_bias: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    solve: Tensor,
    states: Tensor,
    transitions: Tensor,
    scale: float,
    erase_range: float,
    write_range: float,
    beta_range: float,
    lowest: float,
    erase_gates: bool,
    l2norm: bool,
    across: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, erase, write, beta, g, a_log, dt_bias and the initial state; empty for what is absent.
    `out` is needed with l2norm only."""
    form = Form(scale, erase_range, write_range, beta_range, lowest, erase_gates, l2norm, across)
    q, k, v, d_out, d_final, out = contiguous(q, k, v, d_out, d_final, out)
    gates = contiguous(erase, write, beta, g, a_log, dt_bias, mask, cu_seqlens)
    call = prepare(q, k, v, gates, form)
    dq, dk, dv, *d_gates, d_initial = new_results_backward(q, k, v, gates, across)
    d_erase, d_write, d_beta, d_g = d_gates
    parts = [shared_parts(call, x) for x in (dq, dk, d_erase, d_g)]
    # zeros: some slots may stay empty
    rates = (call.sizes.chunks if a_log is not None else 0, call.readers, 2, k.shape[3])
    d_rates = torch.zeros(rates, dtype=torch.float32, device=v.device)
    query, d_read = (d_out, q) if across else (q, d_out)
    d_states = torch.empty_like(states)
    # R of wider heads: kept on the chip, at 128 in bf16, 872 bytes per thread would be spilled instead of 160, and what
    # is spilled lies in device memory too: 178 KiB more of 256 threads, where R itself takes 16
    room = torch.empty_like(d_read) if call.width(call.sizes.launches.gradients) < v.shape[3] else None
    # without rates and gates the gradient of what was written is that of v
    d_written = dv if beta is None and write is None else torch.empty_like(v)
    inputs, outputs, end = (query, k, *gates, solve, d_read), (d_states, d_written, scale), d_final
    launches = call.sizes.launches
    with device_of(v):
        if call.sizes.segments:
            with turned(across, d_final, d_initial) as (d_last, d_first):
                end = call.segment_ends(scan_backward, carry, inputs, outputs, cu_seqlens, d_last, transitions, d_first)
        call.scan(
            scan_backward, launches.backward, *inputs, end, d_initial, *outputs, HAS_FINAL=end is not None, KEEP=True
        )
        call.run(
            gradients, call.sizes.chunks * k.shape[2], launches.gradients, query, k, v, *gates, solve, states, d_states,
            d_written, out, d_read, room, dq, dk, dv, d_erase, d_write, d_beta, d_g, *parts,
            d_rates, scale, BV=call.width(launches.gradients), KB=KEYS,
        )  # fmt: skip
    return dq, dk, dv, d_erase, d_write, d_beta, d_g, *rate_gradients(d_rates, a_log, dt_bias), d_initial


def new_results_backward(
    q: Tensor, k: Tensor, v: Tensor, gates: Sequence[Tensor | None], across: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Empty tensors for the gradients of q, k, v, erase, write, beta, g and the initial state."""
    erase, write, beta, g, _, _, _, cu_seqlens = gates
    (dq, dk, dv, d_beta, d_g), d_initial = new_gradients(q, k, v, beta, g, cu_seqlens)
    d_erase, d_write = (v.new_empty(0) if x is None else x.new_empty(x.shape) for x in (erase, write))
    d_initial = d_initial.new_empty(d_initial.mT.shape) if across else d_initial
    return dq, dk, dv, d_erase, d_write, d_beta, d_g, d_initial


def shared_parts(call: Call, gradient: Tensor) -> Tensor | None:
    """Room for the sum in float32 of a gradient [B, T, heads, size] to which several query heads give."""
    shared = gradient.ndim == 4 and gradient.shape[2] < call.readers and gradient.shape[3] > 1
    return torch.empty_like(gradient, dtype=torch.float32) if shared else None


def rate_gradients(d_rates: Tensor, a_log: Tensor | None, dt_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of A [HV] and d [HV · K] from the parts [slots, HV · R, 2, K]."""
    if a_log is None or dt_bias is None:
        return d_rates.new_empty(0), d_rates.new_empty(0)
    d_speed, d_shift = d_rates.sum(0).unflatten(0, (a_log.shape[0], -1)).sum(1).unbind(1)
    return d_speed.sum(-1).to(a_log.dtype), d_shift.reshape(dt_bias.shape).to(dt_bias.dtype, copy=True)


@channel_decay_backward.register_fake
def _(d_out, d_final, out, q, k, v, erase, write, beta, g, a_log, dt_bias, mask, cu_seqlens, *rest):
    gates = (erase, write, beta, g, a_log, dt_bias, mask, cu_seqlens)
    *grads, d_initial = new_results_backward(q, k, v, gates, rest[-1])
    d_rates = (v.new_empty(0, dtype=torch.float32) if x is None else x.new_empty(x.shape) for x in (a_log, dt_bias))
    return *grads, *d_rates, d_initial


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, state, (mask, cu_seqlens, *settings, _) = inputs[:9], inputs[9], inputs[10:]
    out, _, *kept = output
    ctx.settings, ctx.has_state, ctx.shape = settings, state is not None, out.shape
    ctx.save_for_backward(out if Form(*settings).l2norm else None, *tensors, mask, cu_seqlens, *kept)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_out: Tensor | None, d_final: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    _, _, _, v, *gates = ctx.saved_tensors[:10]
    if d_out is None:
        d_out = v.new_zeros(ctx.shape)
    dq, dk, dv, *optional, d_state = channel_decay_backward(d_out, d_final, *ctx.saved_tensors, *ctx.settings)
    given = (None if x is None else dx for x, dx in zip(gates, optional, strict=True))
    return dq, dk, dv, *given, d_state if ctx.has_state else None, *[None] * 11


channel_decay_forward.register_autograd(_backward, setup_context=_keep_for_backward)


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    erase: Tensor | Rate | None,
    beta: Tensor | Rate | None,
    g: Tensor | Decay | None,
    state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    l2norm: bool,
    write: Tensor | Rate | None = None,
    erase_gates: bool = False,
    across: bool = False,
) -> tuple[Tensor, Tensor]:
    """Outputs and final state. k [B,T,H,K] is written to, e = `erase` [B,T,HV,K] (k without it, times k with
    `erase_gates`) erased along, at the rate beta [B,T,HV]; what is written is v, times `write` [B,T,HV,V] where given.
    g is [B,T,HV,K], or [B,T,HV,1] for one decay per head.

    With `l2norm` q and k have length 1; this needs `erase` only as gates. `across` needs one query per state or more,
    [B,T,HQ,V], and states are turned, [N,HV,V,K].
    The backward's share is kept only when a gradient will be asked for.
    """
    ranges = [x.range if isinstance(x, Rate) else 0.0 for x in (erase, write, beta)]
    erase, write, beta = (x.logits if isinstance(x, Rate) else x for x in (erase, write, beta))
    a_log, dt_bias, lowest = None, None, 0.0
    if isinstance(g, Decay):
        g, a_log, dt_bias, lowest = g.logits, g.A_log, g.dt_bias, g.lower_bound or 0.0
    tensors = (q, k, v, erase, write, beta, g, a_log, dt_bias, state)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    erase_range, write_range, beta_range = map(float, ranges)
    settings = Form(float(scale), erase_range, write_range, beta_range, float(lowest), erase_gates, l2norm, across)
    out, final, *_ = channel_decay_forward(*tensors, mask, cu_seqlens, *settings, keep)
    return out, final
