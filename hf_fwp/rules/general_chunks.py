"""The general linear rule, parallel over the tokens of a chunk, with a hand-written backward.

The letters are those of general.py; Γ_ij = exp(G_i - G_j) for i ≥ j, else 0, channel by channel. With dS1 known:

    dR = Pᵀ dO + (exp(G_C - G) ⊙ W) dS1                   dS0 = exp(G_C) dS1 + (exp(G) ⊙ Q)ᵀ dO - (T (exp(G) ⊙ E))ᵀ dR
    dU = dY = Tᵀ dR       dA = -(dY Rᵀ) (strict)          dP = dO Rᵀ
    dQ = exp(G) ⊙ (dO S0ᵀ) + mix(dP, W)                   dE = -exp(G) ⊙ (dY S0ᵀ) + mix(dA, W)
    dW = exp(G_C - G) ⊙ (R dS1ᵀ) + columns(dA, E) + columns(dP, Q)
    dG = Q ⊙ dQ + E ⊙ dE - W ⊙ dW,   dG_C += Σ_v S1 ⊙ dS1,   dg = sums of dG from the end

with `mix` and `columns` of decays.py. A transposed form reads O = exp(G) ⊙ (Q M0ᵀ) + mix(N, W), N = lower part of Q Rᵀ:

    dN = products(dO, W)  dR = dNᵀ Q + ...                dQ = dN R + (exp(G) ⊙ dO) M0
    dM0 = ... + (exp(G) ⊙ dO)ᵀ Q                          dW = ... + columns(N, dO),   dG = O ⊙ dO + E ⊙ dE - W ⊙ dW

The backward gets the inputs and, of every chunk, the state at its start, T, P (or N) and R.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .blocks import Block, Inputs, Kept, Scratch, Segment, of_segment, segments, store
from .chunked import backward_scan, forward_scan, invert
from .decays import ChannelDecay, SharedDecay, diagonal_of
from .gating import LOWEST


@dataclass(frozen=True)
class General:
    """The arguments of one run over whole sequences, or the gradients with the same shapes."""

    x: Inputs
    """q [B, T, HQ, K], w as its k, u as its v, g [B, T, HV, K or 1]."""
    e: Tensor
    transposed: bool

    @property
    def heads(self) -> int:
        return self.x.k.shape[2]

    def span(self, start: int, end: int) -> General:
        """The same for the tokens from start to end; views."""
        return replace(self, x=self.x.span(start, end), e=self.e[:, start:end])


@dataclass(frozen=True)
class Chunks:
    """One segment of one block, M = chunks x pairs; of a last chunk that is shorter, padded to a power of two."""

    w: Tensor  # [M, C, K]
    x: Tensor  # E, and after it Q unless the form is transposed: what meets W under the decay, [M, C, 1 + R, K]
    q: Tensor  # Q, [M, C, R, K]
    decay: SharedDecay | ChannelDecay

    def by_token(self, x: Tensor) -> Tensor:
        """[M, C*R, D] as [M, C, R, D]."""
        return x.view(*self.q.shape[:3], -1)


def prepare(x: General, block: Block, segment: Segment) -> Chunks:
    w = load(x.x.k, block, segment)
    if x.transposed:
        q, met = by_query(load(of_heads(x.x.q, x.heads), block, segment), block), load(x.e, block, segment).unsqueeze(2)
    else:
        met = w.new_empty(*w.shape[:2], 1 + block.queries, w.shape[2])
        load(x.e, block, segment, out=met[:, :, 0])
        q = load(of_heads(x.x.q, x.heads), block, segment, out=met[:, :, 1:])
    g = None if x.x.g is None else load(x.x.g, block, segment)
    return Chunks(w, met, q, SharedDecay(g, like=w) if g is None or g.shape[-1] == 1 else ChannelDecay(g))


def padded(segment: Segment) -> Segment:
    return replace(segment, length=1 << (segment.length - 1).bit_length())


def load(x_BTHD: Tensor, block: Block, segment: Segment, out: Tensor | None = None) -> Tensor:
    """[M, C, D] of some heads, or `out` [M, C, ...] filled; zeros after the last token change nothing."""
    cut = of_segment(x_BTHD, block.rows, block.heads, segment)
    if out is None:
        out = x_BTHD.new_empty(cut.shape[:3].numel(), padded(segment).length, x_BTHD.shape[-1])
    out[:, segment.length :] = 0
    filled = out[:, : segment.length].unflatten(0, cut.shape[:3])
    filled.copy_(cut.view(*cut.shape[:4], *out.shape[2:]))
    return out


def save(target_BTHD: Tensor, block: Block, segment: Segment, x: Tensor) -> None:
    """The inverse of `load`, for [M, C, ...]."""
    store(target_BTHD, block.rows, block.heads, segment, x.flatten(2)[:, : segment.length])


def of_heads(x_BTHD: Tensor, heads: int) -> Tensor:
    """[B, T, HQ, D] as [B, T, HV, R * D]: the rows of the queries that read one state side by side."""
    return x_BTHD.unflatten(2, (heads, -1)).flatten(3)


def by_query(x: Tensor, block: Block) -> Tensor:
    return x.unflatten(2, (block.queries, -1))


def forward_block(x: General, block: Block, state: Tensor, out: Tensor, kept: Kept, scratch: Scratch) -> None:
    """Run a block over all its chunks. `state` [rows, heads, K, V] is updated; `kept` is filled."""
    s = state.flatten(0, 1)
    for segment in segments(x.x, s.shape[0]):
        scratch.release_all()
        found, c = kept.of(padded(segment)), prepare(x, block, segment)
        found.states[0].copy_(s)
        products, met = c.decay.products(c.x, c.w), c.decay.from_start(c.x)
        invert(products[:, :, 0], found.solve, scratch)
        torch.bmm(found.solve, load(x.x.v, block, segment), out=found.written)
        forward_scan(found, torch.bmm(found.solve, met[:, :, 0]), c.decay.to_end(c.w), c.decay.left)
        if x.transposed:
            torch.bmm(c.q.flatten(1, 2), found.written.mT, out=found.reads)
            o = across(c, found).add_(c.decay.mix(c.by_token(found.reads), c.w))
        else:
            c.by_token(found.reads).copy_(products[:, :, 1:])
            o = torch.bmm(met[:, :, 1:].flatten(1, 2), found.before).baddbmm_(found.reads, found.written)
        save(of_heads(out, x.heads), block, segment, c.by_token(o))
        s = found.states[-1]
    state.copy_(s.view(state.shape))


def across(c: Chunks, kept: Kept) -> Tensor:
    """What a transposed form reads of the states before, [M, C, R, V]."""
    return c.decay.from_start(c.by_token(torch.bmm(c.q.flatten(1, 2), kept.before.mT)))


def backward_block(
    x: General, block: Block, grad: General, d_out: Tensor, d_state: Tensor, kept: Kept, scratch: Scratch
) -> None:
    """The same block in reverse. `d_state` holds dS after the last chunk and ends as dS before the first."""
    ds = d_state.flatten(0, 1)
    pairs = ds.shape[0]
    for segment in reversed(segments(x.x, pairs)):
        scratch.release_all()
        found, c = kept.of(padded(segment)), prepare(x, block, segment)
        # -dU, and after it dO unless the form is transposed
        dy = c.x.new_empty(*c.x.shape[:3], x.x.v.shape[3])
        do = load(of_heads(d_out, x.heads), block, segment, out=None if x.transposed else dy[:, :, 1:])
        do, q, met = by_query(do, block) if x.transposed else do, c.q.flatten(1, 2), c.decay.from_start(c.x)
        weights = torch.bmm(found.solve, met[:, :, 0])
        # dR = `reads`ᵀ `other`: P and dO, or dN and Q
        if x.transposed:
            reads, met, other = c.decay.products(do, c.w).flatten(1, 2), c.decay.from_start(do).flatten(1, 2), q
        else:
            reads, met, other = found.reads, met[:, :, 1:].flatten(1, 2), do.flatten(1, 2)
        dr = torch.bmm(reads.mT, other)
        ds_all = backward_scan(met, other, dr, ds, weights, c.decay.to_end(c.w), c.decay.left, scratch)
        ds.copy_(ds_all[:pairs])
        ds_after = ds_all[pairs:]

        du = torch.bmm(found.solve.mT, dr)
        torch.neg(du, out=dy[:, :, 0])
        products = torch.bmm(dy.flatten(1, 2), found.written.mT).view(*c.x.shape[:3], -1)
        diagonal_of(products)[:, :, 0] = 0
        dx, dw = c.decay.gradients(products, c.x, c.w)
        dx += c.decay.from_start(torch.bmm(dy.flatten(1, 2), found.before.mT).view(c.x.shape))
        dw += c.decay.to_end(torch.bmm(found.written, ds_after.mT))
        along, dq = (c.x * dx).sum(2), dx[:, :, 1:]
        if x.transposed:
            dq = c.by_token(torch.bmm(reads, found.written).baddbmm_(met, found.before))
            mixed, columns = c.decay.gradients(c.by_token(found.reads), do, c.w)
            dw += columns
            along += mixed.add_(across(c, found)).mul_(do).sum(2)
        if x.x.g is not None and grad.x.g is not None:
            along.addcmul_(c.w, dw, value=-1)
            along[:, -1].add_((found.after * ds_after).sum(-1))
            save(grad.x.g, block, segment, decay_gradient(load(x.x.g, block, segment), along))
        for target, gradient in (
            (of_heads(grad.x.q, x.heads), dq),
            (grad.x.k, dw),
            (grad.e, dx[:, :, 0]),
            (grad.x.v, du),
        ):
            save(target, block, segment, gradient)


def decay_gradient(g: Tensor, along: Tensor) -> Tensor:
    """dg from dG [M, C, D]: sums from the end of the chunk; 0 where exp(g) is 0."""
    along = along.sum(-1, keepdim=True) if g.shape[-1] == 1 else along
    from_end = along.new_ones(along.shape[1], along.shape[1]).triu_()
    return (from_end @ along).masked_fill_(g < LOWEST[g.dtype], 0)
