"""How a call of the chunked form is cut into pieces that stay in cache: a block is some rows and heads, a segment some
consecutive chunks of it. A piece is copied to [chunks x rows x heads, C, size] and its results are copied back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

PAIRS = 36  # rows x value heads side by side
ROWS = 6144  # tokens x pairs prepared at once: fewer calls, and still in cache
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
    most = max(1, ROWS // (pairs * chunk))
    at_once = max(1, -(-full // max(1, -(-full // most))))  # parts of equal size
    found = [Segment(c, c * chunk, min(at_once, full - c), chunk) for c in range(0, full, at_once)]
    if rest:
        found.append(Segment(full, full * chunk, 1, rest))
    return found


@dataclass(frozen=True)
class Kept:
    """What the forward of a block leaves to its backward, chunk by chunk; the pairs are inside.

    `of` gives the part of one segment: [chunks + 1, pairs, K, V] for the states, [chunks * pairs, ...] for the others.
    """

    states: Tensor  # [chunks + 1, pairs, K, V], the state at the chunk's start
    solve: Tensor  # T, [chunks, pairs, C, C], or of size 0 without erasing
    reads: Tensor  # P, [chunks, pairs, R*C, C]
    written: Tensor  # R, [chunks, pairs, C, V]

    @property
    def before(self) -> Tensor:
        """The states at the start of every chunk, [chunks * pairs, K, V]."""
        return self.states[:-1].flatten(0, 1)

    @property
    def after(self) -> Tensor:
        """The states at the end of every chunk, [chunks * pairs, K, V]."""
        return self.states[1:].flatten(0, 1)

    def clear_rest(self) -> None:
        """Zeros where a shorter last chunk and the state at the end leave room."""
        for x in (self.solve, self.reads, self.written):
            x[-2:].zero_()

    def of(self, segment: Segment) -> Kept:
        """Views. With room for fewer chunks than there are, the segments take turns."""
        first = segment.first % (len(self.states) - 1)
        chunks, count, length = slice(first, first + segment.count), segment.count, segment.length
        pairs, queries = self.states.shape[1], self.reads.shape[2] // self.reads.shape[3]
        square = length if self.solve.numel() else 0

        def rows(x: Tensor, *shape: int) -> Tensor:
            size = count * pairs * shape[0] * shape[1]
            return x[chunks].view(-1)[:size].view(count * pairs, *shape)

        return Kept(
            self.states[first : first + count + 1],
            rows(self.solve, square, square),
            rows(self.reads, queries * length, length),
            rows(self.written, length, self.states.shape[3]),
        )


def kept_size(x: Inputs) -> int:
    """Numbers that one chunk of one pair leaves to the backward."""
    return sum(rows * columns for rows, columns in kept_shapes(x))


def kept_shapes(x: Inputs) -> tuple[tuple[int, int], ...]:
    """Shapes of what `Kept` holds for one chunk of one pair."""
    key_size, value_size = x.k.shape[3], x.v.shape[3]
    chunk, queries = chunk_length(key_size, value_size), max(1, x.q.shape[2] // x.v.shape[2])
    square = chunk if x.erase else 0
    return (key_size, value_size), (square, square), (queries * chunk, chunk), (chunk, value_size)


def keep_in(flat: Tensor, x: Inputs, pairs: int) -> Kept:
    """`flat` memory, for as many chunks as it has room for and one state."""
    shapes = kept_shapes(x)
    rows = flat.shape[0] // (pairs * kept_size(x))
    parts = flat.split([rows * pairs * a * b for a, b in shapes])
    return Kept(*(part.view(rows, pairs, *shape) for part, shape in zip(parts, shapes, strict=True)))


def of_segment(x_BTHD: Tensor, rows: slice, heads: slice, segment: Segment) -> Tensor:
    """View [chunks, rows, heads, C, D]."""
    return x_BTHD[rows, segment.span, heads].unflatten(1, (segment.count, segment.length)).permute(1, 0, 3, 2, 4)


class Scratch:
    """Memory for intermediates that is handed out again while it is in cache; fresh pages cost more than arithmetic."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.options = {"dtype": dtype, "device": device}
        self.free: dict[int, list[Tensor]] = {}  # by size, the last one released is the next one handed out
        self.used: dict[int, Tensor] = {}  # by address

    def empty(self, *shape: int) -> Tensor:
        size = math.prod(shape)
        waiting = self.free.get(size)
        buffer = waiting.pop() if waiting else torch.empty(size, **self.options)
        self.used[buffer.data_ptr()] = buffer
        return buffer.view(shape)

    def release(self, *tensors: Tensor) -> None:
        """These, which came from here, may be overwritten from now on."""
        for x in tensors:
            buffer = self.used.pop(x.data_ptr())
            self.free.setdefault(buffer.numel(), []).append(buffer)

    def release_all(self) -> None:
        self.release(*self.used.values())

    def bmm(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.bmm(a, b, out=self.empty(*a.shape[:2], b.shape[2]))

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        """a * b, of the shape of a."""
        return torch.mul(a, b, out=self.empty(*a.shape))

    def row_sums(self, a: Tensor, b: Tensor) -> Tensor:
        """Σ a b over the last dimension, which stays as 1."""
        product = self.mul(a, b)
        sums = product.sum(-1, keepdim=True)
        self.release(product)
        return sums

    def load(self, x_BTHD: Tensor, rows: slice, heads: slice, segment: Segment, repeat: int = 1) -> Tensor:
        """A contiguous copy [chunks * rows * heads * repeat, C, D]; every head `repeat` times."""
        x = of_segment(x_BTHD, rows, heads, segment)
        if repeat > 1:
            x = x.unsqueeze(3).expand(-1, -1, -1, repeat, -1, -1)
        return self.empty(*x.shape).copy_(x).view(-1, *x.shape[-2:])

    def normalize(self, x: Tensor) -> Tensor:
        """x / length of its rows, in place; gives 1 / length."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().add_(L2NORM_EPS).rsqrt_()
        x.mul_(norm)
        return norm


def store(target_BTHD: Tensor, rows: slice, heads: slice, segment: Segment, x: Tensor, repeat: int = 1) -> None:
    """The inverse of `load`; repeated heads are summed."""
    target = of_segment(target_BTHD, rows, heads, segment)
    if repeat > 1:
        shape = target.shape
        target.copy_(x.view(*shape[:3], repeat, *shape[3:]).sum(3))
    else:
        target.copy_(x.view(target.shape))
