"""The delta MLP: the fast network is a deep one, whose weight matrices are all written by the delta rule.

    a = q                                                             ψ(x) = (elu(x) + 1) over its sum
    depth times:
        u = ψ(LN(a))
        u = S1ᵀ u  after  S1 = S1 + ψ(k1) ⊗ sigmoid(b1)·(v1 - S1ᵀ ψ(k1))           S1 [K, 4K]
        u = S2ᵀ ψ(u)  after  S2 = S2 + ψ(k2) ⊗ sigmoid(b2)·(v2 - S2ᵀ ψ(k2))        S2 [4K, K]
        a = a + u
    o = a

Keys, values and rates of every block come from the token, so each matrix is linear in its own state and the blocks run
one after the other over the whole sequence. Tensors of the blocks lie side by side: k = [k1; k2] and v = [v1; v2] of
size 5K, b = [b1; b2]. The norm's gain and bias belong to each block and head; K = V.

Irie, Schlag, Csordás, Schmidhuber 2021 (arXiv 2106.06295).
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import delta_net
from .base import Own, Rule, States, Weight, positive_features
from .sequential import Form, Inputs, Run, apply_form

WIDER = 4
LN_EPS = 1e-5


def own(key_size: int, value_size: int, options: Mapping[str, Any]) -> Own:
    """The query, what the two matrices of every block are written with, the norms and the matrices."""
    depth, wide = options["depth"], WIDER * key_size
    return Own(
        states={"state": (depth, key_size, wide), "second_state": (depth, wide, key_size)},
        projections={
            "q": key_size,
            "k": depth * (key_size + wide),
            "v": depth * (wide + key_size),
            "b": depth * 2,
        },
        weights={
            "gain": Weight((depth, key_size), torch.ones),
            "bias": Weight((depth, key_size), torch.zeros),
        },
    )


def blocks(
    delta: Callable[..., tuple[Tensor, Tensor]],
    states: States,
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b: Tensor,
    gain: Tensor,
    bias: Tensor,
) -> tuple[States, Tensor]:
    """All blocks, with `delta` for one token [B, H, ...] or for the whole sequence [B, T, H, ...]."""
    a, size, depth, first, second = q, q.shape[-1], gain.shape[1], [], []
    k, v, b = (x.unflatten(-1, (depth, -1)) for x in (k, v, b.sigmoid()))
    for j in range(depth):
        k1, k2 = k[..., j, :].split((size, WIDER * size), dim=-1)
        v1, v2 = v[..., j, :].split((WIDER * size, size), dim=-1)
        u = positive_features(F.layer_norm(a, (size,), eps=LN_EPS) * gain[:, j] + bias[:, j])
        u, s1 = delta(u, positive_features(k1), v1, b[..., j, 0], states["state"][:, :, j])
        u, s2 = delta(positive_features(u), positive_features(k2), v2, b[..., j, 1], states["second_state"][:, :, j])
        a = a + u
        first.append(s1)
        second.append(s2)
    return {"state": torch.stack(first, dim=2), "second_state": torch.stack(second, dim=2)}, a


def delta_once(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token of the delta rule."""
    states, out = delta_net.step({"state": state}, q=q, k=k, v=v, beta=beta)
    return out, states["state"]


def step(
    states: States, *, q: Tensor, k: Tensor, v: Tensor, b: Tensor, gain: Tensor, bias: Tensor, depth: int = 1
) -> tuple[States, Tensor]:
    """One token: q [B,H,K], k, v [B,H,depth*5K], b [B,H,depth*2]."""
    return blocks(delta_once, states, q=q, k=k, v=v, b=b, gain=gain, bias=bias)


def fast(run: Run, inputs: Inputs, states: States) -> tuple[Tensor, States]:
    """Block after block over the whole sequence, each matrix chunk by chunk."""
    final, out = blocks(run.delta, states, **inputs, **run.weights)
    return out, final


RULE = Rule(
    name="delta_mlp",
    title="Delta MLP",
    equation="S1 ← S1 + k1 ⊗ β1(v1 - S1ᵀk1);  S2 ← S2 + k2 ⊗ β2(v2 - S2ᵀk2);  o = q + S2ᵀψ(S1ᵀψ(LN(q)))",
    source="Irie et al. 2021, arXiv 2106.06295",
    inputs=(),
    states=("state", "second_state"),
    step=step,
    apply=partial(
        apply_form,
        Form(
            rule=lambda: RULE,
            fast=fast,
            sizes=lambda inputs, weights: (inputs["q"].shape[-1], inputs["q"].shape[-1]),
            kernel="linear_class",
        ),
    ),
    defaults={"scale": 1.0},
    options={"depth": 1},
    choices={"depth": (1, 2, 3, 4)},
    qkv=False,
    square=True,
    own=own,
)
