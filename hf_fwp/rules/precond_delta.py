"""The preconditioned delta rule: a running second moment of the keys scales, channel by channel, what a key writes to.

    A_t = exp(a_t) A_{t-1} + b_t k_t ⊙ k_t                            A ∈ R^K
    k̃_t = k_t ⊙ exp(-log x · softsign(log A_t - c))                   between k / x, for large A, and k x
    S̃_t = exp(g_t) S_{t-1}                                            only with `forget_gate`
    S_t = S̃_t + k̃_t ⊗ β_t (v_t - S̃_tᵀ k_t);      o_t = scale · S_tᵀ q_t

x is `range`, c is `center`. The rule is stable for βx|k|² < 2. arXiv 2604.21100.
How a_t and b_t depend on the token is our choice: as g and β do.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import linear_attention
from .apply_form import apply_form
from .base import MODERN_SHELL, Gates, Rule, States, read
from .gating import softplus, start_rates, start_steps
from .general import Form

SMALLEST = 1e-12  # log 0; nothing is gained below it, where k̃ = k x within 4 %


def scaled_keys(k: Tensor, moment: Tensor, *, range: float, center: float) -> Tensor:
    """k̃ from k and A of the same shape."""
    return k * (-math.log(range) * F.softsign(moment.clamp_min(SMALLEST).log() - center)).exp()


def step(
    states: States,
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    moment_g: Tensor,
    moment_beta: Tensor,
    g: Tensor | None = None,
    scale: float = 1.0,
    range: float = 1.5,
    center: float = -0.2,
    **_: Any,
) -> tuple[States, Tensor]:
    """One token: q [B,H,K] or [B,H,R,K], k [B,H,K], v [B,H,V], the others [B,H]; a is `moment_g`, b `moment_beta`."""
    moment_BHK = moment_g.exp()[..., None] * states["moment"] + moment_beta[..., None] * k.square()
    written_to = scaled_keys(k, moment_BHK, range=range, center=center)
    state_BHKV = states["state"] if g is None else g.exp()[..., None, None] * states["state"]
    written_BHV = beta[..., None] * (v - read(state_BHKV, k))
    state_BHKV = state_BHKV + written_to[..., :, None] * written_BHV[..., None, :]
    return {"state": state_BHKV, "moment": moment_BHK}, scale * read(state_BHKV, q)


def moments(
    tokens: dict[str, Tensor], states: States, *, backend: str, cu_seqlens: Tensor | None
) -> tuple[dict[str, Tensor], States]:
    """A for every token, which the keys alone decide: found before the state is touched. A decayed sum is the sum rule
    with a query and a key of size 1 that are 1."""
    rest = {name: x for name, x in tokens.items() if name not in ("moment_g", "moment_beta")}
    g, added = tokens["moment_g"], tokens["moment_beta"].unsqueeze(-1) * tokens["k"].square()
    if backend == "step":
        moment = added.addcmul(g.exp().unsqueeze(-1), states["moment"].unsqueeze(1))
        return {**rest, "moment": moment}, {**states, "moment": moment[:, 0]}
    one = torch.ones_like(added[..., :1])
    call: dict[str, Any] = {"backend": backend, "cu_seqlens": cu_seqlens, "options": {"normalize": False}, "scale": 1.0}
    moment, after = linear_attention.apply(
        one, one, added, g=g, states={"state": states["moment"].unsqueeze(2)}, **call
    )
    return {**rest, "moment": moment}, {**states, "moment": after["state"].squeeze(2)}


def form(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    moment: Tensor,
    g: Tensor | None = None,
    *,
    range: float,
    center: float,
    **_: Any,
) -> Form:
    """w = k̃, e = βk, u = βv."""
    g = None if g is None else g.unsqueeze(-1)
    return Form(q, w=scaled_keys(k, moment, range=range, center=center), e=k, u=v, g=g, rate=beta)


def apply(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    moment_g: Tensor | None = None,
    moment_beta: Tensor | None = None,
    **call: Any,
) -> tuple[Tensor, States]:
    """Run the rule over [B, T, heads, size] tensors; `call` holds the keywords of `apply_form`."""
    inputs = {"g": g, "beta": beta, "moment_g": moment_g, "moment_beta": moment_beta}
    return apply_form(RULE, form, q, k, v, inputs, first=moments, **call)


class MomentRates(Gates):
    """a as the log-decay of the gated delta rule, b as its rate: one number per head and token each."""

    gives = ("moment_g", "moment_beta")

    def __init__(self, hidden: int, *, states: int, key_size: int, value_size: int, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.decay_proj = nn.Linear(hidden, states, bias=False)
        self.rate_proj = nn.Linear(hidden, states, bias=False)
        self.A_log = nn.Parameter(torch.empty(states, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(states, dtype=torch.float32))

    def initial(self) -> dict[str, Tensor]:
        return {"A_log": start_rates(self.A_log), "dt_bias": start_steps(self.dt_bias)}

    def forward(self, x_BTD: Tensor) -> dict[str, Tensor]:
        wide = torch.promote_types(x_BTD.dtype, torch.float32)
        dt = softplus(self.decay_proj(x_BTD).to(wide) + self.dt_bias.to(wide))
        return {"moment_g": -self.A_log.to(wide).exp() * dt, "moment_beta": self.rate_proj(x_BTD).to(wide).sigmoid()}


def check(options: Mapping[str, Any]) -> None:
    if not options["range"] >= 1:
        raise ValueError(
            f"range is {options['range']!r}; keys are scaled by 1/range to range, so it must be at least 1"
        )


RULE = Rule(
    name="precond_delta",
    title="Preconditioned delta rule",
    equation="A ← exp(a)A + b k⊙k;  S ← S + k̃(k, A) ⊗ β(v - Sᵀk);  o = Sᵀq",
    source="arXiv 2604.21100",
    inputs=("g", "beta", "moment_g", "moment_beta"),
    states=("state", "moment"),
    step=step,
    apply=apply,
    defaults=MODERN_SHELL,
    options={"range": 1.5, "center": -0.2, "forget_gate": False},
    shapes={"moment_g": ("HV",), "moment_beta": ("HV",), "moment": ("HV", "K")},
    optional={"g": "forget_gate"},
    gates=MomentRates,
    check=check,
)
