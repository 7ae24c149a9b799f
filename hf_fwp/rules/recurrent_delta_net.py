"""The recurrent delta net: the previous read takes part in the next query, key, value and rate.

    h_t = tanh(y_{t-1})
    q_t = softmax(q_t + R_qᵀ h_t);   k_t = softmax(k_t + R_kᵀ h_t)
    v_t = v_t + R_vᵀ h_t;            β_t = sigmoid(b_t + r_b · h_t)
    S_t = S_{t-1} + k_t ⊗ β_t (v_t - S_{t-1}ᵀ k_t)
    y_t = S_tᵀ q_t;                  o_t = y_t

y [V] is the raw read of this head, before scale, norm and output projection; y_0 = 0. R_q, R_k [V, K], R_v [V, V] and
r_b [V, 1] belong to each head.

Irie, Schlag, Csordás, Schmidhuber 2021 (arXiv 2106.06295).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from . import delta_net
from .base import Own, Rule, States, Weight, normal, through
from .sequential import Form, apply_form


def own(key_size: int, value_size: int, options: Mapping[str, Any]) -> Own:
    """The rate's raw projection b, the recurrent matrices, and the state with the read that goes back."""
    draw = normal(value_size**-0.5)
    return Own(
        states={"state": (key_size, value_size), "y": (value_size,)},
        projections={"b": 1},
        weights={
            "R_q": Weight((value_size, key_size), draw),
            "R_k": Weight((value_size, key_size), draw),
            "R_v": Weight((value_size, value_size), draw),
            "r_b": Weight((value_size, 1), draw),
        },
    )


def step(
    states: States,
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b: Tensor,
    R_q: Tensor,
    R_k: Tensor,
    R_v: Tensor,
    r_b: Tensor,
) -> tuple[States, Tensor]:
    """One token: q, k [B,H,K], v [B,H,V], b [B,H,1]."""
    h_BHV = states["y"].tanh()
    memory, y_BHV = delta_net.step(
        {"state": states["state"]},
        q=(q + through(R_q, h_BHV)).softmax(-1),
        k=(k + through(R_k, h_BHV)).softmax(-1),
        v=v + through(R_v, h_BHV),
        beta=(b + through(r_b, h_BHV)).sigmoid()[..., 0],
    )
    return {**memory, "y": y_BHV}, y_BHV


RULE = Rule(
    name="recurrent_delta_net",
    title="Recurrent delta net",
    equation="h = tanh(y);  q, k ← softmax(q + R_qᵀh), softmax(k + R_kᵀh);  v ← v + R_vᵀh;  β = sigmoid(b + r_b·h);  "
    "S ← S + k ⊗ β(v - Sᵀk);  o = y = Sᵀq",
    source="Irie et al. 2021, arXiv 2106.06295",
    inputs=(),
    states=("state", "y"),
    step=step,
    apply=partial(apply_form, Form(rule=lambda: RULE, kernel="recurrent_delta_net")),
    defaults={"scale": 1.0},
    parallel="sequential",
    own=own,
)
