"""The delta-delta net: a delta net that programs a second one.

    q1 = ψ(q);   k1 = ψ(k);   β1 = sigmoid(b)                      ψ(x) = (elu(x) + 1) over its sum
    S1 = S1 + k1 ⊗ β1 (v - S1ᵀ k1);   m = S1ᵀ q1                   v, m [2K + V + 1]
    [q2; k2; v2; b2] = m;   q2 = ψ(q2);   k2 = ψ(k2);   β2 = sigmoid(b2)
    S2 = S2 + k2 ⊗ β2 (v2 - S2ᵀ k2);  o = S2ᵀ q2

With `learned_base` S1 starts from a learned B, at first uniform in [1, 2). Carried is then S1 - B, to which the same
rule applies with the value v - Bᵀ k1; it reads m - Bᵀ q1.

Irie, Schlag, Csordás, Schmidhuber 2021 (arXiv 2106.06295).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import delta_net
from .base import Own, Rule, States, Weight, positive_features
from .sequential import Form, Inputs, Run, apply_form


def own(key_size: int, value_size: int, options: Mapping[str, Any]) -> Own:
    """Queries, keys, values and raw rates of the first matrix, and both matrices."""
    inner = 2 * key_size + value_size + 1
    base = {"base": Weight((key_size, inner), lambda *shape: 1 + torch.rand(*shape))}
    return Own(
        states={"state": (key_size, value_size), "first_state": (key_size, inner)},
        projections={"q": key_size, "k": key_size, "v": inner, "b": 1},
        weights=base if options["learned_base"] else {},
    )


def programmed(m: Tensor, key_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and beta of the second matrix out of the read m [..., 2K + V + 1]."""
    value_size = m.shape[-1] - 2 * key_size - 1
    q, k, v, b = m.split((key_size, key_size, value_size, 1), dim=-1)
    return positive_features(q), positive_features(k), v, b[..., 0].sigmoid()


def from_base(base: Tensor | None, x: Tensor) -> Tensor | float:
    """Bᵀ x of every head, or 0 without B; x [..., H, K]."""
    return 0.0 if base is None else torch.einsum("hio,...hi->...ho", base, x)


def step(
    states: States,
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b: Tensor,
    base: Tensor | None = None,
    learned_base: bool = False,
) -> tuple[States, Tensor]:
    """One token: q, k [B,H,K], v [B,H,2K+V+1], b [B,H,1]."""
    q, k = positive_features(q), positive_features(k)
    value = v - from_base(base, k)
    first, m = delta_net.step({"state": states["first_state"]}, q=q, k=k, v=value, beta=b[..., 0].sigmoid())
    q2, k2, v2, beta2 = programmed(m + from_base(base, q), q.shape[-1])
    second, out = delta_net.step({"state": states["state"]}, q=q2, k=k2, v=v2, beta=beta2)
    return {**second, "first_state": first["state"]}, out


def fast(run: Run, inputs: Inputs, states: States) -> tuple[Tensor, States]:
    """Two passes, chunk by chunk."""
    q, k, base = positive_features(inputs["q"]), positive_features(inputs["k"]), run.weights.get("base")
    value = inputs["v"] - from_base(base, k)
    m, first = run.delta(q, k, value, inputs["b"][..., 0].sigmoid(), states["first_state"])
    q2, k2, v2, beta2 = programmed(m + from_base(base, q), q.shape[-1])
    out, second = run.delta(q2, k2, v2, beta2, states["state"])
    return out, {"state": second, "first_state": first}


def sizes(inputs: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> tuple[int, int]:
    """K, and V out of 2K + V + 1."""
    key_size = inputs["k"].shape[-1]
    return key_size, inputs["v"].shape[-1] - 2 * key_size - 1


RULE = Rule(
    name="delta_delta",
    title="Delta-delta net",
    equation="S1 ← S1 + k ⊗ β(v - S1ᵀk);  [q2; k2; v2; β2] = S1ᵀq;  S2 ← S2 + k2 ⊗ β2(v2 - S2ᵀk2);  o = S2ᵀq2",
    source="Irie et al. 2021, arXiv 2106.06295",
    inputs=(),
    states=("state", "first_state"),
    step=step,
    apply=partial(apply_form, Form(rule=lambda: RULE, fast=fast, sizes=sizes, kernel="linear_class")),
    defaults={"scale": 1.0},
    options={"learned_base": False},
    qkv=False,
    own=own,
)
