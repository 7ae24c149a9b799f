"""rules/fwp_1991.py on a GPU where the fast weights are squashed.

A token's inputs are x | f | t, or x | p for the full interface, with the activation and the rate applied. The numbers:
the squash, τ, the start, whether the interface is full.
"""

# pyright: reportGeneralTypeIssues=false
# (the bodies of kernels are another language)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..rules.base import States
from ..rules.fwp_1991 import ACTIVATIONS, RATES, STARTS
from . import walk as frame
from .cells import load_tile, load_vector, outer, read, sigmoid, spread, store_tile, store_vector, tanh

SQUASHES = ("identity", "tanh", "logistic")


@triton.jit
def squash(a, KIND: tl.constexpr, TAU: tl.constexpr):
    """What keeps fast weights in a range."""
    if KIND == 1:
        a = tanh(a)
    if KIND == 2:
        a = sigmoid(TAU * (a - 0.5))
    return a


@triton.jit
def squash_back(s, d_s, KIND: tl.constexpr, TAU: tl.constexpr):
    """From the gradient of s = squash(a) to that of a."""
    if KIND == 1:
        d_s *= 1.0 - s * s
    if KIND == 2:
        d_s *= TAU * s * (1.0 - s)
    return d_s


@triton.jit
def load(s, K, V, BK: tl.constexpr, BV: tl.constexpr):
    """S - S_0."""
    return (load_tile(s, K, V, V, BK, BV),)


@triton.jit
def store(s, state, K, V, BK: tl.constexpr, BV: tl.constexpr):
    store_tile(s, state[0], K, V, V, BK, BV)


@triton.jit
def changed(state, x, K, V, BK: tl.constexpr, BV: tl.constexpr, OPT: tl.constexpr):
    """S after the write."""
    if OPT[3] == 1:
        change = load_tile(x + K, K, V, V, BK, BV)
    else:
        change = outer(load_vector(x + K, K, BK), load_vector(x + 2 * K, V, BV))
    return squash(OPT[2] + state + change, OPT[0], OPT[1])


@triton.jit
def step(state, x, w, K, V, BK: tl.constexpr, BV: tl.constexpr, OPT: tl.constexpr):
    matrix = changed(state[0], x, K, V, BK, BV, OPT)
    return (matrix - OPT[2],), read(matrix, load_vector(x, K, BK))


@triton.jit
def back(before, d_state, d_out, x, w, d_x, note, K, V, BK: tl.constexpr, BV: tl.constexpr, OPT: tl.constexpr):
    matrix = changed(before[0], x, K, V, BK, BV, OPT)
    store_vector(d_x, spread(matrix, d_out), K, BK)
    d_matrix = squash_back(matrix, d_state[0] + outer(load_vector(x, K, BK), d_out), OPT[0], OPT[1])
    if OPT[3] == 1:
        store_tile(d_x + K, d_matrix, K, V, V, BK, BV)
    else:
        store_vector(d_x + K, spread(d_matrix, load_vector(x + 2 * K, V, BV)), K, BK)
        store_vector(d_x + 2 * K, read(d_matrix, load_vector(x + K, K, BK)), V, BV)
    return (d_matrix,)


TWIN = frame.Twin(
    load=load,
    store=store,
    step=step,
    back=back,
    tiles=lambda BK, BV: BK * BV,
)


def walk(
    inputs: dict[str, Tensor],
    states: States,
    *,
    weights: dict[str, Tensor],
    mask: Tensor | None,
    interface: str,
    activation: str,
    squashing: str,
    eta: float | None,
    tau: float,
) -> tuple[Tensor, States]:
    """The whole sequence: as rules/walk.py with the rule's step."""
    act, rate = ACTIVATIONS[activation], RATES[interface] if eta is None else eta
    full = interface == "full"
    x = (inputs["x"], rate * inputs["p"]) if full else (inputs["x"], act(inputs["f"]), rate * act(inputs["t"]))
    numbers = SQUASHES.index(squashing), tau, STARTS[squashing], full
    sizes = states["state"].shape[-2], states["state"].shape[-1]
    out, (state,) = frame.walk("fwp_1991", x, (), (states["state"],), sizes=sizes, mask=mask, numbers=numbers)
    return out, {"state": state}
