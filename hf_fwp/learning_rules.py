"""Learning rules for a fast weight matrix, by name: what a key k and a value v change, β being the third factor.

    hebb    S = S + β k ⊗ v
    oja     S = S + β (k - S v) ⊗ v               decay on the side of the key
    delta   S = S + β k ⊗ (v - Sᵀ k)              decay on the side of the value: a gradient step on ½‖Sᵀk - v‖²
    stdp    k̄ = λ k̄ + k;  v̄ = λ v̄ + v;  S = S + β (A₊ k̄ ⊗ v - A₋ k ⊗ v̄)
                                                  a key before its value strengthens, one behind it weakens

Hebb 1949, Oja 1982, Widrow and Hoff 1960; the last is a minimal form of timing-dependent plasticity of this library,
with λ `trace_decay`, A₊ `potentiation` and A₋ `depression`. The first three are the updates of linear attention, oja
and the delta net in RULES. Legend: rules/base.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .rules import delta_net, linear_attention, oja
from .rules.base import States


@dataclass(frozen=True)
class LearningRule:
    """One learning rule."""

    name: str
    equation: str
    source: str
    step: Callable[..., States]
    """step(states, k [B,H,K], v [B,H,V], beta [B,H], **options) -> states; nothing is modified."""
    traces: bool = False
    """Whether traces of keys and values are carried beside S."""

    def learn(self, k: Tensor, v: Tensor, beta: Tensor, *, states: States | None = None, **options: float) -> States:
        """The states after all pairs, k [B,T,H,K], v [B,T,H,V], beta [B,T,H]; from zeros, or from `states`."""
        states = self.start(k, v) if states is None else states
        for k_BHK, v_BHV, beta_BH in zip(k.unbind(1), v.unbind(1), beta.unbind(1), strict=True):
            states = self.step(states, k_BHK, v_BHV, beta_BH, **options)
        return states

    def start(self, k: Tensor, v: Tensor) -> States:
        """Zeros for sequences of these keys and values."""
        states = {"state": k.new_zeros(k.shape[0], *k.shape[2:], v.shape[-1])}
        if self.traces:
            states |= {"k_trace": torch.zeros_like(k[:, 0]), "v_trace": torch.zeros_like(v[:, 0])}
        return states


def hebb(states: States, k: Tensor, v: Tensor, beta: Tensor) -> States:
    """S + β k ⊗ v."""
    return _written(linear_attention.step, states, k, beta[..., None] * v, normalize=False)


def oja_step(states: States, k: Tensor, v: Tensor, beta: Tensor) -> States:
    """S + β (k - S v) ⊗ v."""
    return _written(oja.step, states, k, v, beta=beta, v_norm="none")


def delta(states: States, k: Tensor, v: Tensor, beta: Tensor) -> States:
    """S + β k ⊗ (v - Sᵀ k)."""
    return _written(delta_net.step, states, k, v, beta=beta)


def stdp(
    states: States,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    trace_decay: float = 0.9,
    potentiation: float = 1.0,
    depression: float = 1.0,
) -> States:
    """S + β (A₊ k̄ ⊗ v - A₋ k ⊗ v̄), with traces that decay by λ."""
    k_trace, v_trace = trace_decay * states["k_trace"] + k, trace_decay * states["v_trace"] + v
    state = hebb({"state": states["state"]}, k_trace, v, potentiation * beta)
    return {**hebb(state, k, v_trace, -depression * beta), "k_trace": k_trace, "v_trace": v_trace}


def _written(step: Callable[..., Any], states: States, k: Tensor, v: Tensor, **given: Any) -> States:
    return {"state": step({"state": states["state"]}, q=k, k=k, v=v, **given)[0]["state"]}


LEARNING_RULES: dict[str, LearningRule] = {
    "hebb": LearningRule("hebb", "S ← S + β k ⊗ v", "Hebb 1949", hebb),
    "oja": LearningRule("oja", "S ← S + β(k - Sv) ⊗ v", "Oja 1982, J. Math. Biology 15", oja_step),
    "delta": LearningRule("delta", "S ← S + β k ⊗ (v - Sᵀk)", "Widrow and Hoff 1960", delta),
    "stdp": LearningRule(
        "stdp", "k̄ ← λk̄ + k;  v̄ ← λv̄ + v;  S ← S + β(A₊ k̄ ⊗ v - A₋ k ⊗ v̄)", "this library", stdp, traces=True
    ),
}
