"""The self-referential weight matrix: one matrix that reads its input, and queries, keys and rates for changing itself.

    [y; a_q; a_k; a_β]_t = W_{t-1}ᵀ x_t                       read before write; o_t = y_t
    q = softmax(a_q);   k = softmax(a_k);   β = sigmoid(a_β)    β has four rates, for the columns y | q | k | β
    W_t = W_{t-1} + k ⊗ B * (W_{t-1}ᵀ q - W_{t-1}ᵀ k)           B repeats each rate over its block of columns

x [K] is the hidden state split over the heads, or its softmax (option `input_softmax`). W [K, V + 2K + 4] starts from
the learned W_0 = [W_y | W_q | W_k | W_b], which is trained as a start value only; carried is the shift W_t - W_0.
W_0 starts from N(0, 1/K); `query_init` multiplies its q block (0.01 for formal languages), `beta_init` is the mean of
its β block (-1 for formal languages).

Irie, Schlag, Csordás, Schmidhuber 2022 (arXiv 2202.05780).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .base import Own, Rule, States, Weight, normal, read, through
from .sequential import Form, Inputs, Run, apply_form

RATES = 4
WEIGHTS = ("W_y", "W_q", "W_k", "W_b")


def own(key_size: int, value_size: int, options: Mapping[str, Any]) -> Own:
    """The start value block by block, and the shift from it."""
    std = key_size**-0.5
    return Own(
        states={"state": (key_size, value_size + 2 * key_size + RATES)},
        weights={
            "W_y": Weight((key_size, value_size), normal(std)),
            "W_q": Weight((key_size, key_size), normal(std * options["query_init"])),
            "W_k": Weight((key_size, key_size), normal(std)),
            "W_b": Weight((key_size, RATES), normal(std, options["beta_init"])),
        },
        hidden=True,
    )


def start(weights: Mapping[str, Tensor]) -> Tensor:
    """W_0 [H, K, V + 2K + 4]."""
    return torch.cat([weights[name] for name in WEIGHTS], dim=-1)


def shifted_step(
    states: States, *, x: Tensor, W_0: Tensor, input_softmax: bool = False, **init: float
) -> tuple[States, Tensor]:
    """One token with the start value in one piece."""
    shift, key_size = states["state"], x.shape[-1]
    x = x.softmax(-1) if input_softmax else x
    value_size = W_0.shape[-1] - 2 * key_size - RATES
    blocks = (value_size, key_size, key_size, RATES)
    y, a_q, a_k, a_b = (through(W_0, x) + read(shift, x)).split(blocks, dim=-1)
    k = a_k.softmax(-1)
    change = a_q.softmax(-1) - k  # Wᵀq - Wᵀk = Wᵀ(q - k)
    rates = [b[..., None].expand(*b.shape, n) for b, n in zip(a_b.sigmoid().unbind(-1), blocks, strict=True)]
    written = torch.cat(rates, dim=-1) * (through(W_0, change) + read(shift, change))
    return {"state": shift + k[..., :, None] * written[..., None, :]}, y


def step(
    states: States, *, x: Tensor, W_y: Tensor, W_q: Tensor, W_k: Tensor, W_b: Tensor, **options: Any
) -> tuple[States, Tensor]:
    """One token: x [B,H,K], the start value W_y [H,K,V], W_q, W_k [H,K,K], W_b [H,K,4]."""
    return shifted_step(states, x=x, W_0=torch.cat([W_y, W_q, W_k, W_b], dim=-1), **options)


def fast(run: Run, inputs: Inputs, states: States) -> tuple[Tensor, States]:
    """One step after the other, with W_0 put together once."""
    return run.walk(inputs, states, step=shifted_step, weights={"W_0": start(run.weights)})


RULE = Rule(
    name="srwm",
    title="Self-referential weight matrix",
    equation="[y; q; k; β] = Wᵀx;  W ← W + softmax(k) ⊗ sigmoid(β)·Wᵀ(softmax(q) - softmax(k));  o = y",
    source="Irie et al. 2022, arXiv 2202.05780",
    inputs=(),
    states=("state",),
    step=step,
    apply=partial(
        apply_form,
        Form(
            rule=lambda: RULE,
            fast=fast,
            sizes=lambda inputs, weights: (inputs["x"].shape[-1], weights["W_y"].shape[-1]),
            kernel="srwm",
        ),
    ),
    defaults={"scale": 1.0},
    options={"input_softmax": False, "query_init": 1.0, "beta_init": 0.0},
    qkv=False,
    parallel="sequential",
    own=own,
)
