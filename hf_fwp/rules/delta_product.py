"""DeltaProduct: several steps of the delta rule per token, so that the transition is a product of Householder factors.

    S = exp(g_t) S_{t-1}                              only with `forget_gate`
    for j = 1 ... n:   S = S + k_tj ⊗ β_tj (v_tj - Sᵀ k_tj)
    o_t = scale · S_tᵀ q_t

n is `num_householder`. Two factors with β = 2 and keys of length 1 make a rotation of a plane.
Siems et al. 2025 (arXiv 2502.10297).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import delta_net, gated_delta_net
from .apply_form import apply_form, check_inputs
from .base import MODERN_SHELL, Rule, States, read
from .linear_class import LinearClassCall, choose_backend


def step(
    states: States,
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    scale: float = 1.0,
    **_: Any,
) -> tuple[States, Tensor]:
    """One token: q [B,H,K] or [B,H,R,K], k [B,H,n,K], v [B,H,n,V], beta [B,H,n], g [B,H]."""
    state_BHKV = states["state"]
    if g is not None:
        state_BHKV = g.exp()[..., None, None] * state_BHKV
    for j in range(k.shape[2]):
        v_old_BHV = read(state_BHKV, k[:, :, j])
        written_BHV = beta[:, :, j, None] * (v[:, :, j] - v_old_BHV)
        state_BHKV = state_BHKV + k[:, :, j, :, None] * written_BHV[..., None, :]
    return {"state": state_BHKV}, scale * read(state_BHKV, q)


def apply(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
    options: Mapping[str, Any] | None = None,
    **call: Any,
) -> tuple[Tensor, States]:
    """Run the rule: k [B,T,H,n,K], v [B,T,HV,n,V], beta [B,T,HV,n]. Chunked, it is the (gated) delta rule over T·n."""
    inputs = {"g": g, "beta": beta}
    if backend == "reference":
        shared = {"mask": mask, "cu_seqlens": cu_seqlens, "backend": backend, "options": options}
        return apply_form(RULE, None, q, k, v, inputs, **shared, **call)
    chosen = RULE.resolve_options(options)
    given = check_inputs(RULE, chosen, {"k": k, "v": v, **inputs}, k, v)
    backend = choose_backend(
        LinearClassCall(step, erase=True, cu_seqlens=cu_seqlens, backend=backend), q, k, v, beta, g, *_given(call)
    )
    if backend == "step":
        return _one_token(q, k, v, g=g, beta=given["beta"], mask=mask, **call)
    count = chosen["num_householder"]
    rows: dict[str, Any] = {name: in_a_row(given[name]) for name in ("k", "v", "beta")}
    rows |= {"q": _at(q, count, first=False), "backend": backend}
    rows["mask"] = None if mask is None else mask.repeat_interleave(count, dim=1)
    rows["cu_seqlens"] = None if cu_seqlens is None else cu_seqlens * count
    if g is None:
        out, states = delta_net.RULE.apply(**rows, **call)
    else:
        out, states = gated_delta_net.RULE.apply(**rows, g=_at(g, count, first=True), **call)
    return out[:, count - 1 :: count], states


def in_a_row(x_BTHnD: Tensor) -> Tensor:
    """[B, T, H, n, ...] as [B, T·n, H, ...]."""
    return x_BTHnD.transpose(2, 3).flatten(1, 2)


def _at(x: Tensor, count: int, *, first: bool) -> Tensor:
    """[B, T·n, ...]: x at the first or last of every token's n steps, 0 at the others."""
    rest = x.new_zeros(*x.shape[:2], count - 1, *x.shape[2:])
    parts = (x.unsqueeze(2), rest) if first else (rest, x.unsqueeze(2))
    return torch.cat(parts, dim=2).flatten(1, 2)


def _given(call: Mapping[str, Any]) -> tuple[Tensor, ...]:
    return tuple((call.get("states") or {}).values())


def _one_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor | None,
    beta: Tensor,
    states: States | None = None,
    in_place: bool = False,
    **call: Any,
) -> tuple[Tensor, States]:
    out = q
    for j in range(k.shape[3]):
        rows = {"q": q, "k": k[:, :, :, j], "v": v[:, :, :, j], "beta": beta[..., j]}
        if j == 0 and g is not None:
            rule, rows["g"] = gated_delta_net.RULE, g
        else:
            rule = delta_net.RULE
        out, states = rule.apply(**rows, states=states, in_place=in_place, backend="step", **call)
        in_place = not torch.is_grad_enabled()  # from here on the state is ours
    return out, states or {}


def check(options: Mapping[str, Any]) -> None:
    count = options["num_householder"]
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"num_householder is {count!r}; it must be a whole number of at least 1")


RULE = Rule(
    name="delta_product",
    title="DeltaProduct",
    equation="S ← exp(g)S;  n times: S ← S + kⱼ ⊗ βⱼ(vⱼ - Sᵀkⱼ);  o = Sᵀq",
    source="Siems et al. 2025, arXiv 2502.10297",
    inputs=("g", "beta"),
    states=("state",),
    step=step,
    apply=apply,
    defaults={**MODERN_SHELL, "allow_neg_eigval": True},
    options={"num_householder": 2, "forget_gate": True},
    shapes={
        "k": ("H", "num_householder", "K"),
        "v": ("HV", "num_householder", "V"),
        "beta": ("HV", "num_householder"),
    },
    optional={"g": "forget_gate"},
    writes="num_householder",
    check=check,
)
