"""The linear class on a GPU: its Triton kernels as operators of PyTorch, beside rules/chunked_op.py.

Forward: the inverse of every chunk's triangle, then one scan. Backward: one scan in reverse, then all chunks at once.
Of every chunk the forward leaves the inverse and the state at its start, in the type of the inputs.
A few long sequences are scanned in segments (linear_class_segments.py): two launches more each way.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rules.chunked_op import new_gradients, new_outputs
from ..rules.gating import Decay, Rate
from .linear_class_backward import gradients, scan_backward
from .linear_class_forward import invert_chunks, scan_forward
from .linear_class_launches import SOLVE, TABLE, Call, Launch, Launches, Sizes, only_if, padded, sizes_of
from .linear_class_segments import carry, map_segments
from .tiles import dot

__all__ = ["TABLE", "Launch", "Launches", "chunked", "interpreted", "padded"]

# What T is kept in. With unit keys and rates up to 2 its numbers are at most 2, of which fp16 keeps 11 bits, bf16 8.
INVERSE = {torch.float32: torch.float32, torch.bfloat16: torch.float16, torch.float16: torch.float16}
WORD = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def interpreted() -> bool:
    """Whether TRITON_INTERPRET was set when triton was imported."""
    return not isinstance(dot, triton.JITFunction)


def call_of(
    sizes: Sizes,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    l2norm: bool,
    **constants: Any,
) -> Call:
    """What the kernels must know about the sizes and which inputs there are; `constants` are a family's own."""
    heads, value_heads, count = k.shape[2], v.shape[2], sizes.sequences
    share = q.shape[2] == heads
    common = {
        "H": heads,
        "HV": value_heads,
        "R": 1 if share else q.shape[2] // value_heads,
        "SHARE": share,
        "K": k.shape[3],
        "V": v.shape[3],
        "BK": padded(k.shape[3]),
        "C": sizes.launches.chunk,
        "HAS_MASK": mask is not None,
        "PACKED": cu_seqlens is not None,
        "L2NORM": l2norm,
        "DOT": WORD[sizes.word],
        # tf32 alone has three correct digits
        "PRECISION": "tf32x3" if torch.version.cuda and not interpreted() else "ieee",
    }
    dynamic = {"length": k.shape[1], "span": sizes.span, "sequences": count, "halvings": count.bit_length()}
    return Call(sizes, common | constants, dynamic)


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Sequence[Tensor | None],
    beta_range: float,
    erase: bool,
    l2norm: bool,
) -> Call:
    beta, g, a_log, _, mask, cu_seqlens = gates
    flags = {"HAS_BETA": beta is not None, "RANGE": beta_range, "HAS_G": g is not None, "RAW_G": a_log is not None}
    sizes = sizes_of(q, k, v, cu_seqlens)
    return call_of(sizes, q, k, v, mask, cu_seqlens, l2norm, ERASE=erase, **flags)


def device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.accelerator.device_index(x.device.index) if x.device.type != "cpu" else nullcontext()


def contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if x is None else x.contiguous() for x in tensors]


@torch.library.custom_op("hf_fwp::linear_class_triton_forward", mutates_args=())
def linear_class_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    g: Tensor | None,
    a_log: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    beta_range: float,
    erase: bool,
    l2norm: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out, final state, T of every chunk, state at the start of every chunk, M of every segment).

    `beta` is b of β = beta_range · sigmoid(b) unless beta_range is 0; g is a of g = -exp(a_log) softplus(a + dt_bias)
    if these are given."""
    q, k, v, state, *gates = contiguous(q, k, v, state, beta, g, a_log, dt_bias, mask, cu_seqlens)
    call = prepare(q, k, v, gates, beta_range, erase, l2norm)
    out, final, solve, states, transitions = new_results(q, k, v, cu_seqlens, erase, keep)
    launches, sizes, start = call.sizes.launches, call.sizes, state
    with device_of(v):
        if erase:
            width = min(launches.invert.columns, call.constants["BK"])
            call.run(invert_chunks, sizes.inverses * v.shape[2], launches.invert, k, *gates, solve, KB=width)
        if sizes.segments:
            start = call.segment_starts(
                map_segments, carry, (k, v, *gates, solve), gates[-1], state, transitions, final
            )
        call.scan(
            scan_forward, launches.forward, q, k, v, *gates, start, solve, out, final, states, scale,
            HAS_STATE=start is not None, KEEP=keep,
        )  # fmt: skip
    return (out, final, *only_if(keep, solve, states, transitions))


def new_results(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, erase: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Empty tensors for what the forward gives: T [slots, HV, 64, 64], S0 [slots, HV, K, V], M [slots, HV, K, K]."""
    out, final, _ = new_outputs(q, k, v, cu_seqlens, erase=False, keep=False)
    sizes, (heads, key_size, value_size) = sizes_of(q, k, v, cu_seqlens), final.shape[1:]
    solve = v.new_empty(sizes.inverses if erase else 0, heads, SOLVE, SOLVE, dtype=INVERSE[sizes.word])
    states = v.new_empty(sizes.chunks if keep else 0, heads, key_size, value_size, dtype=sizes.word)
    return out, final, solve, states, final.new_empty(sizes.segments, heads, key_size, key_size)


