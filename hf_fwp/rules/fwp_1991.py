"""The first fast weight programmer: a slow network says FROM which unit TO which a connection changes.

    from_t = f(F x_t);   to_t = f(T x_t)
    S_t = squash(S_{t-1} + η · from_t ⊗ to_t)
    y_t = S_tᵀ x_t                                   the fast network reads the input itself

`interface="full"`: S_t = squash(S_{t-1} + η P x_t), one output of the slow network per fast weight. f is `activation`;
squash(a) is a, tanh(a), or with "logistic" 1/(1 + exp(-τ(a - 1/2))), a function with the fixed point 1/2 from which S
then starts (for τ > 4 it is unstable: weights latch near 0 or 1). The logistic's form, τ = 10, η = 1/2 (1 for the full
interface) and the start are choices of this library: the report leaves them open. x [K] is the hidden state split over
the heads. Carried is S - S_0.

Schmidhuber 1991 (FKI-147-91), 1992 (Neural Computation 4(1)).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .base import Own, Rule, States, read
from .sequential import Form, Inputs, Run, apply_form

ACTIVATIONS = {"identity": lambda x: x, "tanh": torch.tanh, "logistic": torch.sigmoid}
STARTS = {"identity": 0.0, "tanh": 0.0, "logistic": 0.5}
RATES = {"from_to": 0.5, "full": 1.0}


def own(key_size: int, value_size: int, options: Mapping[str, Any]) -> Own:
    """FROM and TO, or one output per fast weight."""
    pair = {"f": key_size, "t": value_size}
    return Own(
        states={"state": (key_size, value_size)},
        projections=pair if options["interface"] == "from_to" else {"p": key_size * value_size},
        hidden=True,
    )


def squash(a: Tensor, *, kind: str, tau: float) -> Tensor:
    """What keeps fast weights in a range."""
    return torch.sigmoid(tau * (a - 0.5)) if kind == "logistic" else ACTIVATIONS[kind](a)


def step(
    states: States,
    *,
    x: Tensor,
    f: Any = None,
    t: Any = None,
    p: Tensor | None = None,
    interface: str = "from_to",
    activation: str = "tanh",
    squashing: str = "identity",
    eta: float | None = None,
    tau: float = 10.0,
) -> tuple[States, Tensor]:
    """One token: x, f [B,H,K], t [B,H,V], or x and p [B,H,K*V]."""
    act = ACTIVATIONS[activation]
    change = act(f)[..., :, None] * act(t)[..., None, :] if p is None else p.unflatten(-1, (x.shape[-1], -1))
    begin, rate = STARTS[squashing], RATES[interface] if eta is None else eta
    state_BHKV = squash(begin + states["state"] + rate * change, kind=squashing, tau=tau)
    return {"state": state_BHKV - begin}, read(state_BHKV, x)


def fast(run: Run, inputs: Inputs, states: States) -> tuple[Tensor, States]:
    """The sum rule, chunk by chunk, where nothing is squashed."""
    options = run.options
    if options["squashing"] != "identity" or options["interface"] == "full":
        return run.walk(inputs, states)
    act, eta = ACTIVATIONS[options["activation"]], options["eta"]
    rate = RATES["from_to"] if eta is None else eta
    out, state = run.sum(inputs["x"], act(inputs["f"]), rate * act(inputs["t"]), states["state"])
    return out, {"state": state}


def sizes(inputs: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> tuple[int, int]:
    """K and V, from TO or from one output per fast weight."""
    key_size = inputs["x"].shape[-1]
    return key_size, inputs["p"].shape[-1] // key_size if "p" in inputs else inputs["t"].shape[-1]


RULE = Rule(
    name="fwp_1991",
    title="FROM/TO fast weight programmer",
    equation="S ← squash(S + η·f(Fx) ⊗ f(Tx));  o = Sᵀx",
    source="Schmidhuber 1991, FKI-147-91",
    inputs=(),
    states=("state",),
    step=step,
    apply=partial(apply_form, Form(rule=lambda: RULE, fast=fast, sizes=sizes, kernel="fwp_1991")),
    defaults={"scale": 1.0},
    options={"interface": "from_to", "activation": "tanh", "squashing": "identity", "eta": None, "tau": 10.0},
    choices={
        "interface": ("from_to", "full"),
        "activation": ("tanh", "identity", "logistic"),
        "squashing": ("identity", "tanh", "logistic"),
    },
    qkv=False,
    own=own,
)
