"""Products of a chunk's rows under its decay: none, one per head, or one for every channel.

    products  M_ij = Σ_d x_i y_j exp(G_i - G_j)       mix  o_i = Σ_j M_ij exp(G_i - G_j) ⊙ y_j       i ≥ j
    columns   o_j = Σ_i M_ij exp(G_i - G_j) ⊙ x_i     (the gradients of the first are the other two)

G is the sum of the log-decays g of a chunk's tokens. With a decay of its own for every channel the lower triangle is
cut into its diagonal and squares: halves of the chunk, halves of these, and so on. In the square with rows in the later
half and columns in the earlier one, exp(G_i - G_j) is what is left of j at the end of the earlier half, times what is
left of that at i. Both are products of exp(g) ≤ 1 that grow with the halves: no overflow, no difference of sums that
would lose digits, and no [C, C, D] tensor.

Shapes: y and g [M, C, D], x [M, C, R, D] (R rows per token), M [M, C, R, C].
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .gating import LOWEST

NARROW = 2  # squares up to this width are summed element by element: products of such small matrices wait for calls


class SharedDecay:
    """No decay (g is None), or one number per token: g [M, C, 1]."""

    def __init__(self, g: Tensor | None, like: Tensor) -> None:
        self.total = None if g is None else g.clamp_min(LOWEST[g.dtype]).cumsum(1)
        total = like.new_zeros(1, like.shape[1], 1) if self.total is None else self.total
        self.gamma = (total - total.mT).exp_().tril_()

    @property
    def left(self) -> Tensor | None:
        """exp(G_C), [M, 1, 1]: what the chunk leaves of a state."""
        return None if self.total is None else self.total[:, -1:].exp()

    def from_start(self, x: Tensor) -> Tensor:
        """exp(G) ⊙ x for x [M, C, D] or [M, C, R, D]."""
        return x if self.total is None else x * like_rows(self.total.exp(), x)

    def to_end(self, x: Tensor) -> Tensor:
        """exp(G_C - G) ⊙ x."""
        return x if self.total is None else x * like_rows((self.total[:, -1:] - self.total).exp(), x)

    def products(self, x: Tensor, y: Tensor) -> Tensor:
        return self._cut(torch.bmm(x.flatten(1, 2), y.mT).view(*x.shape[:3], -1))

    def mix(self, m: Tensor, y: Tensor) -> Tensor:
        return torch.bmm(self._cut(m).flatten(1, 2), y).view(*m.shape[:3], -1)

    def gradients(self, m: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """`mix` of M and y and `columns` of M and x."""
        m = self._cut(m).flatten(1, 2)
        return torch.bmm(m, y).view(*x.shape[:3], -1), torch.bmm(m.mT, x.flatten(1, 2))

    def _cut(self, m: Tensor) -> Tensor:
        return m * self.gamma.unsqueeze(2)


class ChannelDecay:
    """One number per token and channel: g [M, C, D], C a power of two."""

    def __init__(self, g: Tensor) -> None:
        self.step = g.exp()
        *_, (_, before_end, from_start) = self.levels()
        self._to_end, self._from_start = before_end, from_start

    def levels(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(w, exp(G_m - G), exp(G - G_l)) for w = 1, 2, 4, ... C: m is the last token of the w tokens that a token is
        one of, l the last one before them. The same memory every time."""
        to_end, from_start = torch.ones_like(self.step), self.step.clone()
        width, length = 1, self.step.shape[1]
        while True:
            yield width, to_end, from_start
            if width == length:
                return
            before, after = halves(from_start, width)
            halves(to_end, width)[0].mul_(after[..., -1:, :])
            after.mul_(before[..., -1:, :])
            width *= 2

    def squares(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(w, exp(G_m - G) of the earlier w tokens, exp(G - G_m) of the later ones) [M, squares, w, D]."""
        for width, to_end, from_start in self.levels():
            if width < self.step.shape[1]:
                yield width, halves(to_end, width)[0], halves(from_start, width)[1]

    @property
    def left(self) -> Tensor:
        """exp(G_C), [M, D, 1]."""
        return self._from_start[:, -1].unsqueeze(-1)

    def from_start(self, x: Tensor) -> Tensor:
        return x * like_rows(self._from_start, x)

    def to_end(self, x: Tensor) -> Tensor:
        return x * like_rows(self._to_end, x)

    def products(self, x: Tensor, y: Tensor) -> Tensor:
        out = x.new_zeros(*x.shape[:3], x.shape[1])
        diagonal_of(out).copy_(torch.linalg.vecdot(x, y.unsqueeze(2)))
        for width, early, late in self.squares():
            rows = (halves(x, width)[1] * late.unsqueeze(3)).flatten(0, 1).flatten(1, 2)
            columns = (halves(y, width)[0] * early).flatten(0, 1)
            found = (
                torch.linalg.vecdot(rows.unsqueeze(2), columns.unsqueeze(1)) if width <= NARROW else rows @ columns.mT
            )
            target = square_views(out, width)
            target.copy_(found.view(target.shape))
        return out

    def mix(self, m: Tensor, y: Tensor) -> Tensor:
        out = diagonal_of(m).unsqueeze(-1) * y.unsqueeze(2)
        for width, early, late in self.squares():
            self._mix(out, square_rows(m, width), halves(y, width)[0] * early, late)
        return out

    def gradients(self, m: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        diagonal = diagonal_of(m).unsqueeze(-1)
        mixed, columns = diagonal * y.unsqueeze(2), (diagonal * x).sum(2)
        for width, early, late in self.squares():
            square = square_rows(m, width)
            self._mix(mixed, square, halves(y, width)[0] * early, late)
            rows = (halves(x, width)[1] * late.unsqueeze(3)).flatten(0, 1).flatten(1, 2)
            target = halves(columns, width)[0]
            target.addcmul_(product(square.mT, rows).view(target.shape), early)
        return mixed, columns

    def _mix(self, out: Tensor, square: Tensor, columns: Tensor, late: Tensor) -> None:
        target = halves(out, columns.shape[2])[1]
        target.addcmul_(product(square, columns.flatten(0, 1)).view(target.shape), late.unsqueeze(3))


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b for many small matrices."""
    if a.shape[2] > NARROW:
        return torch.bmm(a, b)
    out = a[:, :, :1] * b[:, :1]
    for j in range(1, a.shape[2]):
        out.addcmul_(a[:, :, j : j + 1], b[:, j : j + 1])
    return out


def like_rows(factor: Tensor, x: Tensor) -> Tensor:
    """[M, C, D] to multiply [M, C, D] or [M, C, R, D] with."""
    return factor if x.ndim == 3 else factor.unsqueeze(2)


def halves(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Views [M, squares, width, ...] of [M, C, ...]: the earlier and the later of every two times `width` tokens."""
    both = x.unflatten(1, (-1, 2, width))
    return both[:, :, 0], both[:, :, 1]


def diagonal_of(m: Tensor) -> Tensor:
    """View [M, C, R] of m_ii in [M, C, R, C]."""
    return m.diagonal(dim1=1, dim2=3).mT


def square_rows(m: Tensor, width: int) -> Tensor:
    """The squares as matrices [M * squares, width * R, width]."""
    return square_views(m, width).reshape(-1, width * m.shape[2], width)


def square_views(m: Tensor, width: int) -> Tensor:
    """View [M, squares, width, R, width] of the squares below the diagonal of [M, C, R, C]."""
    parts = m.unflatten(3, (-1, 2, width)).unflatten(1, (-1, 2, width))
    return parts[:, :, 1, :, :, :, 0].diagonal(dim1=1, dim2=4).movedim(-1, 1)
