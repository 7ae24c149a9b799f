"""Fast weights as a memory of the recent past of a recurrent network.

    A_t = λ A_{t-1} + η h_{t-1} ⊗ h_{t-1}
    b_t = W_hᵀ h_{t-1} + c_t                         c_t = C x_t, a projection of the hidden state
    h = f(b_t);   n_steps times:  h = f(LN(b_t + A_tᵀ h));   h_t = o_t = h

A [V, V] and h [V] belong to each head (one head is the published network); LN has a learned gain and bias. λ = 0.95,
η = 0.5, one inner step, f = relu and W_h = 0.05 I at the start are choices of this library.

Ba, Hinton, Mnih, Leibo, Ionescu 2016 (arXiv 1610.06258).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import Own, Rule, States, Weight, read, through
from .sequential import Form, apply_form

ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh}
LN_EPS = 1e-5


def scaled_identity(*shape: int) -> Tensor:
    """0.05 I for every head."""
    return (0.05 * torch.eye(shape[-1])).expand(*shape)


def own(key_size: int, value_size: int, options: Mapping[str, Any]) -> Own:
    """The projection c, the slow recurrent weights and the norm, the fast weights and the units."""
    return Own(
        states={"state": (value_size, value_size), "h": (value_size,)},
        projections={"c": value_size},
        weights={
            "W_h": Weight((value_size, value_size), scaled_identity),
            "gain": Weight((value_size,), torch.ones),
            "bias": Weight((value_size,), torch.zeros),
        },
    )


def step(
    states: States,
    *,
    c: Tensor,
    W_h: Tensor,
    gain: Tensor,
    bias: Tensor,
    decay: float = 0.95,
    eta: float = 0.5,
    n_steps: int = 1,
    activation: str = "relu",
) -> tuple[States, Tensor]:
    """One token: c [B,H,V]."""
    h_BHV, act = states["h"], ACTIVATIONS[activation]
    state_BHVV = decay * states["state"] + eta * h_BHV[..., :, None] * h_BHV[..., None, :]
    base = through(W_h, h_BHV) + c
    h_BHV = act(base)
    for _ in range(n_steps):
        h_BHV = act(F.layer_norm(base + read(state_BHVV, h_BHV), gain.shape[-1:], eps=LN_EPS) * gain + bias)
    return {"state": state_BHVV, "h": h_BHV}, h_BHV


RULE = Rule(
    name="ba_fast_weights",
    title="Fast weights to attend to the recent past",
    equation="A ← λA + η·h ⊗ h;  b = W_hᵀh + Cx;  h ← f(b), then f(LN(b + Aᵀh));  o = h",
    source="Ba et al. 2016, arXiv 1610.06258",
    inputs=(),
    states=("state", "h"),
    step=step,
    apply=partial(
        apply_form,
        Form(
            rule=lambda: RULE,
            sizes=lambda inputs, weights: (inputs["c"].shape[-1], inputs["c"].shape[-1]),
            kernel="ba_fast_weights",
        ),
    ),
    defaults={"scale": 1.0},
    options={"decay": 0.95, "eta": 0.5, "n_steps": 1, "activation": "relu"},
    choices={"activation": ("relu", "tanh")},
    qkv=False,
    parallel="sequential",
    own=own,
)
