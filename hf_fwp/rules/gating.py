"""Decays that depend on the token, g = -exp(A) softplus(f(x) + d), and what A and d start from (Yang et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Gates

# exp is 0 from here on. Sums of lower steps would lose the digits of all others, and differences of -inf are NaN.
LOWEST = {torch.float32: -104.0, torch.float64: -746.0}


@dataclass(frozen=True)
class Rate:
    """β = range · sigmoid(b), b = logits [B,T,HV]: not computed yet, because a kernel can do it as it reads b."""

    logits: Tensor
    range: float = 1.0

    def value(self) -> Tensor:
        """In float32 (float64 for float64 logits)."""
        return self.range * self.logits.to(wide(self.logits)).sigmoid()


@dataclass(frozen=True)
class Decay:
    """g = -exp(A) softplus(a + d), a = logits [B,T,HV] or, for one decay per channel, [B,T,HV,K], A [HV], d [HV] or
    [HV · K]: not computed yet. With a `lower_bound` l of channels, g = l · sigmoid(exp(A) (a + d))."""

    logits: Tensor
    A_log: Tensor
    dt_bias: Tensor
    lower_bound: float | None = None

    def value(self) -> Tensor:
        """In float32 (float64 for float64 logits)."""
        dtype, states = wide(self.logits), self.logits.shape[2:]
        rate = self.A_log.to(dtype).exp().view(-1, *(1,) * (len(states) - 1))
        a = self.logits.to(dtype) + self.dt_bias.to(dtype).view(states)
        return -rate * softplus(a) if self.lower_bound is None else self.lower_bound * torch.sigmoid(rate * a)


Gate = Tensor | Rate | Decay


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)). The compiler takes the gradient of torch's to lie in memory as x does, and it lies as the
    gradient that it is given (torch 2.13, no public issue found): compiled, it is another function of torch."""
    return torch.logaddexp(x, x.new_zeros(())) if torch.compiler.is_compiling() else F.softplus(x)


def wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def value_of(gate: Any) -> Any:
    """A gate that is not computed yet, computed; everything else as it is."""
    return gate.value() if isinstance(gate, (Rate, Decay)) else gate


def scaled(gate: Any, factor: float) -> Any:
    """A gate that is computed or not, times a number."""
    return Rate(gate.logits, factor * gate.range) if isinstance(gate, Rate) else factor * gate


def tensors_of(gate: Gate | None) -> tuple[Tensor, ...]:
    """What a gate is computed from; what every token brings comes first."""
    if isinstance(gate, Rate):
        return (gate.logits,)
    if isinstance(gate, Decay):
        return (gate.logits, gate.A_log, gate.dt_bias)
    return () if gate is None else (gate,)


def start_rates(like: Tensor, low: float = 0.01) -> Tensor:
    """A = log of rates spread evenly up to 16."""
    return torch.empty_like(like, device="cpu").uniform_(low, 16).log()


def start_steps(like: Tensor) -> Tensor:
    """d with softplus(d) spread evenly in the logarithm from 0.001 to 0.1."""
    dt = torch.empty_like(like, device="cpu").uniform_(math.log(1e-3), math.log(1e-1)).exp().clamp_min(1e-4)
    # the inverse of softplus
    return dt + torch.log(-torch.expm1(-dt))


def check_lower_bound(options: Mapping[str, Any]) -> None:
    bound = options["lower_bound"]
    if bound is not None and not bound < 0:
        raise ValueError(f"lower_bound is {bound!r}; it bounds a log-decay and must be negative, or None for no bound")


class ChannelDecay(Gates):
    """g [B,T,HV,K]: f(x) through a bottleneck of the size of a value, a rate per head, a time step per channel.

    With the option `lower_bound` = l: g = l · sigmoid(exp(A) (f(x) + d)), which never falls below l.
    """

    gives: tuple[str, ...] = ("g",)

    def __init__(self, hidden: int, *, states: int, key_size: int, value_size: int, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.lower_bound = options["lower_bound"]
        self.states = states
        self.f_down = nn.Linear(hidden, value_size, bias=False)
        self.f_up = nn.Linear(value_size, states * key_size, bias=False)
        self.A_log = nn.Parameter(torch.empty(states, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(states * key_size, dtype=torch.float32))

    def initial(self) -> dict[str, Tensor]:
        rates = start_rates(self.A_log, 1.0) if self.lower_bound is None else torch.zeros(self.states)
        return {"A_log": rates, "dt_bias": start_steps(self.dt_bias)}

    def forward(self, x_BTD: Tensor) -> dict[str, Gate]:
        f = self.f_up(self.f_down(x_BTD)).unflatten(-1, (self.states, -1))
        named = {"A_log": self.A_log, "dt_bias": self.dt_bias}
        return {"g": Decay(f, **named, lower_bound=self.lower_bound), **named}
