"""The delta rule: replace the value that a key retrieves by a new one, at rate β.

    v̄_t = S_{t-1}ᵀ k_t
    S_t = S_{t-1} + k_t ⊗ β_t (v_t - v̄_t)    =  (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t ⊗ v_t
    o_t = scale · S_tᵀ q_t

Schlag, Irie, Schmidhuber 2021 (arXiv 2102.11174); parallel over time: Yang et al. 2024 (arXiv 2406.06484).
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .base import Rule, States, read
from .linear_class import LinearClassCall, apply_linear_class


def step(states: States, *, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, scale: float = 1.0) -> tuple[States, Tensor]:
    """One token: q [B,H,K] or [B,H,R,K], k [B,H,K], v [B,H,V], beta [B,H]."""
    state_BHKV = states["state"]
    v_old_BHV = read(state_BHKV, k)
    state_BHKV = state_BHKV + k[..., :, None] * (beta[..., None] * (v - v_old_BHV))[..., None, :]
    return {"state": state_BHKV}, scale * read(state_BHKV, q)


def apply(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    beta: Tensor | None = None,
    g: Tensor | None = None,
    states: States | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
    options: Mapping[str, Any] | None = None,
    qk_l2norm: bool = False,
    in_place: bool = False,
    ran: list[str] | None = None,
) -> tuple[Tensor, States]:
    """Run the rule over [B, T, heads, size] tensors with the chosen backend."""
    if beta is None:
        raise ValueError("delta_net needs beta [B, T, value heads]; none was given")
    if g is not None:
        raise ValueError("delta_net has no decay g; leave it out, or use the rule gated_delta_net")
    RULE.resolve_options(options)
    call = LinearClassCall(
        step,
        erase=True,
        mask=mask,
        cu_seqlens=cu_seqlens,
        backend=backend,
        qk_l2norm=qk_l2norm,
        in_place=in_place,
        ran=ran,
    )
    return apply_linear_class(call, q, k, v, beta=beta, states=states, scale=scale)


RULE = Rule(
    name="delta_net",
    title="DeltaNet",
    equation="S ← S + k ⊗ β(v - Sᵀk);  o = Sᵀq",
    source="Schlag et al. 2021, arXiv 2102.11174; Yang et al. 2024, arXiv 2406.06484",
    inputs=("beta",),
    states=("state",),
    step=step,
    apply=apply,
    defaults={
        "feature_map": "silu",
        "qk_norm": "l2",
        "conv_size": 4,
        "beta_bias": False,
        "output_gate": "none",
        "output_norm": True,
        "output_scale": 1.0,
        "scale": None,
        "expand_v": 1.0,
        "allow_neg_eigval": False,
    },
)
