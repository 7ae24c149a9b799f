"""The delta LSTM: an LSTM cell whose six matrices are fast weights.

For each gate g of i (input), u (update), o (output), with z_g the read of a delta net of its own (features elu + 1,
divided by their sum) and R_g a recurrent fast weight matrix, updated before it is read:

    R_g = R_g + k^r_g ⊗ β^r_g (v^r_g - R_gᵀ k^r_g)                 k^r = softmax(k_r), β^r = sigmoid(b_r)
    s = softmax(h_{t-1})
    i = sigmoid(z_i + R_iᵀ s);   o = sigmoid(z_o + R_oᵀ s);   u = z_u + R_uᵀ s
    c_t = i * u + (1 - i) * c_{t-1}
    h_t = o * c_t                                              the output of the rule

That is variant "v4". "v1": s = h_{t-1}, u = sigmoid(...), h_t = softmax(o * c_t). "v2": u = sigmoid(...).
"v3": u = sigmoid(...), h_t = o * c_t + z_u. h_0 = c_0 = 0. Tensors of the three gates lie side by side, in the order
i, u, o: q and k [3K], v, k_r and v_r [3V], b and b_r [3]; the states S [3, K, V] and R [3, V, V].

Irie, Schlag, Csordás, Schmidhuber 2021 (arXiv 2106.06295).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from . import delta_net
from .base import Own, Rule, States, positive_features
from .sequential import Form, Inputs, Run, apply_form

GATES = 3
RECURRENT = ("recurrent_state", "h", "c")


def own(key_size: int, value_size: int, options: Mapping[str, Any]) -> Own:
    """Queries, keys, values and raw rates of three delta nets and of three recurrent matrices."""
    keys, values = GATES * key_size, GATES * value_size
    return Own(
        states={
            "state": (GATES, key_size, value_size),
            "recurrent_state": (GATES, value_size, value_size),
            "h": (value_size,),
            "c": (value_size,),
        },
        projections={"q": keys, "k": keys, "v": values, "b": GATES, "k_r": values, "v_r": values, "b_r": GATES},
    )


def features(x: Tensor) -> Tensor:
    """ELU(x) + 1 over its sum, gate by gate: [..., 3K] -> [..., 3, K]."""
    return positive_features(x.unflatten(-1, (GATES, -1)))


def recurrent_step(
    states: States, *, z: Tensor, k_r: Tensor, v_r: Tensor, b_r: Tensor, variant: str = "v4"
) -> tuple[States, Tensor]:
    """From the reads z [B,H,3,V] of the delta nets to h; k_r, v_r [B,H,3V], b_r [B,H,3]."""
    s_BHV = states["h"] if variant == "v1" else states["h"].softmax(-1)
    matrices, recurrent = delta_net.step(
        {"state": states["recurrent_state"].flatten(1, 2)},
        q=s_BHV.repeat_interleave(GATES, dim=1),
        k=k_r.unflatten(-1, (GATES, -1)).softmax(-1).flatten(1, 2),
        v=v_r.unflatten(-1, (GATES, -1)).flatten(1, 2),
        beta=b_r.sigmoid().flatten(1, 2),
    )
    i, u, o = (z + recurrent.unflatten(1, (-1, GATES))).unbind(2)
    i, o = i.sigmoid(), o.sigmoid()
    u = u if variant == "v4" else u.sigmoid()
    c_BHV = i * u + (1 - i) * states["c"]
    h_BHV = o * c_BHV
    if variant == "v1":
        h_BHV = h_BHV.softmax(-1)
    if variant == "v3":
        h_BHV = h_BHV + z[:, :, 1]
    matrix = matrices["state"].unflatten(1, (-1, GATES))
    return {"recurrent_state": matrix, "h": h_BHV, "c": c_BHV}, h_BHV


def step(
    states: States,
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b: Tensor,
    k_r: Tensor,
    v_r: Tensor,
    b_r: Tensor,
    variant: str = "v4",
) -> tuple[States, Tensor]:
    """One token: q, k [B,H,3K], v, k_r, v_r [B,H,3V], b, b_r [B,H,3]."""
    memory, z = delta_net.step(
        {"state": states["state"].flatten(1, 2)},
        q=features(q).flatten(1, 2),
        k=features(k).flatten(1, 2),
        v=v.unflatten(-1, (GATES, -1)).flatten(1, 2),
        beta=b.sigmoid().flatten(1, 2),
    )
    z = z.unflatten(1, (-1, GATES))
    recurrent, out = recurrent_step(states, z=z, k_r=k_r, v_r=v_r, b_r=b_r, variant=variant)
    return {"state": memory["state"].unflatten(1, (-1, GATES)), **recurrent}, out


def fast(run: Run, inputs: Inputs, states: States) -> tuple[Tensor, States]:
    """The three delta nets as three times the heads, chunk by chunk; then the recurrence through h."""
    z, state = run.delta(
        features(inputs["q"]).flatten(2, 3),
        features(inputs["k"]).flatten(2, 3),
        inputs["v"].unflatten(-1, (GATES, -1)).flatten(2, 3),
        inputs["b"].sigmoid().flatten(2, 3),
        states["state"].flatten(1, 2),
    )
    given = {"z": z.unflatten(2, (-1, GATES))} | {name: inputs[name] for name in ("k_r", "v_r", "b_r")}
    out, recurrent = run.walk(given, {name: states[name] for name in RECURRENT}, step=recurrent_step)
    return out, {"state": state.unflatten(1, (-1, GATES)), **recurrent}


RULE = Rule(
    name="delta_lstm",
    title="Delta LSTM",
    equation="z = delta_net of each gate;  R ← R + kʳ ⊗ βʳ(vʳ - Rᵀkʳ);  s = softmax(h);  i, o = sigmoid(z + Rᵀs);  "
    "u = z + Rᵀs;  c ← i·u + (1-i)·c;  h = o·c",
    source="Irie et al. 2021, arXiv 2106.06295",
    inputs=(),
    states=("state", *RECURRENT),
    step=step,
    apply=partial(
        apply_form,
        Form(
            rule=lambda: RULE,
            fast=fast,
            sizes=lambda inputs, weights: (inputs["q"].shape[-1] // GATES, inputs["v"].shape[-1] // GATES),
            kernel="delta_lstm",
        ),
    ),
    defaults={"scale": 1.0},
    options={"variant": "v4"},
    choices={"variant": ("v4", "v1", "v2", "v3")},
    qkv=False,
    parallel="mixed",
    own=own,
)
