"""The delta RNN: a delta net whose read also depends on the previous read, through a second fast weight matrix.

    z_t = the read of delta_net
    R_t = R_{t-1} + k^r_t ⊗ β^r_t (v^r_t - R_{t-1}ᵀ k^r_t)         k^r_t = softmax(k_r), β^r_t = sigmoid(b_r)
    y_t = z_t + R_tᵀ softmax(y_{t-1})                    variant "v2"
    y_t = softmax(z_t + R_tᵀ y_{t-1})                    variant "v1", published with softmax features of q and k
    o_t = y_t

S [K, V], R [V, V] and y [V] belong to each head; y_0 = 0, so that v2 reads R_1 with softmax(0) = 1/V.

Irie, Schlag, Csordás, Schmidhuber 2021 (arXiv 2106.06295).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from . import delta_net
from .base import Own, Rule, States
from .sequential import Form, Inputs, Run, apply_form

RECURRENT = ("recurrent_state", "y")


def own(key_size: int, value_size: int, options: Mapping[str, Any]) -> Own:
    """Keys, values and raw rates of the recurrent matrix; both matrices and the read that goes back."""
    return Own(
        states={
            "state": (key_size, value_size),
            "recurrent_state": (value_size, value_size),
            "y": (value_size,),
        },
        projections={"k_r": value_size, "v_r": value_size, "b_r": 1},
    )


def recurrent_step(
    states: States, *, z: Tensor, k_r: Tensor, v_r: Tensor, b_r: Tensor, variant: str = "v2"
) -> tuple[States, Tensor]:
    """From the read z [B,H,V] of the delta net to the read of this rule; k_r, v_r [B,H,V], b_r [B,H,1]."""
    y_BHV = states["y"] if variant == "v1" else states["y"].softmax(-1)
    matrix, recurrent_BHV = delta_net.step(
        {"state": states["recurrent_state"]},
        q=y_BHV,
        k=k_r.softmax(-1),
        v=v_r,
        beta=b_r.sigmoid()[..., 0],
    )
    y_BHV = z + recurrent_BHV
    y_BHV = y_BHV.softmax(-1) if variant == "v1" else y_BHV
    return {"recurrent_state": matrix["state"], "y": y_BHV}, y_BHV


def step(
    states: States,
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    k_r: Tensor,
    v_r: Tensor,
    b_r: Tensor,
    variant: str = "v2",
) -> tuple[States, Tensor]:
    """One token: q, k [B,H,K], v, k_r, v_r [B,H,V], beta [B,H], b_r [B,H,1]."""
    memory, z = delta_net.step({"state": states["state"]}, q=q, k=k, v=v, beta=beta)
    recurrent, out = recurrent_step(states, z=z, k_r=k_r, v_r=v_r, b_r=b_r, variant=variant)
    return {**memory, **recurrent}, out


def fast(run: Run, inputs: Inputs, states: States) -> tuple[Tensor, States]:
    """All z at once, chunk by chunk; then the recurrence through y."""
    z, state = run.delta(inputs["q"], inputs["k"], inputs["v"], inputs["beta"], states["state"])
    given = {"z": z} | {name: inputs[name] for name in ("k_r", "v_r", "b_r")}
    out, recurrent = run.walk(given, {name: states[name] for name in RECURRENT}, step=recurrent_step)
    return out, {"state": state, **recurrent}


RULE = Rule(
    name="delta_rnn",
    title="Delta RNN",
    equation="z = delta_net(q, k, v, β);  R ← R + kʳ ⊗ βʳ(vʳ - Rᵀkʳ);  o = y = z + Rᵀsoftmax(y)",
    source="Irie et al. 2021, arXiv 2106.06295",
    inputs=("beta",),
    states=("state", *RECURRENT),
    step=step,
    apply=partial(apply_form, Form(rule=lambda: RULE, fast=fast, kernel="delta_rnn")),
    defaults={"feature_map": "elu1", "qk_norm": "sum", "scale": 1.0},
    options={"variant": "v2"},
    choices={"variant": ("v2", "v1")},
    parallel="mixed",
    own=own,
)
