"""Learning rules in continuous time, dS/dt = F(x(t), S), for tokens that last Δt each.

    v = tanh(v);   β = sigmoid(b);   q = softmax(q)
    hebb    F = β · softmax(k) ⊗ v
    oja     F = β · softmax(k - S v) ⊗ v
    delta   F = β · k ⊗ (v - Sᵀ k),  k = softmax(k)
    o_t = S_tᵀ q_t                                                read after write

Euler's method: S = S + Δt F; with Δt = 1 (option `time_step`) the rules are discrete learning rules. Two more choices
of `learning_rule`: "delta_post_tanh" squashes the difference, F = β · k ⊗ tanh(v - Sᵀ k), v as it is;
"delta_exact_hold" solves the delta rule for inputs that are constant over Δt,
S = S + (1 - exp(-β‖k‖²Δt)) / ‖k‖² · k ⊗ (v - Sᵀ k), a rate that always contracts (this library's derivation).

Irie, Faccio, Schmidhuber 2022 (arXiv 2206.01649).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .base import Own, Rule, States, read
from .sequential import Form, Inputs, Run, apply_form


def own(key_size: int, value_size: int, options: Mapping[str, Any]) -> Own:
    """The raw rate b and the state."""
    return Own(states={"state": (key_size, value_size)}, projections={"b": 1})


def rate(b: Tensor, k: Tensor, *, learning_rule: str, time_step: float) -> Tensor:
    """How much of F / β is added, from the raw rate [..., 1] and the key after its softmax."""
    beta = b[..., 0].sigmoid()
    if learning_rule != "delta_exact_hold":
        return time_step * beta
    square = k.square().sum(-1)
    return -torch.expm1(-beta * square * time_step) / square


def step(
    states: States,
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b: Tensor,
    learning_rule: str = "delta",
    time_step: float = 1.0,
) -> tuple[States, Tensor]:
    """One token: q, k [B,H,K], v [B,H,V], b [B,H,1], none of them squashed."""
    state, value = states["state"], v.tanh()
    if learning_rule == "oja":
        k = k - torch.einsum("bhkv,bhv->bhk", state, value)
    k = k.softmax(-1)
    if learning_rule == "delta_post_tanh":
        value = (v - read(state, k)).tanh()
    elif learning_rule.startswith("delta"):
        value = value - read(state, k)
    written = rate(b, k, learning_rule=learning_rule, time_step=time_step)[..., None] * value
    state = state + k[..., :, None] * written[..., None, :]
    return {"state": state}, read(state, q.softmax(-1))


def fast(run: Run, inputs: Inputs, states: States) -> tuple[Tensor, States]:
    """Hebb's rule and the delta rule chunk by chunk; the others step after step."""
    learning_rule = run.options["learning_rule"]
    if learning_rule in ("oja", "delta_post_tanh"):
        return run.walk(inputs, states)
    q, k, v = inputs["q"].softmax(-1), inputs["k"].softmax(-1), inputs["v"].tanh()
    beta = rate(inputs["b"], k, **run.options)
    if learning_rule == "hebb":
        out, state = run.sum(q, k, beta[..., None] * v, states["state"])
    else:
        out, state = run.delta(q, k, v, beta, states["state"])
    return out, {"state": state}


RULE = Rule(
    name="continuous_fwp",
    title="Learning rules in continuous time",
    equation="S ← S + Δt·F(x, S);  F = β·softmax(k) ⊗ (tanh(v) - Sᵀsoftmax(k)), or Hebb's or Oja's;  o = Sᵀsoftmax(q)",
    source="Irie et al. 2022, arXiv 2206.01649",
    inputs=(),
    states=("state",),
    step=step,
    apply=partial(
        apply_form,
        Form(
            name="continuous_fwp",
            step=step,
            own=own,
            resolve=lambda options: RULE.resolve_options(options),
            inputs=("q", "k", "v"),
            fast=fast,
        ),
    ),
    defaults={"scale": 1.0},
    options={"learning_rule": "delta", "time_step": 1.0},
    choices={"learning_rule": ("delta", "hebb", "oja", "delta_exact_hold", "delta_post_tanh")},
    own=own,
)
