"""The delta rule: replace the value that a key retrieves by a new one, at rate β.

    v̄_t = S_{t-1}ᵀ k_t
    S_t = S_{t-1} + k_t ⊗ β_t (v_t - v̄_t)    =  (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t ⊗ v_t
    o_t = scale · S_tᵀ q_t

With `normalize`, z_t = z_{t-1} + k_t is carried too (for features that are not negative):

    "output"   o_t = scale · S_tᵀ q_t / (z_t · q_t + ε)
    "full"     the same, and v̄_t = S_{t-1}ᵀ k_t / (z_{t-1} · k_t + ε), not divided while z is still 0

"full" is the plain rule with the rate β / κ and the value κ v, where κ_t = z_{t-1} · k_t + ε.

With `use_beta=False` β is 1. Where q, k, v and the raw β come from is the layer's business: `slow_net` is "linear", or
"lstm" for the outputs of one LSTM over the hidden states (code of Irie et al. 2021, unreported).

Schlag, Irie, Schmidhuber 2021 (arXiv 2102.11174); parallel over time: Yang et al. 2024 (arXiv 2406.06484).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .base import MODERN_SHELL, Rule, States, keep_valid, read
from .checks import check_arguments, sequence_bounds
from .gating import Rate, value_of
from .linear_attention import NORMALIZER_EPS, normalizer
from .linear_class import LinearClassCall, apply_linear_class, computing_dtype, l2_normalize


def step(
    states: States,
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float = 1.0,
    normalize: str | None = None,
    eps: float = NORMALIZER_EPS,
) -> tuple[States, Tensor]:
    """One token: q [B,H,K] or [B,H,R,K], k [B,H,K], v [B,H,V], beta [B,H]."""
    state_BHKV = states["state"]
    v_old_BHV = read(state_BHKV, k)
    if normalize == "full":
        v_old_BHV = v_old_BHV / overlap(states["norm_state"], k, eps)
    state_BHKV = state_BHKV + k[..., :, None] * (beta[..., None] * (v - v_old_BHV))[..., None, :]
    out = scale * read(state_BHKV, q)
    if normalize is None:
        return {"state": state_BHKV}, out
    norm_BHK = states["norm_state"] + k
    return {"state": state_BHKV, "norm_state": norm_BHK}, out / (read(norm_BHK[..., None], q) + eps)


def overlap(z: Tensor, k: Tensor, eps: float) -> Tensor:
    """κ = z·k + ε over the last dimension, which stays as 1; 1 where nothing was added to z yet."""
    fresh = (z == 0).all(-1, keepdim=True)
    kappa = (z * k).sum(-1, keepdim=True) + eps
    return torch.where(fresh, torch.ones_like(kappa), kappa)


def apply(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    beta: Tensor | Rate | None = None,
    g: Tensor | None = None,
    states: States | None = None,
    scale: float | None = None,
    options: Mapping[str, Any] | None = None,
    **call: Any,
) -> tuple[Tensor, States]:
    """Run the rule over [B, T, heads, size] tensors; `call` holds the fields of `LinearClassCall`."""
    if g is not None:
        raise ValueError("delta_net has no decay g; leave it out, or use the rule gated_delta_net")
    chosen = RULE.resolve_options(options)
    del chosen["slow_net"]  # the layer's business
    if chosen.pop("use_beta") == (beta is None):
        said = "needs beta [B, T, value heads]; none was" if beta is None else "has use_beta=False, but beta was"
        raise ValueError(f"delta_net {said} given")
    beta = v.new_ones(v.shape[:3]) if beta is None else beta
    linear = LinearClassCall(step, erase=True, **call)
    if chosen["normalize"] is None:
        return apply_linear_class(linear, q, k, v, beta=beta, states=states, scale=scale)
    factor: float = k.shape[-1] ** -0.5 if scale is None else scale
    if linear.backend == "reference":
        return apply_linear_class(linear, q, k, v, beta=beta, states=states, scale=factor, **chosen)
    return _normalized(linear, q, k, v, value_of(beta), states or {}, scale=factor, **chosen)


def _normalized(
    call: LinearClassCall,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    states: States,
    *,
    scale: float,
    normalize: str,
    eps: float,
) -> tuple[Tensor, States]:
    compute, dtype = computing_dtype(q, k, v), v.dtype
    z = states.get("norm_state")
    plain = {"state": states["state"]} if "state" in states else {}
    check_arguments(q, k, v, beta=beta, g=None, states=plain, mask=call.mask, cu_seqlens=call.cu_seqlens)
    # where, before any product: a NaN under the mask would reach the gradients
    q, k, v, beta = (x.to(compute) for x in (q, k, v, beta))
    if call.mask is not None:
        q, k, v, beta = (keep_valid(x, call.mask) for x in (q, k, v, beta))
    written, rate = v, beta
    if normalize == "full":
        kappa_BTH = _overlaps(call, l2_normalize(k) if call.qk_l2norm else k, z, eps)
        kappa_BTH = kappa_BTH.repeat_interleave(v.shape[2] // k.shape[2], dim=2)
        written, rate = v * kappa_BTH[..., None], beta / kappa_BTH
    norm, z = normalizer(replace(call, erase=False), q, k, z, eps=eps, dtype=compute)
    out, after = apply_linear_class(call, q, k, written, beta=rate, states=plain, scale=scale)
    norm = norm.repeat_interleave(out.shape[2] // norm.shape[2], dim=2)
    return (out / norm).to(dtype), {"state": after["state"], "norm_state": z}


def _overlaps(call: LinearClassCall, k: Tensor, z: Tensor | None, eps: float) -> Tensor:
    """κ for every token [B, T, H]: with the keys before it, those of its own sequence."""
    bounds = [(0, k.shape[1])] if call.cu_seqlens is None else sequence_bounds(call.cu_seqlens, k.shape[1])
    parts = []
    for n, (start, end) in enumerate(bounds):
        if start == end:
            continue
        first = k.new_zeros(k.shape[0], 1, *k.shape[2:])
        if z is not None:
            first = z.unsqueeze(1) if call.cu_seqlens is None else z[n, None, None]
        before = torch.cat([first, k[:, start : end - 1]], dim=1).cumsum(1)
        parts.append(overlap(before, k[:, start:end], eps).squeeze(-1))
    return torch.cat(parts, dim=1)


RULE = Rule(
    name="delta_net",
    title="DeltaNet",
    equation="S ← S + k ⊗ β(v - Sᵀk);  o = Sᵀq",
    source="Schlag et al. 2021, arXiv 2102.11174; Yang et al. 2024, arXiv 2406.06484",
    inputs=("beta",),
    states=("state",),
    step=step,
    apply=apply,
    raw_gates=True,
    defaults={**MODERN_SHELL, "output_gate": "none"},
    options={"normalize": None, "eps": NORMALIZER_EPS, "slow_net": "linear", "use_beta": True},
    optional={"beta": "use_beta"},
    choices={"normalize": (None, "output", "full"), "slow_net": ("linear", "lstm")},
)
