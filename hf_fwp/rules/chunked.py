"""The linear class, parallel over the tokens of a chunk: PyTorch only, with a hand-written backward.

Inside a chunk of C tokens that starts from the state S0, with G the inclusive cumulative sum of g and
Γ_ij = exp(G_i - G_j) for i ≥ j, else 0 (Yang et al. 2024, arXiv 2406.06484 and 2412.06464, without their corrected
values W and U):

    A  = strictly lower part of  β ⊙ (K Kᵀ) ⊙ Γ           P  = scale · (Q Kᵀ) ⊙ Γ
    X  = V - exp(G) ⊙ (K S0)                              R  = (I + A)⁻¹ (β ⊙ X)              what is really written
    O  = scale · exp(G) ⊙ (Q S0) + P R                    S1 = exp(G_C) S0 + Kᵀ (exp(G_C - G) ⊙ R)

Without erasing (the sum rule) A = 0 and X = V. The backward walks the chunks in reverse with dS1 known:

    dR = Pᵀ dO + exp(G_C - G) ⊙ (K dS1)                   dY = (I + A)⁻ᵀ dR
    dV = β ⊙ dY          dβ = Σ_v dY ⊙ R / β              dA = -dY Rᵀ           dP = dO Rᵀ
    Z  = -β ⊙ exp(G) ⊙ dY         N = β ⊙ dA ⊙ Γ (strict)         Ω = dP ⊙ Γ
    dQ = (exp(G) ⊙ dO) S0ᵀ + Ω K                          dK = (exp(G_C - G) ⊙ R) dS1ᵀ + Z S0ᵀ + (N + Nᵀ) K + Ωᵀ Q
    dS0 = exp(G_C) dS1 + Qᵀ (exp(G) ⊙ dO) + Kᵀ Z
    dG = Σ_k (Q ⊙ dQ - K ⊙ dK) + 2 ε,   ε = Σ_v dY ⊙ (R - β ⊙ V),   dG_C += ⟨S1, dS1⟩,   dg = sums of dG from the end

The backward gets the inputs and the state at every chunk's start; A, P, X and R are computed again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

PAIRS = 16  # rows x value heads side by side
ROWS = 2048  # tokens x pairs prepared at once, to stay in cache
L2NORM_EPS = 1e-6
SOLVE = 16  # rows of a triangle that are solved by substitution
TINY = 1e-20


@dataclass(frozen=True)
class Inputs:
    """The arguments of one run over whole sequences, or (in the backward) the gradients with the same shapes."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor | None
    g: Tensor | None
    scale: float = 1.0
    erase: bool = True
    l2norm: bool = False

    def span(self, start: int, end: int) -> Inputs:
        """The same for the tokens from start to end; views."""
        cut = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("q", "k", "v", "beta", "g"):
            cut[name] = None if cut[name] is None else cut[name][:, start:end]
        return Inputs(**cut)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if torch.float64 in (self.q.dtype, self.k.dtype, self.v.dtype) else torch.float32


@dataclass(frozen=True)
class Block:
    """Some rows of the batch and some heads: what is worked on at once, so that it stays in cache."""

    rows: slice
    heads: slice
    group: int  # value heads per key head
    share: bool  # one query per key head, read by the whole group
    queries: int  # queries per value head

    @property
    def value_heads(self) -> slice:
        return slice(self.heads.start * self.group, self.heads.stop * self.group)

    @property
    def out_heads(self) -> slice:
        return slice(self.value_heads.start * self.queries, self.value_heads.stop * self.queries)

    @property
    def query_heads(self) -> slice:
        return self.heads if self.share else self.out_heads


@dataclass(frozen=True)
class Segment:
    """Consecutive chunks of equal length."""

    first: int  # number of its first chunk
    start: int
    count: int
    length: int

    @property
    def span(self) -> slice:
        return slice(self.start, self.start + self.count * self.length)


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
    inverse: Tensor | None  # (I + A)⁻¹
    reads: Tensor  # P, [M, R*C, C]
    q_norm: Tensor | None  # 1 / length of q and k, [M, R*C, 1]
    k_norm: Tensor | None


