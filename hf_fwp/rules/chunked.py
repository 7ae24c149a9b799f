"""The linear class, parallel over the tokens of a chunk: PyTorch only, with a hand-written backward.

Inside a chunk of C tokens that starts from the state S0, with G the inclusive cumulative sum of g and
Γ_ij = exp(G_i - G_j) for i ≥ j, else 0 (Yang et al. 2024, arXiv 2406.06484 and 2412.06464):

    A  = strictly lower part of  β ⊙ (K Kᵀ) ⊙ Γ           P  = scale · (Q Kᵀ) ⊙ Γ             T = (I + A)⁻¹
    U  = T (β ⊙ V)        W = T (β ⊙ exp(G) ⊙ K)          R  = U - W S0                       what is really written
    O  = scale · exp(G) ⊙ (Q S0) + P R                    S1 = exp(G_C) S0 + Kᵀ (exp(G_C - G) ⊙ R)

Without erasing (the sum rule) T = I and W = 0.
Only R and S1 have to wait for the chunk before; everything else is computed for many chunks at once.
The backward walks the chunks in reverse with dS1 known:

    dR = Pᵀ dO + exp(G_C - G) ⊙ (K dS1)                   dS0 = exp(G_C) dS1 + scale · Qᵀ (exp(G) ⊙ dO) - Wᵀ dR
    dY = Tᵀ dR            dV = β ⊙ dY                     Z  = -exp(G) ⊙ dV                   dβ = Σ_v dY ⊙ R / β
    N  = -(dV Rᵀ) ⊙ Γ (strict)                            Ω = (dO Rᵀ) ⊙ Γ
    dQ = (exp(G) ⊙ dO) S0ᵀ + Ω K                          dK = (exp(G_C - G) ⊙ R) dS1ᵀ + Z S0ᵀ + (N + Nᵀ) K + Ωᵀ Q
    dG = Σ_k (Q ⊙ dQ - K ⊙ dK) + 2 ε,   ε = Σ_v (dY ⊙ R - dV ⊙ V),   dG_C += ⟨S1, dS1⟩,   dg = sums of dG from the end

The backward gets the inputs and, of every chunk, the state at its start, T, P and R; the rest is computed again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .blocks import Block, Inputs, Kept, Scratch, Segment, segments, store
from .gating import LOWEST

SOLVE = 32  # rows of a triangle that are solved by substitution
TINY = 1e-20  # stands for a smaller β: the backward divides by it


@dataclass
class Chunks:
    """One segment of one block in the computing dtype. First dimension: chunks x pairs, the pairs inside."""

    q: Tensor  # [M, R*C, K], scaled
    k: Tensor
    beta: Tensor | None  # [M, C, 1]
    decay: Tensor | None  # exp(G), [M, C, 1]
    decay_q: Tensor | None  # the same for every query row
    remaining: Tensor | None  # exp(G_C - G)
    k_remaining: Tensor  # exp(G_C - G) ⊙ K: what meets the state at the chunk's end
    gamma: Tensor | None  # [M, C, C]
    weights: Tensor | None  # W, [M, C, K]
    q_norm: Tensor | None  # 1 / length of q and k, [M, R*C, 1]
    k_norm: Tensor | None

    @property
    def left(self) -> Tensor | None:
        """exp(G_C), [M, 1, 1]: what is left of a state after the chunk."""
        return None if self.decay is None else self.decay[:, -1:]


def prepare(x: Inputs, block: Block, segment: Segment, kept: Kept, scratch: Scratch, *, known: bool) -> Chunks:
    """Everything of a segment that does not depend on the state. T, P and U go to `kept` if they are not `known`."""
    at = (block.rows, block.value_heads, segment)
    k = scratch.load(x.k, block.rows, block.heads, segment, block.group)
    q = scratch.load(x.q, block.rows, block.query_heads, segment, block.group if block.share else 1)
    q = q.view(k.shape[0], -1, k.shape[-1])
    q_norm, k_norm = (scratch.normalize(q), scratch.normalize(k)) if x.l2norm else (None, None)
    q.mul_(x.scale)
    beta = None if x.beta is None else scratch.load(x.beta.unsqueeze(-1), *at)
    if beta is not None:
        beta.masked_fill_(beta.abs() < TINY, TINY)

    decay = decay_q = remaining = gamma = weights = None
    if x.g is not None:
        total = scratch.load(x.g.unsqueeze(-1), *at)
        total.clamp_min_(LOWEST[total.dtype]).cumsum_(1)
        gamma = torch.sub(total, total.mT, out=scratch.empty(*total.shape[:2], total.shape[1])).exp_().tril_()
        remaining = (total[:, -1:] - total).exp_()
        decay = total.exp_()
        decay_q = decay if block.queries == 1 else decay.repeat(1, block.queries, 1)
    if not known:
        apply_gamma(torch.bmm(q, k.mT, out=kept.reads), gamma, block.queries)
        v = scratch.load(x.v, *at)
        if x.erase:
            system = scratch.bmm(k, k.mT)
            for factor in (gamma, beta):
                system = system if factor is None else system.mul_(factor)
            invert(system, kept.solve, scratch)
            scratch.release(system)
            torch.bmm(kept.solve, v if beta is None else v.mul_(beta), out=kept.written)
        else:
            kept.written.copy_(v if beta is None else v.mul_(beta))
        scratch.release(v)
    if x.erase:
        factor = decay if beta is None else beta if decay is None else beta * decay
        weights = scratch.bmm(kept.solve, k if factor is None else scratch.mul(k, factor))
    k_remaining = k if remaining is None else scratch.mul(k, remaining)
    return Chunks(q, k, beta, decay, decay_q, remaining, k_remaining, gamma, weights, q_norm, k_norm)


def apply_gamma(x: Tensor, gamma: Tensor | None, queries: int) -> Tensor:
    """x ⊙ Γ in place for [M, R*C, C]; without decay Γ is the lower triangle."""
    grouped = x.view(x.shape[0], queries, -1, x.shape[-1])
    if gamma is None:
        grouped.tril_()
    else:
        grouped.mul_(gamma.unsqueeze(1))
    return x


def invert(system: Tensor, out: Tensor, scratch: Scratch) -> None:
    """out = (I + strictly lower part)⁻¹: substitution in blocks of SOLVE rows, then merges of neighbours.

    A Neumann series has no correct digit when keys are correlated.
    """
    size = width = system.shape[-1]
    while width > SOLVE and width % 2 == 0:
        width //= 2
    eye = torch.eye(width, dtype=system.dtype, device=system.device)
    diagonal = blocks_along(system, width)
    solved = out.view(diagonal.shape) if width == size else scratch.empty(*diagonal.shape)
    # the library works on columns: transposed, the matrices lie in memory as it wants them
    torch.linalg.solve_triangular(diagonal.mT, eye, upper=True, unitriangular=True, out=solved.mT)
    if width < size:
        blocks_along(out.zero_(), width).copy_(solved)
        scratch.release(solved)
    while width < size:
        # [[X, 0], [L, Y]]⁻¹ = [[X⁻¹, 0], [-Y⁻¹ L X⁻¹, Y⁻¹]]
        upper, lower = (blocks_along(out, width)[:, i::2].flatten(0, 1) for i in (0, 1))
        between = blocks_along(system, width, below=1)[:, ::2].flatten(0, 1)
        right = scratch.bmm(between, upper)
        merged = scratch.bmm(lower, right).neg_()
        target = blocks_along(out, width, below=1)[:, ::2]
        target.copy_(merged.view(target.shape))
        scratch.release(right, merged)
        width *= 2


def blocks_along(x: Tensor, width: int, *, below: int = 0) -> Tensor:
    """View of the width x width blocks on the diagonal of [M, C, C], or on the one `below` it: [M, blocks, w, w]."""
    matrices, rows, columns = x.stride()
    shape = (len(x), x.shape[-1] // width - below, width, width)
    return x[:, below * width :].as_strided(
        shape, (matrices, width * (rows + columns), rows, columns), x.storage_offset() + below * width * rows
    )


def forward_block(x: Inputs, block: Block, state: Tensor, out: Tensor, kept: Kept, scratch: Scratch) -> None:
    """Run a block over all its chunks. `state` [rows, heads, K, V] is updated; `kept` is filled."""
    s = state.flatten(0, 1)
    for segment in segments(x, s.shape[0]):
        found = kept.of(segment)
        found.states[0].copy_(s)
        scratch.release_all()
        c = prepare(x, block, segment, found, scratch, known=False)
        forward_scan(found, c.weights, c.k_remaining, c.left)
        o = scratch.bmm(c.q, found.before)
        if c.decay_q is not None:
            o.mul_(c.decay_q)
        o.baddbmm_(found.reads, found.written)
        store(out, block.rows, block.out_heads, segment, o)
        s = found.states[-1]
    state.copy_(s.view(state.shape))


def forward_scan(kept: Kept, weights: Tensor | None, k_remaining: Tensor, left: Tensor | None) -> None:
    """The part that goes from chunk to chunk: U becomes R, and the states after the first are filled."""
    columns = (kept.written, weights, k_remaining, left, kept.before, kept.after)
    for u, w, k, decay, s, after in zip(*(per_chunk(x, len(kept.states) - 1) for x in columns), strict=True):
        if w is not None:
            u.baddbmm_(w, s, alpha=-1)
        if decay is None:
            torch.baddbmm(s, k.mT, u, out=after)
        else:
            torch.mul(s, decay, out=after).baddbmm_(k.mT, u)


def per_chunk(x: Tensor | None, count: int) -> Any:
    """Views of the chunks of [chunks * pairs, ...]."""
    return [None] * count if x is None else x.unflatten(0, (count, -1)).unbind()


def backward_block(
    x: Inputs, block: Block, grad: Inputs, d_out: Tensor, d_state: Tensor, kept: Kept, scratch: Scratch
) -> None:
    """The same block in reverse. `d_state` holds dS after the last chunk and ends as dS before the first."""
    ds = d_state.flatten(0, 1)
    pairs = ds.shape[0]
    for segment in reversed(segments(x, pairs)):
        found = kept.of(segment)
        scratch.release_all()
        c = prepare(x, block, segment, found, scratch, known=True)
        do = scratch.load(d_out, block.rows, block.out_heads, segment).view(*c.q.shape[:2], -1)
        dr = scratch.bmm(found.reads.mT, do)
        omega = apply_gamma(scratch.bmm(do, found.written.mT), c.gamma, block.queries)
        if c.decay_q is not None:
            do.mul_(c.decay_q)
        ds_all = backward_scan(c.q, do, dr, ds, c.weights, c.k_remaining, c.left, scratch)
        ds.copy_(ds_all[:pairs])
        ds_after = ds_all[pairs:]

        dq = scratch.bmm(do, found.before.mT).baddbmm_(omega, c.k)
        scratch.release(do)
        dk = scratch.bmm(found.written, ds_after.mT)
        if c.remaining is not None:
            dk.mul_(c.remaining)
        dk.baddbmm_(omega.mT, c.q)
        scratch.release(omega)
        if x.erase:
            dv, along_written = erase_backward(c, found, dr, dk, scratch)
        else:
            along_written = None if c.beta is None else scratch.row_sums(dr, found.written)
            dv = dr if c.beta is None else dr.mul_(c.beta)
        along_state = None if x.g is None else scratch.mul(found.after, ds_after).sum((1, 2), keepdim=True)
        store_gradients(x, block, segment, grad, c, Found(dq, dk, dv, along_written, along_state), scratch)


def erase_backward(c: Chunks, kept: Kept, dr: Tensor, dk: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """dV and Σ_v dY ⊙ R. What erasing adds to dK is added in place."""
    dv = scratch.bmm(kept.solve.mT, dr)
    erased = scratch.bmm(dv, kept.written.mT)
    along_written = erased.diagonal(dim1=1, dim2=2).unsqueeze(-1).clone()
    if c.beta is not None:
        dv.mul_(c.beta)
        erased.mul_(c.beta)
    erased = erased.tril_(-1) if c.gamma is None else erased.mul_(c.gamma)
    erased.diagonal(dim1=1, dim2=2).zero_()
    both = torch.add(erased, erased.mT, out=scratch.empty(*erased.shape))
    dk.baddbmm_(both, c.k, alpha=-1)
    scratch.release(erased, both)
    met = dv if c.decay is None else scratch.mul(dv, c.decay)
    dk.baddbmm_(met, kept.before.mT, alpha=-1)
    return dv, along_written


@dataclass(frozen=True)
class Found:
    """Gradients of what a segment's chunks used, [M, ...]."""

    q: Tensor
    k: Tensor
    v: Tensor
    along_written: Tensor | None  # Σ_v dY ⊙ R
    along_state: Tensor | None  # ⟨S1, dS1⟩


