"""The linear class, parallel over the tokens of a chunk: PyTorch only, with a hand-written backward.

Inside a chunk of C tokens that starts from the state S0, with G the inclusive cumulative sum of g and
Γ_ij = exp(G_i - G_j) for i ≥ j, else 0 (Yang et al. 2024, arXiv 2406.06484 and 2412.06464):

    A  = strictly lower part of  β ⊙ (K Kᵀ) ⊙ Γ           P  = scale · (Q Kᵀ) ⊙ Γ             T = (I + A)⁻¹
    U  = T_β V            W = T_W K                       R  = U - W S0                       what is really written
    O  = scale · exp(G) ⊙ (Q S0) + P R                    S1 = exp(G_C) S0 + Kᵀ (exp(G_C - G) ⊙ R)

T_β and T_W are T with its columns multiplied by β and by β exp(G). Without erasing (the sum rule) T = I and W = 0.
Only R and S1 have to wait for the chunk before; everything else is computed for many chunks at once.
The backward walks the chunks in reverse with dS1 known:

    dR = Pᵀ dO + exp(G_C - G) ⊙ (K dS1)                   dS0 = exp(G_C) dS1 + scale · Qᵀ (exp(G) ⊙ dO) - Wᵀ dR
    dV = T_βᵀ dR          Z = -T_Wᵀ dR                    dβ = Σ_v dV ⊙ R / β²
    N  = -(dV Rᵀ) ⊙ Γ (strict)                            Ω = (dO Rᵀ) ⊙ Γ
    dQ = (exp(G) ⊙ dO) S0ᵀ + Ω K                          dK = (exp(G_C - G) ⊙ R) dS1ᵀ + Z S0ᵀ + (N + Nᵀ) K + Ωᵀ Q
    dG = Σ_k (Q ⊙ dQ - K ⊙ dK) + 2 ε,   ε = Σ_v dV ⊙ (R / β - V),   dG_C += ⟨S1, dS1⟩,   dg = sums of dG from the end

The backward gets the inputs and the state at every chunk's start; all the rest is computed again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .blocks import Block, Inputs, Segment, load, load_scaled, segments, store

SOLVE = 32  # rows of a triangle that are solved by substitution
TINY = 1e-10  # stands for a smaller β in the backward, which divides by its square


@dataclass
class Chunks:
    """One segment of one block in the computing dtype. First dimension: chunks x pairs, the pairs inside."""

    q: Tensor  # [M, R*C, K], scaled
    k: Tensor
    v: Tensor
    beta: Tensor | None  # [M, C, 1]
    decay: Tensor | None  # exp(G), [M, C, 1]
    decay_q: Tensor | None  # the same for every query row
    remaining: Tensor | None  # exp(G_C - G)
    gamma: Tensor | None  # [M, C, C]
    solve: Tensor | None  # T_β, [M, C, C]
    solve_keys: Tensor | None  # T_W
    reads: Tensor  # P, [M, R*C, C]
    written: Tensor  # U, [M, C, V]; R once the states are known
    weights: Tensor | None  # W, [M, C, K]
    q_norm: Tensor | None  # 1 / length of q and k, [M, R*C, 1]
    k_norm: Tensor | None

    @property
    def k_remaining(self) -> Tensor:
        """exp(G_C - G) ⊙ K: what meets the state at the chunk's end."""
        return self.k if self.remaining is None else self.k * self.remaining

    @property
    def left(self) -> Tensor | None:
        """exp(G_C), [M, 1, 1]: what is left of a state after the chunk."""
        return None if self.decay is None else self.decay[:, -1:]


def prepare(x: Inputs, block: Block, segment: Segment, *, backward: bool = False) -> Chunks:
    """Everything of a segment that does not depend on the state."""
    at = (block.rows, block.value_heads, segment, x.dtype)
    at_q = (block.rows, block.query_heads, segment, x.dtype, block.group if block.share else 1)
    at_k = (block.rows, block.heads, segment, x.dtype, block.group)
    q, q_norm = load_scaled(x.q, *at_q, l2norm=x.l2norm, scale=x.scale)
    k, k_norm = load_scaled(x.k, *at_k, l2norm=x.l2norm)
    v = load(x.v, *at)
    q = q.view(k.shape[0], -1, k.shape[-1])
    beta = None if x.beta is None else load(x.beta.unsqueeze(-1), *at)
    if backward and beta is not None:
        beta.masked_fill_(beta.abs() < TINY, TINY)

    decay = decay_q = remaining = gamma = None
    if x.g is not None:
        total = load(x.g.unsqueeze(-1), *at).cumsum_(1)
        gamma = (total - total.mT).exp_().tril_()
        remaining = (total[:, -1:] - total).exp_()
        decay = total.exp_()
        decay_q = decay if block.queries == 1 else decay.repeat(1, block.queries, 1)
    reads = apply_gamma(torch.bmm(q, k.mT), gamma, block.queries)
    if not x.erase:
        written, solve, solve_keys, weights = v if beta is None else v * beta, None, None, None
    else:
        system = torch.bmm(k, k.mT)
        for factor in (gamma, beta):
            system = system if factor is None else system.mul_(factor)
        inverse = invert(system)
        solve = inverse if beta is None else inverse.mul_(beta.mT)
        solve_keys = solve if decay is None else solve * decay.mT
        written, weights = torch.bmm(solve, v), torch.bmm(solve_keys, k)
    return Chunks(
        q, k, v, beta, decay, decay_q, remaining, gamma, solve, solve_keys, reads, written, weights, q_norm, k_norm
    )