@linear_class_forward.register_fake
def _(q, k, v, beta, g, a_log, dt_bias, state, mask, cu_seqlens, scale, beta_range, erase, l2norm, keep):
    out, final, solve, states, transitions = new_results(q, k, v, cu_seqlens, erase, keep)
    return (out, final, *only_if(keep, solve, states, transitions))


@torch.library.custom_op("hf_fwp::linear_class_triton_backward", mutates_args=())
def linear_class_backward(
    d_out: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
    beta_range: float,
    erase: bool,
    l2norm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, beta, g, a_log, dt_bias and the initial state; empty for gates that are absent."""
    q, k, v, d_out, d_final, *gates = contiguous(q, k, v, d_out, d_final, beta, g, a_log, dt_bias, mask, cu_seqlens)
    call = prepare(q, k, v, gates, beta_range, erase, l2norm)
    (dq, dk, dv, d_beta, d_g), d_initial = new_gradients(q, k, v, beta, g, cu_seqlens)
    launches, sizes = call.sizes.launches, call.sizes
    # zeros: some slots may stay empty
    rates = (sizes.chunks if a_log is not None else 0, v.shape[2], 2)
    d_rates = torch.zeros(rates, dtype=torch.float32, device=v.device)
    d_states = torch.empty_like(states)
    # without β what was written is v, and its gradient that of v
    d_written = dv if beta is None else torch.empty_like(v)
    inputs, outputs, end = (q, k, *gates, solve, d_out), (d_states, d_written, scale), d_final
    with device_of(v):
        if sizes.segments:
            end = call.segment_ends(scan_backward, carry, inputs, outputs, gates[-1], d_final, transitions, d_initial)
        call.scan(
            scan_backward, launches.backward, *inputs, end, d_initial, *outputs, HAS_FINAL=end is not None, KEEP=True
        )  # fmt: skip
        call.run(
            gradients, sizes.chunks * k.shape[2], launches.gradients, q, k, v, *gates, solve, states, d_states,
            d_written, d_out, dq, dk, dv, d_beta, d_g, d_rates, scale, BV=call.width(launches.gradients),
        )  # fmt: skip
    return dq, dk, dv, d_beta, d_g, *rate_gradients(d_rates, a_log, dt_bias), d_initial


def rate_gradients(d_rates: Tensor, a_log: Tensor | None, dt_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients [HV] of A and d from the parts [slots, HV, 2] of all chunks."""
    if a_log is None or dt_bias is None:
        return d_rates.new_empty(0), d_rates.new_empty(0)
    d_a_log, d_dt_bias = d_rates.sum(0).unbind(-1)
    return d_a_log.to(a_log.dtype, copy=True), d_dt_bias.to(dt_bias.dtype, copy=True)


@linear_class_backward.register_fake
def _(
    d_out, d_final, q, k, v, beta, g, a_log, dt_bias, mask, cu_seqlens, solve, states, transitions, scale, beta_range,
    erase, l2norm,
):  # fmt: skip
    grads, d_initial = new_gradients(q, k, v, beta, g, cu_seqlens)
    d_rates = (v.new_empty(0, dtype=torch.float32) if x is None else x.new_empty(x.shape) for x in (a_log, dt_bias))
    return *grads, *d_rates, d_initial


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, state, mask, cu_seqlens, scale, beta_range, erase, l2norm, _ = inputs
    ctx.settings = (scale, beta_range, erase, l2norm)
    ctx.has_state = state is not None
    ctx.save_for_backward(*tensors, mask, cu_seqlens, *output[2:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_out: Tensor | None, d_final: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, *gates = ctx.saved_tensors[:7]
    if d_out is None:
        d_out = v.new_zeros(new_outputs(q, k, v, None, erase=False, keep=False)[0].shape)
    dq, dk, dv, *d_gates, d_state = linear_class_backward(d_out, d_final, *ctx.saved_tensors, *ctx.settings)
    optional = [None if x is None else d for x, d in zip(gates, d_gates, strict=True)]
    return dq, dk, dv, *optional, d_state if ctx.has_state else None, *[None] * 7


linear_class_forward.register_autograd(_backward, setup_context=_keep_for_backward)


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    beta: Tensor | Rate | None,
    g: Tensor | Decay | None,
    state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    erase: bool,
    l2norm: bool,
) -> tuple[Tensor, Tensor]:
    """Outputs and final state. The backward's share is kept only when a gradient will be asked for."""
    beta_range, a_log, dt_bias = 0.0, None, None
    if isinstance(beta, Rate):
        beta, beta_range = beta.logits, beta.range
    if isinstance(g, Decay):
        g, a_log, dt_bias = g.logits, g.A_log, g.dt_bias
    tensors = (q, k, v, beta, g, a_log, dt_bias, state)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    settings = (float(scale), float(beta_range), erase, l2norm, keep)
    out, final, *_ = linear_class_forward(*tensors, mask, cu_seqlens, *settings)
    return out, final
