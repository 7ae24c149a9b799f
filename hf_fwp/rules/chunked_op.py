"""The chunked form as operators of PyTorch: autograd and torch.compile see one opaque call with known shapes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .blocks import Block, Inputs, Kept, Scratch, blocks, chunk_length, keep_in, kept_size, segments
from .checks import sequence_bounds
from .chunked import backward_block, forward_block


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    beta: Tensor | None,
    g: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    erase: bool,
    l2norm: bool,
) -> tuple[Tensor, Tensor]:
    """Outputs and final state. The backward's share is kept only when a gradient will be asked for."""
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, beta, g, state))
    out, final, _ = linear_class_forward(q, k, v, beta, g, state, cu_seqlens, scale, erase, l2norm, keep)
    return out, final


def kept_rows(length: int, chunk: int, cu_seqlens: Tensor | None) -> int:
    """How many chunks there can be, and one state more, for every sequence."""
    if cu_seqlens is None:
        return -(-length // chunk) + 1
    return length // chunk + 2 * (cu_seqlens.shape[0] - 1)


def new_outputs(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, erase: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors for the outputs, the final state and what the backward needs of every chunk."""
    batch, length, _, key_size = k.shape
    value_heads, value_size = v.shape[2:]
    dtype = torch.float64 if torch.float64 in (q.dtype, k.dtype, v.dtype) else torch.float32
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    out = v.new_empty(batch, length, max(q.shape[2], value_heads), value_size)
    final = v.new_empty(sequences, value_heads, key_size, value_size, dtype=dtype)
    rows = kept_rows(length, chunk_length(key_size, value_size), cu_seqlens) if keep else 0
    size = rows * batch * value_heads * kept_size(Inputs(q, k, v, None, None, erase=erase)) if keep else 0
    return out, final, v.new_empty(size, dtype=dtype)


def sequences(k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> list[tuple[int, int, slice, int]]:
    """(start, end, rows of the state, first of the kept rows) of every sequence, or of the whole batch."""
    if cu_seqlens is None:
        return [(0, k.shape[1], slice(None), 0)]
    found, first, chunk = [], 0, chunk_length(k.shape[3], v.shape[3])
    for n, (start, end) in enumerate(sequence_bounds(cu_seqlens, k.shape[1])):
        found.append((start, end, slice(n, n + 1), first))
        first += -(-(end - start) // chunk) + 1
    return found


def kept_by_block(kept: Tensor, x: Inputs, first: int) -> Iterator[tuple[Block, Kept]]:
    """The blocks of one run and what each keeps; `first` is the run's first kept row. All segments share one buffer
    when nothing is kept."""
    rows = kept_rows(x.k.shape[1], chunk_length(x.k.shape[3], x.v.shape[3]), None)
    size, at = kept_size(x), first * x.k.shape[0] * x.v.shape[2] * kept_size(x)
    for block in blocks(x):
        pairs = x.v[block.rows, :1, block.value_heads].shape[::2].numel()
        if kept.numel():
            yield block, keep_in(kept[at : at + rows * pairs * size], x, pairs)
            at += rows * pairs * size
        else:
            longest = max(segment.count for segment in segments(x, pairs))
            yield block, keep_in(x.v.new_empty((longest + 1) * pairs * size, dtype=x.dtype), x, pairs)


def pieces(kept: Tensor, x: Inputs, cu_seqlens: Tensor | None) -> Iterator[tuple[int, int, slice, Block, Kept]]:
    """(start, end, rows of the state, block, what it keeps) of all that is worked on, sequence by sequence."""
    for start, end, rows, first in sequences(x.k, x.v, cu_seqlens):
        if start < end:
            for block, found in kept_by_block(kept, x.span(start, end), first):
                yield start, end, rows, block, found


def start_from(state: Tensor | None, final: Tensor) -> None:
    """Fill `final`, from which a walk through the chunks starts, with a given state or with zeros."""
    if state is None:
        final.zero_()
    else:
        final.copy_(state)


@torch.library.custom_op("hf_fwp::linear_class_forward", mutates_args=())
def linear_class_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    g: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    erase: bool,
    l2norm: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, final state, what the backward needs of every chunk)."""
    out, final, kept = new_outputs(q, k, v, cu_seqlens, erase, keep)
    start_from(state, final)
    if cu_seqlens is not None:
        kept.zero_()  # packed sequences rarely fill it
    x = Inputs(q, k, v, beta, g, scale, erase, l2norm)
    scratch = Scratch(x.dtype, v.device)
    with torch.autocast(v.device.type, enabled=False):
        for start, end, rows, block, found in pieces(kept, x, cu_seqlens):
            found.clear_rest()
            part_state = final[rows][block.rows, block.value_heads]
            forward_block(x.span(start, end), block, part_state, out[:, start:end], found, scratch)
    return out, final, kept


@linear_class_forward.register_fake
def _(q, k, v, beta, g, state, cu_seqlens, scale, erase, l2norm, keep):
    return new_outputs(q, k, v, cu_seqlens, erase, keep)


@torch.library.custom_op("hf_fwp::linear_class_backward", mutates_args=())
def linear_class_backward(
    d_out: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    g: Tensor | None,
    cu_seqlens: Tensor | None,
    kept: Tensor,
    scale: float,
    erase: bool,
    l2norm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, beta, g and the initial state; empty for an absent beta or g."""
    grads, d_state = new_gradients(q, k, v, beta, g, cu_seqlens)
    start_from(d_final, d_state)
    x = Inputs(q, k, v, beta, g, scale, erase, l2norm)
    grad = Inputs(*grads[:3], None if beta is None else grads[3], None if g is None else grads[4])
    scratch = Scratch(x.dtype, v.device)
    with torch.autocast(v.device.type, enabled=False):
        for start, end, rows, block, found in pieces(kept, x, cu_seqlens):
            part, part_grad = x.span(start, end), grad.span(start, end)
            d_block = d_state[rows][block.rows, block.value_heads]
            backward_block(part, block, part_grad, d_out[:, start:end], d_block, found, scratch)
    return *grads, d_state


def new_gradients(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, g: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Empty contiguous tensors for the gradients."""
    grads = (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
    d_beta, d_g = (v.new_empty(0) if x is None else x.new_empty(x.shape) for x in (beta, g))
    return (*grads, d_beta, d_g), new_outputs(q, k, v, cu_seqlens, erase=False, keep=False)[1]


@linear_class_backward.register_fake
def _(d_out, d_final, q, k, v, beta, g, cu_seqlens, kept, scale, erase, l2norm):
    grads, d_state = new_gradients(q, k, v, beta, g, cu_seqlens)
    return *grads, d_state


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, beta, g, state, cu_seqlens, ctx.scale, ctx.erase, ctx.l2norm, _ = inputs
    ctx.has_state = state is not None
    ctx.save_for_backward(q, k, v, beta, g, cu_seqlens, output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_out: Tensor | None, d_final: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, beta, g, cu_seqlens, kept = ctx.saved_tensors
    if d_out is None:
        d_out = v.new_zeros(()).expand(new_outputs(q, k, v, cu_seqlens, erase=False, keep=False)[0].shape)
    dq, dk, dv, d_beta, d_g, d_state = linear_class_backward(
        d_out, d_final, q, k, v, beta, g, cu_seqlens, kept, ctx.scale, ctx.erase, ctx.l2norm
    )
    optional = (
        d_beta if beta is not None else None,
        d_g if g is not None else None,
        d_state if ctx.has_state else None,
    )
    return dq, dk, dv, *optional, None, None, None, None, None


linear_class_forward.register_autograd(_backward, setup_context=_keep_for_backward)
