"""A recurrent network whose own outputs change its weights.

    s_t = [x_t; h_{t-1}; 1]
    h_t = tanh((W_s + S_{t-1})ᵀ s_t)                 read before write
    S_t = squash(S_{t-1} + η · tanh(W_fᵀ h_t) ⊗ tanh(W_tᵀ h_t))
    o_t = W_yᵀ h_t

n = V units control (K + n + 1) n changing weights. x [K] is the hidden state split over the heads; W_s [K+n+1, n] are
the learned weights that S is added to, W_f [n, K+n+1] and W_t [n, n] address FROM and TO, W_y [n, n] is the output.
The principle is that of the paper; this wiring, tanh, no squash and η = 1/2 are choices of this library. `squashing`
and τ are those of fwp_1991. Carried are S - S_0 and h.

Schmidhuber 1993 (ICANN).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .base import Own, Rule, States, Weight, normal, read, through
from .fwp_1991 import STARTS, squash
from .sequential import Form, apply_form


def own(key_size: int, value_size: int, options: Mapping[str, Any]) -> Own:
    """The network's slow weights, and its fast weights and units."""
    inward = key_size + value_size + 1
    draw = normal(value_size**-0.5)
    return Own(
        states={"state": (inward, value_size), "h": (value_size,)},
        weights={
            "W_s": Weight((inward, value_size), normal(inward**-0.5)),
            "W_f": Weight((value_size, inward), draw),
            "W_t": Weight((value_size, value_size), draw),
            "W_y": Weight((value_size, value_size), draw),
        },
        hidden=True,
    )


def step(
    states: States,
    *,
    x: Tensor,
    W_s: Tensor,
    W_f: Tensor,
    W_t: Tensor,
    W_y: Tensor,
    squashing: str = "identity",
    eta: float = 0.5,
    tau: float = 10.0,
) -> tuple[States, Tensor]:
    """One token: x [B,H,K]."""
    state = STARTS[squashing] + states["state"]
    s = torch.cat([x, states["h"], torch.ones_like(x[..., :1])], dim=-1)
    h_BHV = (through(W_s, s) + read(state, s)).tanh()
    change = through(W_f, h_BHV).tanh()[..., :, None] * through(W_t, h_BHV).tanh()[..., None, :]
    state = squash(state + eta * change, kind=squashing, tau=tau)
    return {"state": state - STARTS[squashing], "h": h_BHV}, through(W_y, h_BHV)


RULE = Rule(
    name="fwp_1993",
    title="Recurrent self-referencing fast weight programmer",
    equation="s = [x; h; 1];  h = tanh((W_s + S)ᵀs);  S ← squash(S + η·tanh(W_fᵀh) ⊗ tanh(W_tᵀh));  o = W_yᵀh",
    source="Schmidhuber 1993, ICANN",
    inputs=(),
    states=("state", "h"),
    step=step,
    apply=partial(
        apply_form,
        Form(
            rule=lambda: RULE,
            sizes=lambda inputs, weights: (inputs["x"].shape[-1], weights["W_y"].shape[-1]),
            kernel="fwp_1993",
        ),
    ),
    defaults={"scale": 1.0},
    options={"squashing": "identity", "eta": 0.5, "tau": 10.0},
    choices={"squashing": ("identity", "tanh", "logistic")},
    qkv=False,
    parallel="sequential",
    own=own,
)
