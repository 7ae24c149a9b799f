"""The teacher's softmax attention, as far as it is more than softmax(q kᵀ): scale, window, cap, linear bias, sink.

    mass_qt = softmax_t( cap tanh(scale q·k / cap) + slope t ),   t <= q,   q - t < window
    a sink s adds exp(s) to the denominator, so that the mass over tokens sums to less than 1

cap: gemma2; slope: ALiBi (bloom, falcon), by the key's position, which differs from -slope (q - t) by a constant of q;
sink: gpt_oss. H heads, T keys, shape legend in hf_fwp/rules/base.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Softmax:
    """What turns the products of queries and keys of one layer into attention mass."""

    scale: float
    window: int | None = None  # how many tokens, its own included, a query sees; None: all before it
    cap: float | None = None
    slopes_H: Tensor | None = None
    sinks_H: Tensor | None = None

    def mass(self, products_NHQT: Tensor, back_QT: Tensor) -> Tensor:
        """Attention mass [N,H,Q,T]; `back_QT` says how many tokens the key stands before the query."""
        scores = products_NHQT * self.scale
        if self.cap is not None:
            scores = self.cap * torch.tanh(scores / self.cap)
        if self.slopes_H is not None:
            scores = scores - self.slopes_H[:, None, None] * back_QT
        scores = scores.masked_fill((back_QT < 0) | (back_QT >= (self.window or math.inf)), -math.inf)
        if self.sinks_H is None:
            return scores.softmax(-1)
        sinks = self.sinks_H[:, None, None].expand(*scores.shape[:-1], 1)
        return torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