def blocks(x: Inputs) -> Iterator[Block]:
    """Split batch and heads into blocks of about PAIRS states."""
    batch, heads, value_heads, query_heads = x.k.shape[0], x.k.shape[2], x.v.shape[2], x.q.shape[2]
    group = value_heads // heads
    share = query_heads == heads
    queries = 1 if share else query_heads // value_heads
    rows_at_once = max(1, PAIRS // value_heads)
    heads_at_once = min(heads, max(1, PAIRS // group))
    for row in range(0, batch, rows_at_once):
        for head in range(0, heads, heads_at_once):
            rows = slice(row, min(batch, row + rows_at_once))
            yield Block(rows, slice(head, min(heads, head + heads_at_once)), group, share, queries)


def chunk_length(key_size: int, value_size: int) -> int:
    """A part of the work per token grows with the chunk, another part, meeting the state, shrinks with it."""
    return 32 if max(key_size, value_size) <= 64 else 64


def segments(x: Inputs, pairs: int) -> list[Segment]:
    """Full chunks, a few at once, then what is left over as a shorter chunk."""
    chunk = chunk_length(x.k.shape[3], x.v.shape[3])
    full, rest = divmod(x.k.shape[1], chunk)
    at_once = max(1, ROWS // (pairs * chunk))
    found = [Segment(c, c * chunk, min(at_once, full - c), chunk) for c in range(0, full, at_once)]
    if rest:
        found.append(Segment(full, full * chunk, 1, rest))
    return found


def load(x_BTHD: Tensor, rows: slice, heads: slice, segment: Segment, dtype: torch.dtype, repeat: int = 1) -> Tensor:
    """A contiguous copy [chunks * rows * heads * repeat, C, D]; every head `repeat` times."""
    x = x_BTHD[rows, segment.span, heads].unflatten(1, (segment.count, segment.length)).permute(1, 0, 3, 2, 4)
    if repeat > 1:
        x = x.unsqueeze(3).expand(-1, -1, -1, repeat, -1, -1)
    copy = torch.empty(x.shape, dtype=dtype, device=x.device).copy_(x)
    return copy.view(-1, *x.shape[-2:])


def store(target_BTHD: Tensor, rows: slice, heads: slice, segment: Segment, x: Tensor, repeat: int = 1) -> None:
    """The inverse of `load`; repeated heads are summed."""
    target = target_BTHD[rows, segment.span, heads].unflatten(1, (segment.count, segment.length)).permute(1, 0, 3, 2, 4)
    if repeat > 1:
        shape = target.shape
        target.copy_(x.view(*shape[:3], repeat, *shape[3:]).sum(3))
    else:
        target.copy_(x.view(target.shape))


def normalize_rows(x: Tensor) -> Tensor:
    """Bring the rows to length 1 in place; returns what they were multiplied by."""
    factor = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().add_(L2NORM_EPS).rsqrt_()
    x.mul_(factor)
    return factor


def prepare(x: Inputs, block: Block, segment: Segment, *, backward: bool = False) -> Chunks:
    """Everything of a segment that does not depend on the state."""
    at = (block.rows, block.value_heads, segment, x.dtype)
    q = load(x.q, block.rows, block.query_heads, segment, x.dtype, block.group if block.share else 1)
    k = load(x.k, block.rows, block.heads, segment, x.dtype, block.group)
    q_norm = normalize_rows(q) if x.l2norm else None
    k_norm = normalize_rows(k) if x.l2norm else None
    q = q.mul_(x.scale).view(k.shape[0], -1, k.shape[-1])
    beta = None if x.beta is None else load(x.beta.unsqueeze(-1), *at)
    if backward and beta is not None:
        beta.masked_fill_(beta == 0, TINY)  # so that R / β exists

    decay = decay_q = remaining = gamma = None
    if x.g is not None:
        total = load(x.g.unsqueeze(-1), *at).cumsum_(1)
        gamma = (total - total.mT).exp_().tril_()
        remaining = (total[:, -1:] - total).exp_()
        decay = total.exp_()
        decay_q = decay if block.queries == 1 else decay.repeat(1, block.queries, 1)
    inverse = None
    if x.erase:
        system = torch.bmm(k, k.mT)
        if gamma is not None:
            system.mul_(gamma)
        if beta is not None:
            system.mul_(beta)
        inverse = invert(system)
    reads = apply_gamma(torch.bmm(q, k.mT), gamma, block.queries)
    return Chunks(q, k, load(x.v, *at), beta, decay, decay_q, remaining, gamma, inverse, reads, q_norm, k_norm)


def apply_gamma(x: Tensor, gamma: Tensor | None, queries: int) -> Tensor:
    """x ⊙ Γ in place for [M, R*C, C]; without decay Γ is the lower triangle."""
    grouped = x.view(x.shape[0], queries, -1, x.shape[-1])
    if gamma is None:
        grouped.tril_()
    else:
        grouped.mul_(gamma.unsqueeze(1))
    return x


def invert(system: Tensor) -> Tensor:
    """(I + strictly lower part)⁻¹: substitution in 16 x 16 blocks, then merges of neighbours.

    One substitution over 64 rows has twice the error when keys are correlated; a Neumann series has no correct digit.
    """
    size = system.shape[-1]
    if size <= SOLVE or size % 2:
        eye = torch.eye(size, dtype=system.dtype, device=system.device).expand_as(system)
        return torch.linalg.solve_triangular(system, eye, upper=False, unitriangular=True)
    half, count = size // 2, system.shape[0]
    corners = torch.cat([system[:, :half, :half], system[:, half:, half:]])
    upper, lower = invert(corners).split(count)
    inverse = torch.zeros_like(system)
    inverse[:, :half, :half] = upper
    inverse[:, half:, half:] = lower
    inverse[:, half:, :half] = torch.bmm(lower, torch.bmm(system[:, half:, :half], upper)).neg_()
    return inverse


def forward_block(x: Inputs, block: Block, state: Tensor, out: Tensor, kept: Tensor | None) -> None:
    """Run a block over all its chunks. `state` [rows, heads, K, V] is updated; `kept` gets the states between."""
    s = state.flatten(0, 1)
    if kept is not None:
        s = kept[0].copy_(state).flatten(0, 1)
    for segment in segments(x, s.shape[0]):
        c = prepare(x, block, segment)
        o = torch.empty(*c.q.shape[:2], s.shape[-1], dtype=s.dtype, device=s.device)
        solve = c.inverse if c.beta is None or c.inverse is None else c.inverse.mul_(c.beta.mT)
        last = None if c.decay is None else c.decay[:, -1:]
        columns = (c.q, c.k, c.v, solve, c.reads, c.beta, c.decay, c.decay_q, c.remaining, last, o)
        parts = zip(*(per_chunk(column, segment.count) for column in columns), strict=True)
        for i, (q, k, v, inverse, reads, beta, decay, decay_q, remaining, left, read) in enumerate(parts):
            written = written_values(k, v, s, inverse, beta, decay)
            torch.bmm(q, s, out=read)
            if decay_q is not None:
                read.mul_(decay_q)
            read.baddbmm_(reads, written)
            if remaining is not None:
                written.mul_(remaining)
            s = decayed(s, left, s if kept is None else kept[segment.first + i + 1].flatten(0, 1))
            s.baddbmm_(k.mT, written)
        store(out, block.rows, block.out_heads, segment, o)
    if kept is not None:
        state.copy_(s.view(state.shape))


def per_chunk(x: Tensor | None, count: int) -> Any:
    """Views of the chunks of [chunks * pairs, ...]."""
    return [None] * count if x is None else x.chunk(count)


def decayed(s: Tensor, left: Tensor | None, target: Tensor) -> Tensor:
    """What is left of s at the end of a chunk, written to `target` (which may be s)."""
    if left is not None:
        return torch.mul(s, left, out=target)
    return s if target is s else target.copy_(s)


def written_values(
    k: Tensor, v: Tensor, s: Tensor, solve: Tensor | None, beta: Tensor | None, decay: Tensor | None
) -> Tensor:
    """R, from the state at the chunk's start; `solve` is (I + A)⁻¹ with its columns multiplied by β."""
    if solve is None:
        return v if beta is None else v * beta
    retrieved = torch.bmm(k, s)
    missing = torch.sub(v, retrieved, out=retrieved) if decay is None else torch.addcmul(v, decay, retrieved, value=-1)
    return torch.bmm(solve, missing)


def backward_block(x: Inputs, block: Block, grad: Inputs, d_out: Tensor, d_state: Tensor, kept: Tensor) -> None:
    """The same block in reverse. `d_state` holds dS after the last chunk and ends as dS before the first."""
    ds = d_state.flatten(0, 1)
    pairs = ds.shape[0]
    for segment in reversed(segments(x, pairs)):
        c = prepare(x, block, segment, backward=True)
        states = kept[segment.first : segment.first + segment.count + 1].reshape(-1, *kept.shape[-2:])
        before, after = states[:-pairs], states[pairs:]
        do = load(d_out, block.rows, block.out_heads, segment, x.dtype).view(*c.q.shape[:2], -1)
        solve = c.inverse if c.inverse is None or c.beta is None else c.inverse * c.beta.mT
        written = written_values(c.k, c.v, before, solve, c.beta, c.decay)

        dr = torch.bmm(c.reads.mT, do)
        omega = apply_gamma(torch.bmm(do, written.mT), c.gamma, block.queries)
        if c.decay_q is not None:
            do.mul_(c.decay_q)
        dy, z, ds_all = backward_scan(c, segment.count, dr, do, ds)
        ds.copy_(ds_all[:pairs])

        dq = torch.bmm(do, before.mT).baddbmm_(omega, c.k)
        remains = written if c.remaining is None else written * c.remaining
        dk = torch.bmm(remains, ds_all[pairs:].mT).baddbmm_(omega.mT, c.q)
        if z is not None:
            dk.baddbmm_(z, before.mT).baddbmm_(erase_pairs(c, dy, written), c.k)
        along_state = (after, ds_all[pairs:])
        store_gradients(x, block, segment, grad, c, dq=dq, dk=dk, dy=dy, written=written, along_state=along_state)


def backward_scan(c: Chunks, count: int, dr: Tensor, do: Tensor, ds: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """The part that goes from chunk to chunk: dY, Z, and dS before the first chunk and after every one.

    `dr` arrives without its share from dS.
    """
    dy = dr if c.inverse is None else torch.empty_like(dr)
    z = None if c.inverse is None else torch.empty_like(dr)
    weight = None if c.inverse is None else erase_weight(c)
    last = None if c.decay is None else c.decay[:, -1:]
    ds_all = torch.empty((count + 1) * ds.shape[0], *ds.shape[1:], dtype=ds.dtype, device=ds.device)
    ds = ds_all[-ds.shape[0] :].copy_(ds)
    columns = (c.q, c.k, do, dr, c.inverse, weight, dy, z, c.remaining, last, ds_all[: -ds.shape[0]])
    parts = list(zip(*(per_chunk(column, count) for column in columns), strict=True))
    for q, k, d_read, d_written, inverse, erasing, d_missing, erased, remaining, left, target in reversed(parts):
        if remaining is None:
            d_written.baddbmm_(k, ds)
        else:
            d_written.addcmul_(remaining, torch.bmm(k, ds))
        ds = decayed(ds, left, target)
        ds.baddbmm_(q.mT, d_read)
        if inverse is not None:
            torch.bmm(inverse.mT, d_written, out=d_missing)
            torch.mul(d_missing, erasing, out=erased)
            ds.baddbmm_(k.mT, erased)
    return dy, z, ds_all


def erase_weight(c: Chunks) -> Tensor:
    """-β exp(G)."""
    weight = torch.ones_like(c.k[:, :, :1]) if c.beta is None else c.beta
    return -weight if c.decay is None else -weight * c.decay


def erase_pairs(c: Chunks, dy: Tensor, written: Tensor) -> Tensor:
    """N + Nᵀ, the gradient of K Kᵀ inside A."""
    pairs = torch.bmm(dy, written.mT).neg_()
    if c.gamma is not None:
        pairs.mul_(c.gamma)
    if c.beta is not None:
        pairs.mul_(c.beta)
    pairs.tril_(-1)
    return pairs + pairs.mT


def store_gradients(
    x: Inputs,
    block: Block,
    segment: Segment,
    grad: Inputs,
    c: Chunks,
    *,
    dq: Tensor,
    dk: Tensor,
    dy: Tensor,
    written: Tensor,
    along_state: tuple[Tensor, Tensor],
) -> None:
    """From the gradients of what the chunks used to the gradients of what the caller gave."""
    at = (block.rows, block.value_heads, segment)
    along_q = row_sums(c.q, dq) if x.l2norm or x.g is not None else None
    along_k = row_sums(c.k, dk) if x.l2norm or x.g is not None else None
    along_written = row_sums(dy, written) if x.erase or x.beta is not None else None
    if grad.beta is not None and c.beta is not None and along_written is not None:
        store(grad.beta.unsqueeze(-1), *at, along_written / c.beta)
    if grad.g is not None and along_q is not None and along_k is not None:
        per_key = along_q.view(along_k.shape[0], block.queries, -1, 1).sum(1) - along_k
        if x.erase and along_written is not None:
            per_key += 2 * (along_written - row_sums(dy, c.v if c.beta is None else c.v * c.beta))
        after, ds_after = along_state
        per_key[:, -1, 0] += torch.linalg.vecdot(after.flatten(1), ds_after.flatten(1))
        store(grad.g.unsqueeze(-1), *at, per_key.flip(1).cumsum(1).flip(1))
    dq.mul_(x.scale)
    if c.q_norm is not None and c.k_norm is not None:
        dq.addcmul_(c.q, along_q / -x.scale).mul_(c.q_norm.view(*dq.shape[:2], 1))
        dk.addcmul_(c.k, -along_k).mul_(c.k_norm)
    store(grad.v, *at, dy if c.beta is None else dy.mul_(c.beta))
    store(grad.k, block.rows, block.heads, segment, dk, block.group)
    store(grad.q, block.rows, block.query_heads, segment, dq, block.group if block.share else 1)


def row_sums(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)
