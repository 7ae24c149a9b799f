"""The general rule as operators of PyTorch: autograd and torch.compile see one opaque call with known shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .blocks import Inputs, Scratch
from .chunked_op import new_outputs, pieces, start_from
from .general_chunks import General, backward_block, forward_block


def chunked_form(
    q: Tensor,
    w: Tensor,
    e: Tensor,
    u: Tensor,
    g: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    transposed: bool,
) -> tuple[Tensor, Tensor]:
    """Reads [B, T, HQ, V] and the state after the last token [N, HV, K, V], of w's size and u's; all in one dtype. The
    backward's share is kept only when a gradient will be asked for."""
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, w, e, u, g, state))
    out, final, _ = general_forward(q, w, e, u, g, state, cu_seqlens, transposed, keep)
    return out, final


def new_results(
    q: Tensor, w: Tensor, u: Tensor, cu_seqlens: Tensor | None, transposed: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors for the reads, the final state and what the backward needs of every chunk."""
    out, final, kept = new_outputs(q, w, u, cu_seqlens, erase=True, keep=keep)
    return (w.new_empty(*out.shape[:3], w.shape[3]) if transposed else out), final, kept


@torch.library.custom_op("hf_fwp::general_forward", mutates_args=())
def general_forward(
    q: Tensor,
    w: Tensor,
    e: Tensor,
    u: Tensor,
    g: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    transposed: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(reads, final state, what the backward needs of every chunk)."""
    out, final, kept = new_results(q, w, u, cu_seqlens, transposed, keep)
    start_from(state, final)
    if cu_seqlens is not None:
        kept.zero_()  # packed sequences rarely fill it
    x = General(Inputs(q, w, u, None, g), e, transposed)
    scratch = Scratch(u.dtype, u.device)
    with torch.autocast(u.device.type, enabled=False):
        for start, end, rows, block, found in pieces(kept, x.x, cu_seqlens):
            found.clear_rest()
            part_state = final[rows][block.rows, block.value_heads]
            forward_block(x.span(start, end), block, part_state, out[:, start:end], found, scratch)
    return out, final, kept


@general_forward.register_fake
def _(q, w, e, u, g, state, cu_seqlens, transposed, keep):
    return new_results(q, w, u, cu_seqlens, transposed, keep)


@torch.library.custom_op("hf_fwp::general_backward", mutates_args=())
def general_backward(
    d_out: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    w: Tensor,
    e: Tensor,
    u: Tensor,
    g: Tensor | None,
    cu_seqlens: Tensor | None,
    kept: Tensor,
    transposed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, w, e, u, g and the initial state; empty for an absent g."""
    dq, dw, de, du, dg, d_state = new_gradients(q, w, e, u, g, cu_seqlens)
    start_from(d_final, d_state)
    x = General(Inputs(q, w, u, None, g), e, transposed)
    grad = General(Inputs(dq, dw, du, None, None if g is None else dg), de, transposed)
    scratch = Scratch(u.dtype, u.device)
    with torch.autocast(u.device.type, enabled=False):
        for start, end, rows, block, found in pieces(kept, x.x, cu_seqlens):
            part, part_grad = x.span(start, end), grad.span(start, end)
            d_block = d_state[rows][block.rows, block.value_heads]
            backward_block(part, block, part_grad, d_out[:, start:end], d_block, found, scratch)
    return dq, dw, de, du, dg, d_state


def new_gradients(
    q: Tensor, w: Tensor, e: Tensor, u: Tensor, g: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Empty contiguous tensors for the gradients."""
    grads = (q.new_empty(q.shape), w.new_empty(w.shape), e.new_empty(e.shape), u.new_empty(u.shape))
    d_g = u.new_empty(0) if g is None else g.new_empty(g.shape)
    return *grads, d_g, new_outputs(q, w, u, cu_seqlens, erase=True, keep=False)[1]


@general_backward.register_fake
def _(d_out, d_final, q, w, e, u, g, cu_seqlens, kept, transposed):
    return new_gradients(q, w, e, u, g, cu_seqlens)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, w, e, u, g, state, cu_seqlens, ctx.transposed, _ = inputs
    ctx.has_state = state is not None
    ctx.save_for_backward(q, w, e, u, g, cu_seqlens, output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_out: Tensor | None, d_final: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, w, e, u, g, cu_seqlens, kept = ctx.saved_tensors
    if d_out is None:
        shape = new_results(q, w, u, cu_seqlens, ctx.transposed, keep=False)[0].shape
        d_out = u.new_zeros(()).expand(shape)
    dq, dw, de, du, dg, d_state = general_backward(d_out, d_final, q, w, e, u, g, cu_seqlens, kept, ctx.transposed)
    return dq, dw, de, du, dg if g is not None else None, d_state if ctx.has_state else None, None, None, None


general_forward.register_autograd(_backward, setup_context=_keep_for_backward)
