"""The sum rule (Hebbian outer products): linear attention, the additive fast weight programmer.

    S_t = a_t S_{t-1} + k_t ⊗ v_t            a_t = exp(g_t), 1 without decay
    z_t = z_{t-1} + k_t                      only with `normalize`
    o_t = scale · S_tᵀ q_t                   or scale · S_tᵀ q_t / (z_t · q_t + ε) with `normalize`

Schmidhuber 1991 (FKI-147-91); Katharopoulos et al. 2020 (arXiv 2006.16236); Schlag, Irie, Schmidhuber 2021
(arXiv 2102.11174).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .base import Rule, States, keep_valid, read
from .linear_class import LinearClassCall, apply_linear_class

NORMALIZER_EPS = 1e-5
OPTIONS = {"normalize": True, "eps": NORMALIZER_EPS}


def step(
    states: States,
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float = 1.0,
    normalize: bool = False,
    eps: float = NORMALIZER_EPS,
) -> tuple[States, Tensor]:
    """One token: q [B,H,K] or [B,H,R,K], k [B,H,K], v [B,H,V], g [B,H]."""
    state_BHKV = states["state"]
    if g is not None:
        state_BHKV = g.exp()[..., None, None] * state_BHKV
    state_BHKV = state_BHKV + k[..., :, None] * v[..., None, :]
    out = scale * read(state_BHKV, q)
    if not normalize:
        return {"state": state_BHKV}, out
    norm_BHK = states["norm_state"] + k
    return {"state": state_BHKV, "norm_state": norm_BHK}, out / (read(norm_BHK[..., None], q) + eps)


def apply(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    beta: Tensor | None = None,
    g: Tensor | None = None,
    states: States | None = None,
    scale: float | None = None,
    options: Mapping[str, Any] | None = None,
    **call: Any,
) -> tuple[Tensor, States]:
    """Run the rule over [B, T, heads, size] tensors; `call` holds the fields of `LinearClassCall`."""
    if beta is not None:
        raise ValueError("linear_attention has no beta; leave it out, or use the rule delta_net")
    options = RULE.resolve_options(options)
    linear = LinearClassCall(step, erase=False, **call)
    if not options["normalize"]:
        return apply_linear_class(linear, q, k, v, g=g, states=states, scale=scale)
    if g is not None:
        raise ValueError(
            "linear_attention was given g and normalize=True; the normaliser has no decay: leave one of them out"
        )
    scale = 1.0 if scale is None else scale
    if linear.backend == "reference":
        return apply_linear_class(linear, q, k, v, states=states, scale=scale, **options)
    return _normalized(linear, q, k, v, states=states or {}, scale=scale, eps=options["eps"])


def _normalized(
    call: LinearClassCall, q: Tensor, k: Tensor, v: Tensor, *, states: States, scale: float, eps: float
) -> tuple[Tensor, States]:
    """The normaliser z is the state of the same rule with the value 1."""
    # float32: numerator and denominator would otherwise both be rounded to bf16 before the division.
    compute = torch.float64 if v.dtype == torch.float64 else torch.float32
    state, norm_state = states.get("state"), states.get("norm_state")
    out, states = apply_linear_class(
        call, q, k, v.to(compute), states=None if state is None else {"state": state}, scale=scale
    )
    norm, norm_state = normalizer(call, q, k, norm_state, eps=eps, dtype=compute)
    norm = norm.repeat_interleave(out.shape[2] // norm.shape[2], dim=2)
    return (out / norm).to(v.dtype), {"state": states["state"], "norm_state": norm_state}


def normalizer(
    call: LinearClassCall, q: Tensor, k: Tensor, norm_state: Tensor | None, *, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """z·q + ε for every read [B, T, reads, 1], 1 where the mask is 0, and the last z. `call` must not erase."""
    ones_BTH1 = torch.ones(*k.shape[:3], 1, dtype=dtype, device=k.device)
    given = None if norm_state is None else {"state": norm_state[..., None]}
    norm, states = apply_linear_class(call, q, k, ones_BTH1, states=given, scale=1.0)
    norm = norm + eps
    if call.mask is not None:
        norm = keep_valid(norm, call.mask, torch.ones_like(norm))
    return norm, norm_state if norm_state is not None and call.in_place else states["state"][..., 0]


RULE = Rule(
    name="linear_attention",
    title="Linear attention (additive fast weights)",
    equation="S ← S + k ⊗ v;  z ← z + k;  o = Sᵀq / (z·q + ε)",
    source="Katharopoulos et al. 2020, arXiv 2006.16236; Schlag et al. 2021, arXiv 2102.11174",
    inputs=(),
    states=("state", "norm_state"),
    step=step,
    apply=apply,
    defaults={
        "feature_map": "elu1",
        "qk_norm": "none",
        "conv_size": 0,
        "beta_bias": False,
        "output_gate": "none",
        "output_norm": False,
        "output_scale": 1.0,
        "scale": 1.0,
        "expand_v": 1.0,
        "allow_neg_eigval": False,
    },
    options=OPTIONS,
)
