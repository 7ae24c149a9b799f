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
from .sequential import LARGEST, Form, Inputs, Run, apply_form

LN_EPS = 1e-5
LARGEST_KEY = 32  # K³ numbers are on the chip: these fill half of a multiprocessor's registers


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


def lstm(states: States, *, gates: Tensor, W_h: Tensor, b_h: Tensor, **memory: Any) -> tuple[States, Tensor]:
    """One step of the LSTM: gates [B,H,4V], the input's part of the gates' sums."""
    i, f, g, o = (gates + through(W_h, states["h"]) + b_h).chunk(4, dim=-1)
    c_BHV = (f + 1).sigmoid() * states["c"] + i.sigmoid() * g.tanh()
    h_BHV = o.sigmoid() * c_BHV.tanh()
    return {"h": h_BHV, "c": c_BHV}, h_BHV


def programmed(
    z: Tensor, weights: Mapping[str, Tensor], *, write_scale: float | None, tanh_query: bool, **memory: Any
) -> Inputs:
    """What z [..., H, V] writes, s, r, t and their rate, and what it asks, q and all r_i in a row."""
    written, asked = through(weights["W_w"], z) + weights["b_w"], through(weights["W_r"], z) + weights["b_r"]
    key_size = written.shape[-1] // 3
    s, r, t = written[..., :-1].tanh().chunk(3, dim=-1)
    scale = 1 / key_size if write_scale is None else write_scale
    q, r_i = asked[..., :key_size], asked[..., key_size:].tanh()
    beta = scale * (written[..., -1:] + 1).sigmoid()
    return {"s": s, "r": r, "t": t, "beta": beta, "q": q.tanh() if tanh_query else q, "r_i": r_i}


def pair(a: Tensor, b: Tensor) -> Tensor:
    """vec(a bᵀ), index a·K + b."""
    return (a[..., :, None] * b[..., None, :]).flatten(-2)


def remember(
    states: States,
    *,
    s: Tensor,
    r: Tensor,
    t: Tensor,
    beta: Tensor,
    q: Tensor,
    r_i: Tensor,
    clip: bool,
    n_reads: int,
    **programs: Any,
) -> tuple[States, Tensor]:
    """One association written, then the reads: s, r, t, q [B,H,K], beta [B,H,1], r_i [B,H,nK]."""
    key = pair(s, r)
    memory = delta_net.step({"state": states["state"]}, q=key, k=key, v=t, beta=beta[..., 0])[0]["state"]
    if clip:
        # the root of a square is not differentiable at 0, where nothing is clipped
        square = memory.square().sum((-2, -1), keepdim=True)
        memory = memory * torch.where(square > 1, square.clamp_min(1).rsqrt(), 1)
    for second in r_i.unflatten(-1, (n_reads, -1)).unbind(-2):
        q = F.layer_norm(read(memory, pair(q, second)), q.shape[-1:], eps=LN_EPS)
    return {"state": memory}, q


def output(q: Tensor, z: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """o, from the last q and the LSTM's h."""
    return through(weights["W_o"], q) + weights["b_o"] + z


def step(
    states: States,
    *,
    gates: Tensor,
    n_reads: int = 3,
    write_scale: float | None = None,
    tanh_query: bool = False,
    clip: bool = True,
    **weights: Tensor,
) -> tuple[States, Tensor]:
    """One token: gates [B,H,4V], the input's part of the LSTM's gates, and the weights of `own`."""
    cell, z_BHV = lstm(states, gates=gates, **weights)
    given = programmed(z_BHV, weights, write_scale=write_scale, tanh_query=tanh_query)
    memory, q_BHK = remember(states, **given, clip=clip, n_reads=n_reads)
    return {**memory, **cell}, output(q_BHK, z_BHV, weights)


def fast(run: Run, inputs: Inputs, states: States) -> tuple[Tensor, States]:
    """The LSTM, which does not look into the memory, step after step; then the memory."""
    weights = {name: run.weights[name] for name in ("W_h", "b_h")}
    z, cell = run.walk(inputs, {name: states[name] for name in ("h", "c")}, step=lstm, weights=weights, kernel="lstm")
    given = programmed(z, run.weights, **run.options)
    q, memory = run.walk(given, {"state": states["state"]}, step=remember, weights={})
    return output(q, z, run.weights), {**memory, **cell}


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
            rule=lambda: RULE,
            fast=fast,
            sizes=lambda inputs, weights: (weights["W_o"].shape[-2], inputs["gates"].shape[-1] // 4),
            kernel="fast_weight_memory",
            largest=(LARGEST_KEY, LARGEST),
        ),
    ),
    defaults={"scale": 1.0},
    options={"n_reads": 3, "write_scale": None, "tanh_query": False, "clip": True},
    qkv=False,
    parallel="sequential",
    own=own,
)
