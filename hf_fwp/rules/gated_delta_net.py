"""The gated delta rule: the state decays by a = exp(g), then the delta rule corrects what the decayed state retrieves.

    S̃_t = a_t S_{t-1}
    S_t = S̃_t + k_t ⊗ β_t (v_t - S̃_tᵀ k_t)
    o_t = scale · S_tᵀ q_t

Yang, Kautz, Hatamizadeh 2024 (arXiv 2412.06464).
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .base import MODERN_SHELL, Rule, States, read
from .gating import Decay, Rate
from .linear_class import LinearClassCall, apply_linear_class


def step(
    states: States, *, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float = 1.0
) -> tuple[States, Tensor]:
    """One token: q [B,H,K] or [B,H,R,K], k [B,H,K], v [B,H,V], g and beta [B,H]."""
    state_BHKV = g.exp()[..., None, None] * states["state"]
    v_old_BHV = read(state_BHKV, k)
    state_BHKV = state_BHKV + k[..., :, None] * (beta[..., None] * (v - v_old_BHV))[..., None, :]
    return {"state": state_BHKV}, scale * read(state_BHKV, q)


def apply(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    beta: Tensor | Rate | None = None,
    g: Tensor | Decay | None = None,
    states: States | None = None,
    scale: float | None = None,
    options: Mapping[str, Any] | None = None,
    **call: Any,
) -> tuple[Tensor, States]:
    """Run the rule over [B, T, heads, size] tensors; `call` holds the fields of `LinearClassCall`."""
    if beta is None or g is None:
        missing = "beta" if beta is None else "g"
        raise ValueError(f"gated_delta_net needs g and beta [B, T, value heads]; {missing} was not given")
    RULE.resolve_options(options)
    linear = LinearClassCall(step, erase=True, **call)
    return apply_linear_class(linear, q, k, v, beta=beta, g=g, states=states, scale=scale)


RULE = Rule(
    name="gated_delta_net",
    title="Gated DeltaNet",
    equation="S ← exp(g)S;  S ← S + k ⊗ β(v - Sᵀk);  o = Sᵀq",
    source="Yang et al. 2024, arXiv 2412.06464",
    inputs=("g", "beta"),
    states=("state",),
    step=step,
    apply=apply,
    raw_gates=True,
    defaults={**MODERN_SHELL, "expand_v": 2.0},
)