def apply_gamma(x: Tensor, gamma: Tensor | None, queries: int) -> Tensor:
    """x ⊙ Γ in place for [M, R*C, C]; without decay Γ is the lower triangle."""
    grouped = x.view(x.shape[0], queries, -1, x.shape[-1])
    if gamma is None:
        grouped.tril_()
    else:
        grouped.mul_(gamma.unsqueeze(1))
    return x


def invert(system: Tensor) -> Tensor:
    """(I + strictly lower part)⁻¹: substitution in blocks of SOLVE rows, then merges of neighbours.

    A Neumann series has no correct digit when keys are correlated.
    """
    size = width = system.shape[-1]
    while width > SOLVE and width % 2 == 0:
        width //= 2
    eye = torch.eye(width, dtype=system.dtype, device=system.device)
    solved = torch.linalg.solve_triangular(blocks_along(system, width), eye, upper=False, unitriangular=True)
    if width == size:
        return solved.view_as(system)
    inverse = torch.zeros_like(system)
    blocks_along(inverse, width).copy_(solved)
    while width < size:
        # [[X, 0], [L, Y]]⁻¹ = [[X⁻¹, 0], [-Y⁻¹ L X⁻¹, Y⁻¹]]
        upper, lower = (blocks_along(inverse, width)[:, i::2].flatten(0, 1) for i in (0, 1))
        between = blocks_along(system, width, below=1)[:, ::2].flatten(0, 1)
        merged = torch.bmm(lower, torch.bmm(between, upper)).neg_()
        target = blocks_along(inverse, width, below=1)[:, ::2]
        target.copy_(merged.view(target.shape))
        width *= 2
    return inverse


