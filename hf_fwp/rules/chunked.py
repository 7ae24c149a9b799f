"""The linear class, parallel over the tokens of a chunk: PyTorch only, with a hand-written backward.

Inside a chunk of C tokens that starts from the state S0, with G the inclusive cumulative sum of g and
Γ_ij = exp(G_i - G_j) for i ≥ j, else 0 (Yang et al. 2024, arXiv 2406.06484 and 2412.06464; here without their corrected values W and U):

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

import torch
from torch import Tensor

CHUNK = 64
PAIRS = 16  # rows x value heads side by side
MATRICES = 32  # chunks x pairs prepared at once: measured to stay in cache
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


def segments(length: int, pairs: int) -> list[Segment]:
    """Full chunks, a few at once, then what is left over as a shorter chunk."""
    full, rest = divmod(length, CHUNK)
    at_once = max(1, MATRICES // pairs)
    found = [Segment(c, c * CHUNK, min(at_once, full - c), CHUNK) for c in range(0, full, at_once)]
    if rest:
        found.append(Segment(full, full * CHUNK, 1, rest))
    return found


def chunk_count(length: int) -> int:
    return -(-length // CHUNK)


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

    One substitution over 64 rows has twice the error when keys are correlated, and a Neumann series has no correct digit.
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
    pairs = s.shape[0]
    plan = segments(x.k.shape[1], pairs)
    for segment in plan:
        c = prepare(x, block, segment)
        o = torch.empty(*c.q.shape[:2], s.shape[-1], dtype=s.dtype, device=s.device)
        solve = c.inverse if c.beta is None or c.inverse is None else c.inverse.mul_(c.beta.mT)
        for i in range(segment.count):
            m = slice(i * pairs, (i + 1) * pairs)
            if kept is not None:
                kept[segment.first + i].copy_(state)
            written = written_values(c, m, s, solve)
            torch.bmm(c.q[m], s, out=o[m])
            if c.decay_q is not None:
                o[m].mul_(c.decay_q[m])
            o[m].baddbmm_(c.reads[m], written)
            if c.decay is not None and c.remaining is not None:
                written = written.mul_(c.remaining[m])
                s.mul_(c.decay[m, -1:])
            s.baddbmm_(c.k[m].mT, written)
        store(out, block.rows, block.out_heads, segment, o)
    if kept is not None:
        kept[plan[-1].first + plan[-1].count].copy_(state)


def written_values(c: Chunks, m: slice, s: Tensor, solve: Tensor | None) -> Tensor:
    """R, from the state at the chunk's start; `solve` is (I + A)⁻¹ with its columns multiplied by β."""
    v = c.v[m]
    if solve is None:
        return v if c.beta is None else v * c.beta[m]
    retrieved = torch.bmm(c.k[m], s)
    missing = v - retrieved if c.decay is None else torch.addcmul(v, c.decay[m], retrieved, value=-1)
    return torch.bmm(solve[m], missing)


def backward_block(x: Inputs, block: Block, grad: Inputs, d_out: Tensor, d_state: Tensor, kept: Tensor) -> None:
    """The same block in reverse. `d_state` holds dS after the last chunk and ends as dS before the first."""
    ds = d_state.flatten(0, 1)
    for segment in reversed(segments(x.k.shape[1], ds.shape[0])):
        c = prepare(x, block, segment, backward=True)
        states = kept[segment.first : segment.first + segment.count + 1].reshape(-1, *kept.shape[-2:])
        before, after = states[: -ds.shape[0]], states[ds.shape[0] :]
        do = load(d_out, block.rows, block.out_heads, segment, x.dtype).view(*c.q.shape[:2], -1)
        solve = None if c.inverse is None else c.inverse if c.beta is None else c.inverse * c.beta.mT
        written = written_values(c, slice(None), before, solve)

        dr = torch.bmm(c.reads.mT, do)
        omega = apply_gamma(torch.bmm(do, written.mT), c.gamma, block.queries)
        if c.decay_q is not None:
            do.mul_(c.decay_q)
        dy, z, ds_after = backward_scan(c, segment.count, dr, do, ds)

        dq = torch.bmm(do, before.mT).baddbmm_(omega, c.k)
        kept_part = written if c.remaining is None else written * c.remaining
        dk = torch.bmm(kept_part, ds_after.mT).baddbmm_(omega.mT, c.q)
        if z is not None:
            dk.baddbmm_(z, before.mT).baddbmm_(erase_pairs(c, dy, written), c.k)
        store_gradients(x, block, segment, grad, c, dq=dq, dk=dk, dy=dy, written=written, along_state=(after, ds_after))


def backward_scan(c: Chunks, count: int, dr: Tensor, do: Tensor, ds: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """The part that goes from chunk to chunk: dY, Z and dS after every chunk. `dr` arrives without its share from dS."""
    pairs = ds.shape[0]
    dy = dr if c.inverse is None else torch.empty_like(dr)
    z = None if c.inverse is None else torch.empty_like(dr)
    ds_after = torch.empty(count * pairs, *ds.shape[1:], dtype=ds.dtype, device=ds.device)
    for i in reversed(range(count)):
        m = slice(i * pairs, (i + 1) * pairs)
        ds_after[m] = ds
        if c.remaining is None:
            dr[m].baddbmm_(c.k[m], ds)
        else:
            dr[m].addcmul_(c.remaining[m], torch.bmm(c.k[m], ds))
        if c.decay is not None:
            ds.mul_(c.decay[m, -1:])
        ds.baddbmm_(c.q[m].mT, do[m])
        if c.inverse is None or z is None:
            continue
        torch.bmm(c.inverse[m].mT, dr[m], out=dy[m])
        torch.mul(dy[m], erase_weight(c, m), out=z[m])
        ds.baddbmm_(c.k[m].mT, z[m])
    return dy, z, ds_after


def erase_weight(c: Chunks, m: slice) -> Tensor:
    """-β exp(G)."""
    weight = torch.ones_like(c.k[m, :, :1]) if c.beta is None else c.beta[m]
    return -weight if c.decay is None else -weight * c.decay[m]


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
