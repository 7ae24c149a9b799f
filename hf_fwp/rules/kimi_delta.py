"""Kimi delta attention: the gated delta rule with a decay of its own for every key channel.

    S̃_t = Diag(exp(g_t)) S_{t-1}                     g_t ∈ R^K
    S_t = S̃_t + k_t ⊗ β_t (v_t - S̃_tᵀ k_t)
    o_t = scale · S_tᵀ q_t

Kimi Linear 2025 (arXiv 2510.26692).
"""

from typing import Any

from torch import Tensor

from .apply_form import apply_form
from .base import MODERN_SHELL, Rule, States, read
from .gating import ChannelDecay, Decay, Rate, check_lower_bound
from .general import Form


def step(
    states: States, *, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float = 1.0, **_: Any
) -> tuple[States, Tensor]:
    """One token: q [B,H,K] or [B,H,R,K], k and g [B,H,K], v [B,H,V], beta [B,H]. Options of the layer do not matter."""
    state_BHKV = g.exp()[..., None] * states["state"]
    v_old_BHV = read(state_BHKV, k)
    state_BHKV = state_BHKV + k[..., :, None] * (beta[..., None] * (v - v_old_BHV))[..., None, :]
    return {"state": state_BHKV}, scale * read(state_BHKV, q)


def form(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **_: Any) -> Form:
    """w = k, e = βk, u = βv."""
    return Form(q, w=k, e=k, u=v, g=g, rate=beta)


def apply(
    q: Tensor, k: Tensor, v: Tensor, *, g: Tensor | Decay | None = None, beta: Tensor | Rate | None = None, **call: Any
) -> tuple[Tensor, States]:
    """Run the rule over [B, T, heads, size] tensors; `call` holds the keywords of `apply_form`."""
    return apply_form(RULE, form, q, k, v, {"g": g, "beta": beta}, renames=True, **call)


RULE = Rule(
    name="kimi_delta",
    title="Kimi delta attention (KDA)",
    equation="S ← Diag(exp(g))S;  S ← S + k ⊗ β(v - Sᵀk);  o = Sᵀq",
    source="Kimi Linear 2025, arXiv 2510.26692",
    inputs=("g", "beta"),
    states=("state",),
    step=step,
    apply=apply,
    defaults={**MODERN_SHELL, "output_gate": "low_rank_sigmoid"},
    options={"lower_bound": None},
    shapes={"g": ("HV", "K")},
    gates=ChannelDecay,
    raw_gates=True,
    check=check_lower_bound,
)
