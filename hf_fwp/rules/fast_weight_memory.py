"""Fast weight memory: an LSTM writes associations of two keys, and reads them in several steps.

    z_t = LSTM(x_t)                                             gates i, f, g, o; 1 is added to the forget gate's sum
    [s; r; t; b] = W_wᵀ z + b_w;   s, r, t = tanh(·);   β = sigmoid(b + 1);   κ = vec(s rᵀ), index s·K + r
    F = F + κ ⊗ c β (t - Fᵀ κ);   F = F / max(1, ‖F‖)            Frobenius; option `clip`
    [q; r_1; ...; r_n] = W_rᵀ z + b_r;   n times:  q = LN(Fᵀ vec(q tanh(r_i)ᵀ))     LN without gain and bias
    o = W_oᵀ q + b_o + z

The hidden size of the LSTM is V, the sizes of s, r, t and q are K: F is [K², K]. `write_scale` is c, 1/K when it is
None (1 in the code for language models, where q is squashed too: `tanh_query`); `n_reads` is n. The LSTM's input
projection is the rule's own input x; every head has an LSTM and a memory. Carried are F, h = z and c.

Schlag, Munkhdalai, Schmidhuber 2020 (arXiv 2011.07831).
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import delta_net
from .base import Own, Rule, States, Weight, read, through
from .sequential import Form, apply_form

LN_EPS = 1e-5


def uniform(bound: float) -> Callable[..., Tensor]:
    """Draws from U(-bound, bound)."""
    return lambda *shape: bound * (2 * torch.rand(*shape) - 1)


def own(key_size: int, value_size: int, options: Mapping[str, Any]) -> Own:
    """The LSTM, what it writes and reads with, and the memory."""
    write, look = 3 * key_size + 1, (1 + options["n_reads"]) * key_size
    to_memory = uniform((6 / (value_size + key_size)) ** 0.5)
    return Own(
        states={"state": (key_size**2, key_size), "h": (value_size,), "c": (value_size,)},
        projections={"gates": 4 * value_size},
        weights={
            "W_h": Weight((value_size, 4 * value_size), uniform(value_size**-0.5)),
            "b_h": Weight((4 * value_size,), torch.zeros),
            "W_w": Weight((value_size, write), to_memory),
            "b_w": Weight((write,), torch.zeros),
            "W_r": Weight((value_size, look), to_memory),
            "b_r": Weight((look,), torch.zeros),
            "W_o": Weight((key_size, value_size), uniform(key_size**-0.5)),
            "b_o": Weight((value_size,), torch.zeros),
        },
    )


def lstm(states: States, gates: Tensor) -> States:
    """One step of an LSTM whose gate sums are given."""
    i, f, g, o = gates.chunk(4, dim=-1)
    c_BHV = (f + 1).sigmoid() * states["c"] + i.sigmoid() * g.tanh()
    return {"h": o.sigmoid() * c_BHV.tanh(), "c": c_BHV}


def pair(a: Tensor, b: Tensor) -> Tensor:
    """vec(a bᵀ), index a·K + b."""
    return (a[..., :, None] * b[..., None, :]).flatten(-2)


def write(memory: Tensor, written: Tensor, *, key_size: int, write_scale: float | None, clip: bool) -> Tensor:
    """The memory after one association, [s; r; t; b] = written."""
    s, r, t, b = written.split((key_size, key_size, key_size, 1), dim=-1)
    scale = 1 / key_size if write_scale is None else write_scale
    beta = scale * (b[..., 0] + 1).sigmoid()
    key = pair(s.tanh(), r.tanh())
    memory = delta_net.step({"state": memory}, q=key, k=key, v=t.tanh(), beta=beta)[0]["state"]
    if not clip:
        return memory
    # the root of a square is not differentiable at 0, where nothing is clipped
    square = memory.square().sum((-2, -1), keepdim=True)
    return memory * torch.where(square > 1, square.clamp_min(1).rsqrt(), 1)


def look_up(memory: Tensor, asked: Tensor, *, key_size: int, tanh_query: bool) -> Tensor:
    """What the memory answers after several steps, [q; r_1; ...; r_n] = asked."""
    q, *keys = asked.split(key_size, dim=-1)
    q = q.tanh() if tanh_query else q
    for r in keys:
        q = F.layer_norm(read(memory, pair(q, r.tanh())), (key_size,), eps=LN_EPS)
    return q


def step(
    states: States,
    *,
    gates: Tensor,
    W_h: Tensor,
    b_h: Tensor,
    W_w: Tensor,
    b_w: Tensor,
    W_r: Tensor,
    b_r: Tensor,
    W_o: Tensor,
    b_o: Tensor,
    n_reads: int = 3,
    write_scale: float | None = None,
    tanh_query: bool = False,
    clip: bool = True,
) -> tuple[States, Tensor]:
    """One token: gates [B,H,4V], the input's part of the LSTM's gates."""
    key_size = states["state"].shape[-1]
    cell = lstm(states, gates + through(W_h, states["h"]) + b_h)
    z_BHV = cell["h"]
    written = through(W_w, z_BHV) + b_w
    memory = write(states["state"], written, key_size=key_size, write_scale=write_scale, clip=clip)
    q_BHK = look_up(memory, through(W_r, z_BHV) + b_r, key_size=key_size, tanh_query=tanh_query)
    return {"state": memory, **cell}, through(W_o, q_BHK) + b_o + z_BHV


RULE = Rule(
    name="fast_weight_memory",
    title="Fast weight memory",
    equation="z = LSTM(x);  F ← F + κ ⊗ cβ(t - Fᵀκ), κ = vec(s rᵀ);  F ← F / max(1, ‖F‖);  "
    "q ← LN(Fᵀvec(q r_iᵀ));  o = Wq + z",
    source="Schlag et al. 2020, arXiv 2011.07831",
    inputs=(),
    states=("state", "h", "c"),
    step=step,
    apply=partial(
        apply_form,
        Form(
            name="fast_weight_memory",
            step=step,
            own=own,
            resolve=lambda options: RULE.resolve_options(options),
            sizes=lambda inputs, weights: (weights["W_o"].shape[-2], inputs["gates"].shape[-1] // 4),
        ),
    ),
    defaults={"scale": 1.0},
    options={"n_reads": 3, "write_scale": None, "tanh_query": False, "clip": True},
    qkv=False,
    parallel="sequential",
    own=own,
)