def blocks_along(x: Tensor, width: int, *, below: int = 0) -> Tensor:
    """View of the width x width blocks on the diagonal of [M, C, C], or on the one `below` it: [M, blocks, w, w]."""
    matrices, rows, columns = x.stride()
    shape = (len(x), x.shape[-1] // width - below, width, width)
    return x[:, below * width :].as_strided(
        shape, (matrices, width * (rows + columns), rows, columns), x.storage_offset() + below * width * rows
    )


def forward_block(x: Inputs, block: Block, state: Tensor, out: Tensor, kept: Tensor | None) -> None:
    """Run a block over all its chunks. `state` [rows, heads, K, V] is updated; `kept` gets the states between."""
    s = state.flatten(0, 1)
    for segment in segments(x, s.shape[0]):
        c = prepare(x, block, segment)
        states = torch.empty(segment.count + 1, *s.shape, dtype=s.dtype, device=s.device)
        forward_scan(c, states, s)
        before = states[:-1].flatten(0, 1)
        o = torch.bmm(c.q, before)
        if c.decay_q is not None:
            o.mul_(c.decay_q)
        o.baddbmm_(c.reads, c.written)
        store(out, block.rows, block.out_heads, segment, o)
        s = states[-1]
        if kept is not None:
            kept[segment.first : segment.first + segment.count + 1] = states.view(-1, *state.shape)
    state.copy_(s.view(state.shape))


def forward_scan(c: Chunks, states: Tensor, first: Tensor) -> None:
    """The part that goes from chunk to chunk: U becomes R, and `states` [chunks + 1, pairs, K, V] are filled."""
    states[0].copy_(first)
    columns = (c.written, c.weights, c.k_remaining, c.left, states[:-1].flatten(0, 1), states[1:].flatten(0, 1))
    parts = zip(*(per_chunk(column, len(states) - 1) for column in columns), strict=True)
    for written, weights, k, left, s, after in parts:
        if weights is not None:
            written.baddbmm_(weights, s, alpha=-1)
        if left is None:
            torch.baddbmm(s, k.mT, written, out=after)
        else:
            torch.mul(s, left, out=after).baddbmm_(k.mT, written)


def per_chunk(x: Tensor | None, count: int) -> Any:
    """Views of the chunks of [chunks * pairs, ...]."""
    return [None] * count if x is None else x.unflatten(0, (count, -1)).unbind()


def backward_block(x: Inputs, block: Block, grad: Inputs, d_out: Tensor, d_state: Tensor, kept: Tensor) -> None:
    """The same block in reverse. `d_state` holds dS after the last chunk and ends as dS before the first."""
    ds = d_state.flatten(0, 1)
    pairs = ds.shape[0]
    for segment in reversed(segments(x, pairs)):
        c = prepare(x, block, segment, backward=True)
        states = kept[segment.first : segment.first + segment.count + 1].reshape(-1, *kept.shape[-2:])
        before, after = states[:-pairs], states[pairs:]
        do = load(d_out, block.rows, block.out_heads, segment, x.dtype).view(*c.q.shape[:2], -1)
        if c.weights is not None:
            c.written.baddbmm_(c.weights, before, alpha=-1)
        dr = torch.bmm(c.reads.mT, do)
        omega = apply_gamma(torch.bmm(do, c.written.mT), c.gamma, block.queries)
        if c.decay_q is not None:
            do.mul_(c.decay_q)
        ds_all = backward_scan(c, segment.count, dr, do, ds)
        ds.copy_(ds_all[:pairs])
        ds_after = ds_all[pairs:]

        dq = torch.bmm(do, before.mT).baddbmm_(omega, c.k)
        dk = torch.bmm(c.written, ds_after.mT)
        if c.remaining is not None:
            dk.mul_(c.remaining)
        dk.baddbmm_(omega.mT, c.q)
        if c.solve is None or c.solve_keys is None:
            dv = dr if c.beta is None else dr.mul_(c.beta)
            along_written = None if c.beta is None else row_sums(dv, c.written)
        else:
            dv = torch.bmm(c.solve.mT, dr)
            erased = torch.bmm(dv, c.written.mT)
            along_written = erased.diagonal(dim1=1, dim2=2).unsqueeze(-1).clone()
            erased = erased.tril_(-1) if c.gamma is None else erased.mul_(c.gamma)
            erased.diagonal(dim1=1, dim2=2).zero_()
            dk.baddbmm_(torch.bmm(c.solve_keys.mT, dr), before.mT, alpha=-1)
            dk.baddbmm_(erased, c.k, alpha=-1).baddbmm_(erased.mT, c.k, alpha=-1)
        found = Found(dq, dk, dv, along_written, inner(after, ds_after))
        store_gradients(x, block, segment, grad, c, found)


@dataclass(frozen=True)
class Found:
    """Gradients of what a segment's chunks used, [M, ...]."""

    q: Tensor
    k: Tensor
    v: Tensor
    along_written: Tensor | None  # Σ_v dV ⊙ R
    along_state: Tensor  # ⟨S1, dS1⟩


def inner(a: Tensor, b: Tensor) -> Tensor:
    """[M, 1, 1]: the inner products of the matrices of two [M, K, V]."""
    return (a * b).sum((1, 2), keepdim=True)


def backward_scan(c: Chunks, count: int, dr: Tensor, do: Tensor, ds: Tensor) -> Tensor:
    """The part that goes from chunk to chunk: dS before the first chunk and after every one, along the first dimension.

    `dr` arrives without its share from dS, `do` multiplied by exp(G).
    """
    pairs = ds.shape[0]
    ds_all = torch.empty((count + 1) * pairs, *ds.shape[1:], dtype=ds.dtype, device=ds.device)
    torch.bmm(c.q.mT, do, out=ds_all[:-pairs])
    ds = ds_all[-pairs:].copy_(ds)
    columns = (dr, c.k_remaining, c.weights, c.left, ds_all[:-pairs])
    for d_written, k, weights, left, before in reversed(
        list(zip(*(per_chunk(column, count) for column in columns), strict=True))
    ):
        d_written.baddbmm_(k, ds)
        ds = before.add_(ds) if left is None else before.addcmul_(ds, left)
        if weights is not None:
            ds.baddbmm_(weights.mT, d_written, alpha=-1)
    return ds_all


def store_gradients(x: Inputs, block: Block, segment: Segment, grad: Inputs, c: Chunks, found: Found) -> None:
    """From the gradients of what the chunks used to the gradients of what the caller gave."""
    at = (block.rows, block.value_heads, segment)
    dq, dk, dv, along_written = found.q, found.k, found.v, found.along_written
    along_q = row_sums(c.q, dq) if x.l2norm or x.g is not None else None
    along_k = row_sums(c.k, dk) if x.l2norm or x.g is not None else None
    if grad.beta is not None and c.beta is not None and along_written is not None:
        along_written = along_written / c.beta
        store(grad.beta.unsqueeze(-1), *at, along_written / c.beta)
    if grad.g is not None and along_q is not None and along_k is not None:
        per_key = along_q.view(along_k.shape[0], block.queries, -1, 1).sum(1) - along_k
        if x.erase and along_written is not None:
            per_key += 2 * (along_written - row_sums(dv, c.v))
        per_key[:, -1:] += found.along_state
        store(grad.g.unsqueeze(-1), *at, per_key.flip(1).cumsum(1).flip(1))
    if c.q_norm is None or c.k_norm is None or along_q is None or along_k is None:
        dq.mul_(x.scale)
    else:
        # q is the unit vector times the scale
        q_norm = c.q_norm.view(*dq.shape[:2], 1)
        dq.mul_(q_norm * x.scale).addcmul_(c.q, along_q * q_norm, value=-1 / x.scale)
        dk.mul_(c.k_norm).addcmul_(c.k, along_k * c.k_norm, value=-1)
    store(grad.v, *at, dv)
    store(grad.k, block.rows, block.heads, segment, dk, block.group)
    store(grad.q, block.rows, block.query_heads, segment, dq, block.group if block.share else 1)


def row_sums(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)
