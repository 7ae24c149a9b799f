"""Oja's rule, and the same with a decay: the delta rule with keys and values exchanged.

    S̃_t = S_{t-1} Diag(exp(g_t))                   g_t ∈ R^V, only in gated_oja
    S_t = S̃_t + β_t (k_t - S̃_t v_t) ⊗ v_t
    o_t = scale · S_tᵀ q_t

β|v|² must stay below 2, so v is brought to length 1 (`v_norm` = "l2"); with "none" the caller sees to it.
Oja 1982 (J. Math. Biology 15).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .apply_form import apply_form
from .base import MODERN_SHELL, Rule, States, read
from .gating import ChannelDecay, check_lower_bound
from .general import Form
from .linear_class import l2_normalize

# 2.4e-2 in bf16: values of length 1 overlap, and without a decay errors stay
WORD = torch.float32
V_NORMS = {"l2": l2_normalize, "none": lambda v: v}


def step(
    states: States,
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    scale: float = 1.0,
    v_norm: str = "l2",
    **_: Any,
) -> tuple[States, Tensor]:
    """One token: q [B,H,K] or [B,H,R,K], k [B,H,K], v and g [B,H,V], beta [B,H]."""
    state_BHKV, v = states["state"], V_NORMS[v_norm](v)
    if g is not None:
        state_BHKV = state_BHKV * g.exp()[..., None, :]
    k_old_BHK = torch.einsum("bhkv,bhv->bhk", state_BHKV, v)
    state_BHKV = state_BHKV + (beta[..., None] * (k - k_old_BHK))[..., :, None] * v[..., None, :]
    return {"state": state_BHKV}, scale * read(state_BHKV, q)


def form(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None = None, *, v_norm: str = "l2", **_: Any
) -> Form:
    """On M = Sᵀ: w = v, e = βv, u = βk."""
    v = V_NORMS[v_norm](v)
    return Form(q, w=v, e=v, u=k, g=g, transposed=True, rate=beta)


def apply(q: Tensor, k: Tensor, v: Tensor, *, beta: Tensor | None = None, **call: Any) -> tuple[Tensor, States]:
    """Run the rule over [B, T, heads, size] tensors; `call` holds the keywords of `apply_form`."""
    return apply_form(RULE, form, q, k, v, {"beta": beta}, word=WORD, **call)


def apply_gated(
    q: Tensor, k: Tensor, v: Tensor, *, g: Tensor | None = None, beta: Tensor | None = None, **call: Any
) -> tuple[Tensor, States]:
    """The same with g [B, T, value heads, V]."""
    return apply_form(GATED, form, q, k, v, {"g": g, "beta": beta}, word=WORD, **call)


def check(options: Mapping[str, Any]) -> None:
    if options["v_norm"] not in V_NORMS:
        raise ValueError(f"v_norm is {options['v_norm']!r}; choose 'l2' (values of length 1) or 'none'")


def check_gated(options: Mapping[str, Any]) -> None:
    check(options)
    check_lower_bound(options)


def value_decay(
    hidden: int, *, states: int, key_size: int, value_size: int, options: Mapping[str, Any]
) -> ChannelDecay:
    """A decay for every value channel."""
    return ChannelDecay(hidden, states=states, key_size=value_size, value_size=value_size, options=options)


RULE = Rule(
    name="oja",
    title="Oja's rule",
    equation="S ← S + β(k - Sv) ⊗ v;  o = Sᵀq",
    source="Oja 1982, J. Math. Biology 15",
    inputs=("beta",),
    states=("state",),
    step=step,
    apply=apply,
    defaults=MODERN_SHELL,
    options={"v_norm": "l2"},
    check=check,
)
GATED = Rule(
    name="gated_oja",
    title="Oja's rule with decay",
    equation="S ← S Diag(exp(g));  S ← S + β(k - Sv) ⊗ v;  o = Sᵀq",
    source="Oja 1982, with the decay of arXiv 2412.06464 per channel",
    inputs=("g", "beta"),
    states=("state",),
    step=step,
    apply=apply_gated,
    defaults=MODERN_SHELL,
    options={"v_norm": "l2", "lower_bound": None},
    shapes={"g": ("HV", "V")},
    gates=value_decay,
    check=check_gated,
)
