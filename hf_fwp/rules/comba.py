"""Comba: the gated delta rule that erases only a part of what a key retrieves, and reads with a corrected query.

    S̃_t = exp(g_t) S_{t-1};     p_t = c k_t                 0 < c < 1, one number per head
    S_t = S̃_t + k_t ⊗ β_t (v_t - S̃_tᵀ p_t)
    o_t = scale · S_tᵀ (q_t - D p_t)

The query is corrected before queries and keys are normalised. arXiv 2506.02475.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .apply_form import apply_form, check_inputs
from .base import MODERN_SHELL, Gates, Rule, States, keep_valid, read
from .general import Form
from .linear_class import computing_dtype, split_queries


def step(
    states: States,
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    closeness: Tensor,
    correction: Tensor,
    scale: float = 1.0,
    **_: Any,
) -> tuple[States, Tensor]:
    """One token: q [B,H,K] or [B,H,R,K], k [B,H,K], v [B,H,V], the others [B,H]; c is `closeness`, D `correction`."""
    state_BHKV = g.exp()[..., None, None] * states["state"]
    p_BHK = closeness[..., None] * k
    written_BHV = beta[..., None] * (v - read(state_BHKV, p_BHK))
    state_BHKV = state_BHKV + k[..., :, None] * written_BHV[..., None, :]
    shift_BHK = correction[..., None] * p_BHK
    return {"state": state_BHKV}, scale * read(state_BHKV, q - (shift_BHK if q.ndim == 3 else shift_BHK[:, :, None]))


def form(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, closeness: Tensor, correction: Tensor, **_: Any
) -> Form:
    """w = k, e = βck, u = βv; the query is corrected already.

    The gated delta rule with rate βc and value v / c says the same, but is inexact for small c.
    """
    return Form(q, w=k, e=closeness.unsqueeze(-1) * k, u=v, g=g.unsqueeze(-1), rate=beta)


def apply(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    closeness: Tensor | None = None,
    correction: Tensor | None = None,
    mask: Tensor | None = None,
    options: Mapping[str, Any] | None = None,
    **call: Any,
) -> tuple[Tensor, States]:
    """Run the rule over [B, T, heads, size] tensors; the gates are [B, T, value heads]."""
    inputs = {"g": g, "beta": beta, "closeness": closeness, "correction": correction}
    given = {"q": q, "k": k, "v": v, **check_inputs(RULE, RULE.resolve_options(options), inputs, k, v)}
    compute = computing_dtype(*given.values())
    x = {name: y.to(compute) if mask is None else keep_valid(y.to(compute), mask) for name, y in given.items()}
    shift = (x["closeness"] * x["correction"])[..., None] * _per_value_head(x["k"], v.shape[2])
    corrected = (split_queries(x["q"], v.shape[2]) - shift.unsqueeze(3)).flatten(2, 3)
    inputs = {name: x[name] for name in inputs} | {"correction": torch.zeros_like(x["correction"])}
    return apply_form(RULE, form, corrected.to(q.dtype), k, v, inputs, mask=mask, options=options, **call)


def _per_value_head(k: Tensor, value_heads: int) -> Tensor:
    return k if k.shape[2] == value_heads else k.repeat_interleave(value_heads // k.shape[2], dim=2)


class Closeness(Gates):
    """c = sigmoid(λ) and D, one learned number per head, the same for every token."""

    gives = ("closeness", "correction")

    def __init__(self, hidden: int, *, states: int, key_size: int, value_size: int, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.closeness = nn.Parameter(torch.ones(states))
        self.correction = nn.Parameter(torch.full((states,), float(options["correction_start"])))
        self.start = float(options["correction_start"])

    def initial(self) -> dict[str, Tensor]:
        ones = torch.ones(len(self.closeness))
        return {"closeness": ones, "correction": self.start * ones}

    def forward(self, x_BTD: Tensor) -> dict[str, Tensor]:
        wide = torch.promote_types(x_BTD.dtype, torch.float32)
        each = (*x_BTD.shape[:2], -1)
        closeness = self.closeness.to(wide).sigmoid()
        return {"closeness": closeness.expand(each), "correction": self.correction.to(wide).expand(each)}


RULE = Rule(
    name="comba",
    title="Comba",
    equation="S ← exp(g)S;  S ← S + k ⊗ β(v - c Sᵀk);  o = Sᵀ(q - Dck)",
    source="arXiv 2506.02475",
    inputs=("g", "beta", "closeness", "correction"),
    states=("state",),
    step=step,
    apply=apply,
    defaults=MODERN_SHELL,
    options={"correction_start": 1.0},
    shapes={"closeness": ("HV",), "correction": ("HV",)},
    gates=Closeness,
)
