"""A delta net whose slow network is a self-referential weight matrix.

    m_t = the read of srwm for x_t                              read before write, four rates
    [q; k; v; b]_t = m_t;   q = softmax(q);   k = softmax(k);   β = sigmoid(b)
    S_t = S_{t-1} + k ⊗ β (v - S_{t-1}ᵀ k);   o_t = S_tᵀ q        read after write

x [K] is the softmax of the hidden state split over the heads (option `input_softmax`). The self-referential matrix is
[K, (2K + V + 1) + 2K + 4]; carried are its shift from the learned start value, and S [K, V]. `query_init` and
`beta_init` are those of srwm.

Irie, Schlag, Csordás, Schmidhuber 2022 (arXiv 2202.05780), the public code for reinforcement learning.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from . import delta_net, srwm
from .base import Own, Rule, States
from .sequential import Form, Inputs, Run, apply_form


def own(key_size: int, value_size: int, options: Mapping[str, Any]) -> Own:
    """The parts of srwm with 2K + V + 1 outputs, and the memory that they program."""
    slow = srwm.own(key_size, 2 * key_size + value_size + 1, options)
    return Own(
        states={"state": (key_size, value_size), "shift": slow.states["state"]},
        weights=slow.weights,
        hidden=True,
    )


def programmed(m: Tensor, key_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and beta of the memory out of the read m [..., 2K + V + 1]."""
    value_size = m.shape[-1] - 2 * key_size - 1
    q, k, v, b = m.split((key_size, key_size, value_size, 1), dim=-1)
    return q.softmax(-1), k.softmax(-1), v, b[..., 0].sigmoid()


def step(states: States, *, x: Tensor, input_softmax: bool = True, **weights: Any) -> tuple[States, Tensor]:
    """One token: x [B,H,K], and the weights of srwm."""
    slow, m = srwm.step({"state": states["shift"]}, x=x, input_softmax=input_softmax, **weights)
    q, k, v, beta = programmed(m, x.shape[-1])
    memory, out = delta_net.step({"state": states["state"]}, q=q, k=k, v=v, beta=beta)
    return {**memory, "shift": slow["state"]}, out


def fast(run: Run, inputs: Inputs, states: States) -> tuple[Tensor, States]:
    """The self-referential matrix step after step, then the memory chunk by chunk."""
    m, slow = srwm.fast(run, inputs, {"state": states["shift"]})
    q, k, v, beta = programmed(m, inputs["x"].shape[-1])
    out, state = run.delta(q, k, v, beta, states["state"])
    return out, {"state": state, "shift": slow["state"]}


def sizes(inputs: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> tuple[int, int]:
    """K, and V out of 2K + V + 1."""
    key_size = inputs["x"].shape[-1]
    return key_size, weights["W_y"].shape[-1] - 2 * key_size - 1


RULE = Rule(
    name="self_modifying_delta",
    title="Self-modifying fast weight programmer",
    equation="[q; k; v; b] = srwm(x);  S ← S + softmax(k) ⊗ sigmoid(b)·(v - Sᵀsoftmax(k));  o = Sᵀsoftmax(q)",
    source="Irie et al. 2022, arXiv 2202.05780",
    inputs=(),
    states=("state", "shift"),
    step=step,
    apply=partial(apply_form, Form(rule=lambda: RULE, fast=fast, sizes=sizes, kernel="srwm")),
    defaults={"scale": 1.0},
    options={"input_softmax": True, "query_init": 1.0, "beta_init": 0.0},
    qkv=False,
    parallel="mixed",
    own=own,
)