def backward_scan(
    q: Tensor,
    do: Tensor,
    dr: Tensor,
    ds: Tensor,
    weights: Tensor | None,
    k_remaining: Tensor,
    left: Tensor | None,
    scratch: Scratch,
) -> Tensor:
    """The part that goes from chunk to chunk: dS before the first chunk and after every one, along the first dimension.

    `dr` arrives without its share from dS, and q or `do` multiplied by exp(G).
    """
    pairs = ds.shape[0]
    ds_all = scratch.empty(q.shape[0] + pairs, *ds.shape[1:])
    torch.bmm(q.mT, do, out=ds_all[:-pairs])
    ds = ds_all[-pairs:].copy_(ds)
    columns = (dr, k_remaining, weights, left, ds_all[:-pairs])
    parts = zip(*(per_chunk(x, q.shape[0] // pairs) for x in columns), strict=True)
    for d_written, k, w, decay, before in reversed(list(parts)):
        d_written.baddbmm_(k, ds)
        ds = before.add_(ds) if decay is None else before.addcmul_(ds, decay)
        if w is not None:
            ds.baddbmm_(w.mT, d_written, alpha=-1)
    return ds_all


def store_gradients(
    x: Inputs, block: Block, segment: Segment, grad: Inputs, c: Chunks, found: Found, scratch: Scratch
) -> None:
    """From the gradients of what the chunks used to the gradients of what the caller gave."""
    at = (block.rows, block.value_heads, segment)
    dq, dk, dv, along_written = found.q, found.k, found.v, found.along_written
    along_q = scratch.row_sums(c.q, dq) if x.l2norm or x.g is not None else None
    along_k = scratch.row_sums(c.k, dk) if x.l2norm or x.g is not None else None
    if grad.beta is not None and c.beta is not None and along_written is not None:
        store(grad.beta.unsqueeze(-1), *at, along_written / c.beta)
    if grad.g is not None and along_q is not None and along_k is not None and found.along_state is not None:
        per_key = along_q.view(along_k.shape[0], block.queries, -1, 1).sum(1) - along_k
        if x.erase and along_written is not None:
            per_key += 2 * (along_written - scratch.row_sums(dv, scratch.load(x.v, *at)))
        per_key[:, -1:] += found.along_state
        store(grad.g.unsqueeze(-1), *at, per_key.flip(1).cumsum(1).flip(1))
    if c.q_norm is None or c.k_norm is None or along_q is None or along_k is None:
        dq.mul_(x.scale)
    else:
        # q is the unit vector times the scale
        q_norm = c.q_norm.view(*dq.shape[:2], 1)
        dq.addcmul_(c.q, along_q, value=-1 / x.scale**2).mul_(q_norm * x.scale)
        dk.addcmul_(c.k, along_k, value=-1).mul_(c.k_norm)
    store(grad.v, *at, dv)
    store(grad.k, block.rows, block.heads, segment, dk, block.group)
    store(grad.q, block.rows, block.query_heads, segment, dq, block.group if block.share else 1)
