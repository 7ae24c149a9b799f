"""Products of rows under a decay that differs from channel to channel: no overflow, and no [C, C, K] tensor.

    products  M_ij = Σ_d x_i[d] y_j[d] exp(G_i[d] - G_j[d])      mix  o_i = Σ_j M_ij exp(G_i - G_j) ⊙ y_j      i ≥ j

G is a cumulative sum of log-decays, so it falls. The lower triangle is cut into its diagonal and squares: halves of
the chunk, halves of these, and so on. For the square with rows in the later half and columns in the earlier one, with
m the last row of the earlier half, exp(G_i - G_j) = exp(G_i - G_m) exp(G_m - G_j), and both exponents are ≤ 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def products(x: Tensor, y: Tensor, total: Tensor) -> Tensor:
    """M [..., C, C] of x [..., R, C, D], y [..., 1, C, D] and G [..., 1, C, D]; zero above the diagonal."""
    return _Products.apply(x, y, total)  # type: ignore[return-value]


def mix(weights: Tensor, y: Tensor, total: Tensor) -> Tensor:
    """o [..., R, C, D] of weights [..., R, C, C], y and G [..., 1, C, D]; weights above the diagonal do not count."""
    return _Mix.apply(weights, y, total)  # type: ignore[return-value]


def squares(total: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(width, exp(G_m - G) of the earlier halves, exp(G - G_m) of the later ones), from large squares to small ones."""
    width = total.shape[-2] // 2
    while width:
        first, second = halves(total, width)
        middle = first[..., -1:, :]
        yield width, (middle - first).exp_(), (second - middle).exp_()
        width //= 2


def halves(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Views [..., squares, width, D]: the rows of the earlier and of the later halves."""
    both = x.unflatten(-2, (-1, 2, width))
    return both[..., 0, :, :], both[..., 1, :, :]


def square_views(m: Tensor, width: int) -> Tensor:
    """View [..., squares, width, width] of the squares below the diagonal of [..., C, C]."""
    parts = m.unflatten(-1, (-1, 2, width)).unflatten(-4, (-1, 2, width))
    return parts.select(-5, 1).select(-2, 0).diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def _products(x: Tensor, y: Tensor, total: Tensor) -> Tensor:
    out = x.new_zeros(*x.shape[:-1], x.shape[-2])
    out.diagonal(dim1=-2, dim2=-1).copy_((x * y).sum(-1))
    for width, early, late in squares(total):
        rows, columns = halves(x, width)[1] * late, halves(y, width)[0] * early
        square_views(out, width).copy_(rows @ columns.mT)
    return out


def _mix(weights: Tensor, y: Tensor, total: Tensor) -> Tensor:
    out = weights.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * y
    for width, early, late in squares(total):
        halves(out, width)[1].addcmul_(square_views(weights, width) @ (halves(y, width)[0] * early), late)
    return out


def _mix_columns(weights: Tensor, x: Tensor, total: Tensor) -> Tensor:
    """Σ_i M_ij exp(G_i - G_j) ⊙ x_i, summed over R."""
    out = weights.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * x
    for width, early, late in squares(total):
        halves(out, width)[0].addcmul_(square_views(weights, width).mT @ (halves(x, width)[1] * late), early)
    return out.sum(-3, keepdim=True)


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, total: Tensor) -> Tensor:
        ctx.save_for_backward(x, y, total)
        return _products(x, y, total)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, y, total = ctx.saved_tensors
        dx, dy = _mix(grads[0], y, total), _mix_columns(grads[0], x, total)
        return dx, dy, (x * dx).sum(-3, keepdim=True) - y * dy


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, y: Tensor, total: Tensor) -> Tensor:
        out = _mix(weights, y, total)
        ctx.save_for_backward(weights, y, total, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights, y, total, out = ctx.saved_tensors
        dy = _mix_columns(weights, grads[0], total)
        return _products(grads[0], y, total), dy, (out * grads[0]).sum(-3, keepdim=True) - y * dy
