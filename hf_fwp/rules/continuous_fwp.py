"""Learning rules in continuous time, dS/dt = F(x(t), S), for tokens or observations that last Δt each.

    v = tanh(v);   β = sigmoid(b);   q = softmax(q)
    hebb    F = β · softmax(k) ⊗ v
    oja     F = β · softmax(k - S v) ⊗ v
    delta   F = β · k ⊗ (v - Sᵀ k),  k = softmax(k)
    o_t = S_tᵀ q_t                                                read after write

Δt is the input `dt`, or `time_step` for every token where it is not given. `solver`:
    euler        S = S + Δt F; with Δt = 1 the rules are discrete learning rules
    exact_hold   the solution for inputs that are constant over Δt: Hebb's as above, and of the delta rule
                 S = S + (1 - exp(-β‖k‖²Δt)) / ‖k‖² · k ⊗ (v - Sᵀ k), a rate that always contracts (derived here)
    rk4, rk4_adjoint     Runge-Kutta along a spline through all observations; by layers only (hf_fwp/series.py)
One more `learning_rule`, delta_post_tanh, squashes the difference: F = β · k ⊗ tanh(v - Sᵀ k), v as it is.

`control` says what the layer makes k, v, β and q from: the path x(t) (ode), its derivative (dx_only), or v from the
path and the others from the derivative (cde). `substeps` are the Runge-Kutta steps between two observations.

Irie, Faccio, Schmidhuber 2022 (arXiv 2206.01649).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .base import Own, Rule, States, read
from .sequential import Form, Inputs, Run, apply_form

SOLVERS = ("euler", "exact_hold", "rk4", "rk4_adjoint")
CONTROLS = ("ode", "cde", "dx_only")
WALKED = ("delta_post_tanh", "oja")  # not linear in the state
HELD = ("learning_rule", "time_step", "solver")  # the options that say what one held input does


def own(key_size: int, value_size: int, options: Mapping[str, Any]) -> Own:
    """The raw rate b, how long each token lasts, and the state."""
    return Own(states={"state": (key_size, value_size)}, projections={"b": 1}, optional={"dt": 1})


def check(options: Mapping[str, Any]) -> None:
    """Raise ValueError for options that do not go together."""
    for name, allowed in (("solver", SOLVERS), ("control", CONTROLS)):
        if options[name] not in allowed:
            raise ValueError(
                f"continuous_fwp: {name} is {options[name]!r}; choose from {', '.join(map(repr, allowed))}"
            )
    if options["solver"] == "exact_hold" and options["learning_rule"] not in ("delta", "hebb"):
        raise ValueError(
            f"continuous_fwp: learning_rule {options['learning_rule']!r} has no exact_hold; "
            "take solver 'euler' or 'rk4', or learning_rule 'delta' or 'hebb'"
        )
    if options["substeps"] < 1:
        raise ValueError(f"continuous_fwp: substeps is {options['substeps']}; it must be at least 1")


def looks_ahead(options: Mapping[str, Any]) -> bool:
    """Whether a layer follows a spline, which later observations bend."""
    return options["control"] != "ode" or options["solver"].startswith("rk4")


def held(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options of the operator, whose inputs are constant from token to token."""
    chosen = RULE.resolve_options(options)
    if chosen["solver"].startswith("rk4"):
        raise ValueError(
            f"continuous_fwp: solver {chosen['solver']!r} needs the path between observations, which no operator is "
            "given; take 'euler' or 'exact_hold' here, or a model with this solver"
        )
    return {name: chosen[name] for name in HELD}


def rate(b: Tensor, k: Tensor, dt: Tensor | float, *, solver: str, learning_rule: str) -> Tensor:
    """How much of F / β is added over `dt`, from the raw rate [..., 1] and the key after its softmax."""
    beta = b[..., 0].sigmoid()
    if solver == "euler" or learning_rule == "hebb":
        return dt * beta
    square = k.square().sum(-1)
    return -torch.expm1(-beta * square * dt) / square


def bound(state: Tensor, k: Tensor, v: Tensor, *, learning_rule: str) -> tuple[Tensor, Tensor]:
    """The key after its softmax, and what is bound to it: F / β = key ⊗ value."""
    value = v.tanh()
    if learning_rule == "oja":
        k = k - torch.einsum("bhkv,bhv->bhk", state, value)
    k = k.softmax(-1)
    if learning_rule == "delta_post_tanh":
        value = (v - read(state, k)).tanh()
    elif learning_rule == "delta":
        value = value - read(state, k)
    return k, value


def derivative(state: Tensor, *, k: Tensor, v: Tensor, b: Tensor, learning_rule: str) -> Tensor:
    """F, [B,H,K,V], for k [B,H,K], v [B,H,V] and b [B,H,1], none of them squashed."""
    key, value = bound(state, k, v, learning_rule=learning_rule)
    return (b.sigmoid() * key)[..., :, None] * value[..., None, :]


def step(
    states: States,
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b: Tensor,
    dt: Tensor | None = None,
    learning_rule: str = "delta",
    time_step: float = 1.0,
    solver: str = "euler",
) -> tuple[States, Tensor]:
    """One token: q, k [B,H,K], v [B,H,V], b and dt [B,H,1], none of them squashed."""
    key, value = bound(states["state"], k, v, learning_rule=learning_rule)
    lasting = time_step if dt is None else dt[..., 0]
    written = rate(b, key, lasting, solver=solver, learning_rule=learning_rule)[..., None] * value
    state = states["state"] + key[..., :, None] * written[..., None, :]
    return {"state": state}, read(state, q.softmax(-1))


def fast(run: Run, inputs: Inputs, states: States) -> tuple[Tensor, States]:
    """Hebb's rule and the delta rule chunk by chunk; the others step after step."""
    learning_rule = run.options["learning_rule"]
    if learning_rule in WALKED:
        return run.walk(inputs, states)
    q, k, v = inputs["q"].softmax(-1), inputs["k"].softmax(-1), inputs["v"].tanh()
    lasting = inputs["dt"][..., 0] if "dt" in inputs else run.options["time_step"]
    beta = rate(inputs["b"], k, lasting, solver=run.options["solver"], learning_rule=learning_rule)
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
    apply=partial(apply_form, Form(rule=lambda: RULE, resolve=held, fast=fast, kernel="continuous_fwp")),
    defaults={"scale": 1.0},
    options={"learning_rule": "delta", "time_step": 1.0, "solver": "euler", "control": "ode", "substeps": 1},
    choices={"learning_rule": ("delta", "hebb", "oja", "delta_post_tanh")},
    check=check,
    own=own,
    looks_ahead=looks_ahead,
)
