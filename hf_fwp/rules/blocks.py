"""How a call of the chunked form is cut into pieces that stay in cache: a block is some rows and heads, a segment some
consecutive chunks of it. A piece is copied to [chunks x rows x heads, C, size] and its results are copied back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

PAIRS = 36  # rows x value heads side by side
ROWS = 4096  # tokens x pairs prepared at once: fewer calls, and still in cache
L2NORM_EPS = 1e-6


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


def blocks(x: Inputs) -> Iterator[Block]:
    """Split batch and heads into blocks of about PAIRS states."""
    batch, heads, value_heads, query_heads = x.k.shape[0], x.k.shape[2], x.v.shape[2], x.q.shape[2]
    group = value_heads // heads
    share = query_heads == heads
    queries = 1 if share else query_heads // value_heads
    rows_at_once = max(1, PAIRS // value_heads)
    heads_at_once = -(-heads // -(-value_heads // PAIRS))  # parts of equal size
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


def of_segment(x_BTHD: Tensor, rows: slice, heads: slice, segment: Segment) -> Tensor:
    """View [chunks, rows, heads, C, D]."""
    return x_BTHD[rows, segment.span, heads].unflatten(1, (segment.count, segment.length)).permute(1, 0, 3, 2, 4)


def load(x_BTHD: Tensor, rows: slice, heads: slice, segment: Segment, dtype: torch.dtype, repeat: int = 1) -> Tensor:
    """A contiguous copy [chunks * rows * heads * repeat, C, D]; every head `repeat` times."""
    x = repeated(of_segment(x_BTHD, rows, heads, segment), repeat)
    return torch.empty(x.shape, dtype=dtype, device=x.device).copy_(x).view(-1, *x.shape[-2:])


def load_scaled(
    x_BTHD: Tensor,
    rows: slice,
    heads: slice,
    segment: Segment,
    dtype: torch.dtype,
    repeat: int = 1,
    *,
    l2norm: bool,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """The same times `scale`, and with `l2norm` also times what brings the rows to length 1, which comes second."""
    if not l2norm:
        return load(x_BTHD, rows, heads, segment, dtype, repeat).mul_(scale), None
    x = of_segment(x_BTHD, rows, heads, segment)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype).square_().add_(L2NORM_EPS).rsqrt_()
    x, norm = repeated(x, repeat), repeated(norm, repeat)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    torch.mul(x, norm if scale == 1 else norm * scale, out=out)
    return out.view(-1, *x.shape[-2:]), norm.reshape(-1, x.shape[-2], 1)


def repeated(x: Tensor, repeat: int) -> Tensor:
    """[chunks, rows, heads, ...] with every head `repeat` times."""
    return x if repeat == 1 else x.unsqueeze(3).expand(-1, -1, -1, repeat, -1, -1)


def store(target_BTHD: Tensor, rows: slice, heads: slice, segment: Segment, x: Tensor, repeat: int = 1) -> None:
    """The inverse of `load`; repeated heads are summed."""
    target = of_segment(target_BTHD, rows, heads, segment)
    if repeat > 1:
        shape = target.shape
        target.copy_(x.view(*shape[:3], repeat, *shape[3:]).sum(3))
    else:
        target.copy_(x.view(target.shape))
