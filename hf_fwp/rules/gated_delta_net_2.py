"""Gated DeltaNet-2: what is erased and what is written have gates of their own, channel by channel.

    S̃_t = Diag(exp(g_t)) S_{t-1}                              g_t ∈ R^K
    S_t = S̃_t + k_t ⊗ (w_t ⊙ v_t - S̃_tᵀ (b_t ⊙ k_t))         b_t ∈ R^K erases, w_t ∈ R^V writes
    o_t = scale · S_tᵀ q_t

The transition I - k (b ⊙ k)ᵀ is not symmetric: it may lengthen a state even for b ≤ 1. arXiv 2605.22791.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .apply_form import apply_form
from .base import MODERN_SHELL, Rule, States, read
from .gating import ChannelDecay, Decay, Gate, Rate, check_lower_bound
from .general import Form


def step(
    states: States,
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    erase: Tensor,
    write: Tensor,
    scale: float = 1.0,
    **_: Any,
) -> tuple[States, Tensor]:
    """One token: q [B,H,K] or [B,H,R,K], k, g and erase [B,H,K], v and write [B,H,V]."""
    state_BHKV = g.exp()[..., None] * states["state"]
    written_BHV = write * v - read(state_BHKV, erase * k)
    state_BHKV = state_BHKV + k[..., :, None] * written_BHV[..., None, :]
    return {"state": state_BHKV}, scale * read(state_BHKV, q)


def form(q: Tensor, k: Tensor, v: Tensor, g: Tensor, erase: Tensor, write: Tensor, **_: Any) -> Form:
    """w = k, e = b ⊙ k, u = w ⊙ v."""
    return Form(q, w=k, e=k, u=v, g=g, erase=erase, write=write)


def apply(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor | Decay | None = None,
    erase: Tensor | Rate | None = None,
    write: Tensor | Rate | None = None,
    **call: Any,
) -> tuple[Tensor, States]:
    """Run the rule over [B, T, heads, size] tensors; `call` holds the keywords of `apply_form`."""
    return apply_form(RULE, form, q, k, v, {"g": g, "erase": erase, "write": write}, renames=True, **call)


class EraseAndWrite(ChannelDecay):
    """The channel decay, and sigmoids of two linear maps: erase [B,T,HV,K] and write [B,T,HV,V]."""

    gives = ("g", "erase", "write")

    def __init__(self, hidden: int, *, states: int, key_size: int, value_size: int, options: Mapping[str, Any]) -> None:
        super().__init__(hidden, states=states, key_size=key_size, value_size=value_size, options=options)
        self.erase_proj = nn.Linear(hidden, states * key_size, bias=False)
        self.write_proj = nn.Linear(hidden, states * value_size, bias=False)

    def forward(self, x_BTD: Tensor) -> dict[str, Gate]:
        maps = {"erase": self.erase_proj, "write": self.write_proj}
        gates = {name: Rate(linear(x_BTD).unflatten(-1, (self.states, -1))) for name, linear in maps.items()}
        return super().forward(x_BTD) | gates


RULE = Rule(
    name="gated_delta_net_2",
    title="Gated DeltaNet-2",
    equation="S ← Diag(exp(g))S;  S ← S + k ⊗ (w⊙v - Sᵀ(b⊙k));  o = Sᵀq",
    source="arXiv 2605.22791",
    inputs=("g", "erase", "write"),
    states=("state",),
    step=step,
    apply=apply,
    defaults={**MODERN_SHELL, "output_gate": "low_rank_sigmoid"},
    options={"lower_bound": None},
    shapes={"g": ("HV", "K"), "erase": ("HV", "K"), "write": ("HV", "V")},
    gates=EraseAndWrite,
    raw_gates=True,
    check=check_lower_bound,
)
