"""What an update rule is.

A fast weight programmer keeps a matrix S per head and changes it at every token. A rule says how:

    S_t, o_t = step(S_{t-1}; q_t, k_t, v_t, ...)

`step` is the definition. `recurrence` loops over it and is what every faster form is tested against.

Shape legend (suffixes of tensor names everywhere in hf_fwp):
    B batch     T time      H key heads     K key size      V value size    N sequences (B, or those packed in one row)
    HV, G value heads, a multiple of H; every value head has a state of its own         C chunk length
    HQ query heads: H, or R per value head (R queries then read one state)
A state is [N, HV, K, V]; it is written S + k ⊗ v, that is S[i, j] += k[i] v[j], and read o = Sᵀ q.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SUM_EPS = 1e-5

States = dict[str, Tensor]

# What one token brings, in the letters of the legend; a rule's own `shapes` come on top.
INPUT_SHAPES: dict[str, tuple[str, ...]] = {
    "q": ("HQ", "K"),
    "k": ("H", "K"),
    "v": ("HV", "V"),
    "beta": ("HV",),
    "g": ("HV",),
}
STATE_SHAPES: dict[str, tuple[str, ...]] = {"state": ("HV", "K", "V"), "norm_state": ("H", "K")}

BACKENDS = ("reference", "torch", "triton", "step")

# The layer around most rules since Yang et al. 2024: convolution and SiLU, unit keys, normalised and gated reads.
MODERN_SHELL: dict[str, Any] = {
    "feature_map": "silu",
    "qk_norm": "l2",
    "conv_size": 4,
    "beta_bias": False,
    "output_gate": "silu",
    "output_norm": True,
    "output_scale": 1.0,
    "scale": None,
    "expand_v": 1.0,
    "allow_neg_eigval": False,
}


@dataclass(frozen=True)
class Weight:
    """A learned tensor that every state has: its shape, and what draws the values it starts from."""

    shape: tuple[int, ...]
    draw: Callable[..., Tensor]
    """draw(*shape) -> Tensor"""


@dataclass(frozen=True)
class Own:
    """What a rule has beside queries, keys, values and rates, for one state of given sizes."""

    states: Mapping[str, tuple[int, ...]]
    """Shapes of the carried tensors, without [N, HV]. Zeros are a fresh start."""
    projections: Mapping[str, int] = field(default_factory=dict)
    """Per-token inputs made from the hidden state by a Linear: their names and widths."""
    weights: Mapping[str, Weight] = field(default_factory=dict)
    """Learned tensors of each state."""
    hidden: bool = False
    """Whether the rule reads the hidden state itself, split over the heads, as its input `x`."""
    optional: Mapping[str, int] = field(default_factory=dict)
    """Per-token inputs that may be given beside these, `dt` for instance: their names and widths."""


@dataclass(frozen=True)
class Rule:
    """One update rule: its mathematics and what a layer must know to use it."""

    name: str
    title: str
    equation: str
    source: str
    inputs: tuple[str, ...]
    """Per-token inputs beside q, k and v, in the order of the operator's arguments."""
    states: tuple[str, ...]
    """Names of the tensors carried from token to token when every option has its default."""
    step: Callable[..., tuple[States, Tensor]]
    """step(states, *, q, k, v, ..., scale, **options): one token, nothing modified."""
    apply: Callable[..., tuple[Tensor, States]]
    """apply(q, k, v, *, beta, g, states, mask, cu_seqlens, scale, backend, options, qk_l2norm, in_place, ran) ->
    (out, states): any number of tokens. The given states stay as they are, unless `in_place` is set, T = 1 and no
    gradient is recorded: the decode step."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Defaults of the mixer's fields (feature map, convolution, gate, ...) for this rule."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What `rule_options` may contain, with the defaults."""
    shapes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Shapes of a token's inputs where they differ from INPUT_SHAPES, and of states beside S. The name of an option
    stands for its value."""
    optional: Mapping[str, str] = field(default_factory=dict)
    """Inputs that are taken only while an option is set: input -> option."""
    gates: Callable[..., Any] | None = None
    """gates(hidden, states=, key_size=, value_size=, options=): a `Gates` module that computes the inputs the layer
    has no projection for."""
    choices: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """What an option that is neither a number nor a flag may be."""
    raw_gates: bool = False
    """Whether `apply` takes beta and g that are not computed yet (gating.Rate, gating.Decay)."""
    check: Callable[[Mapping[str, Any]], None] | None = None
    """Raises ValueError for options that the rule cannot run with."""
    writes: str = ""
    """The option that says how many keys, values and rates a token brings (k [B,T,H,n,K]); "" = always one."""
    qkv: bool = True
    """Whether the rule takes the q, k and v that a layer projects, convolves, rotates and maps to features."""
    square: bool = False
    """Whether K must equal V."""
    parallel: str = "chunked"
    """How a sequence is computed when every option has its default: "chunked" (all tokens of a chunk at once), "mixed"
    (what is linear in its state chunked, the rest token after token), "sequential" (token after token)."""
    backends: tuple[str, ...] = BACKENDS
    """What `backend` may be: without "triton" where no kernel serves the rule."""
    own: Callable[[int, int, Mapping[str, Any]], Own] | None = None
    """own(K, V, options): what the rule has beside q, k, v, beta and g. Such a rule reads one query per state."""
    looks_ahead: Callable[[Mapping[str, Any]], bool] | None = None
    """Whether a layer with these options reads later tokens too: it cannot predict them, and has no cache."""

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied or pickled rule is the entry of RULES itself: functions of its own cannot be pickled."""
        return _entry, (self.name,)

    def resolve_options(self, given: Mapping[str, Any] | None) -> dict[str, Any]:
        """The rule's options with `given` on top; a name that the rule does not know is an error."""
        given = dict(given or {})
        unknown = sorted(set(given) - set(self.options))
        if unknown:
            allowed = ", ".join(self.options) or "none"
            raise ValueError(f"unknown option {unknown[0]!r} for the rule {self.name}; its options are: {allowed}")
        chosen = {**self.options, **given}
        for name, allowed in self.choices.items():
            if chosen[name] not in allowed:
                raise ValueError(
                    f"{self.name}: {name} is {chosen[name]!r}; choose from {', '.join(map(repr, allowed))}"
                )
        if self.check is not None:
            self.check(chosen)
        return chosen

    def inputs_with(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """The inputs beside q, k and v that the rule takes with these options."""
        return tuple(name for name in self.inputs if options.get(self.optional.get(name, ""), True))

    def state_size(self, key_size: int, value_size: int) -> int:
        """How many numbers one head carries from token to token when every option has its default."""
        if self.own is not None:
            return sum(math.prod(shape) for shape in self.own(key_size, value_size, self.options).states.values())
        sizes = {"H": 1, "HV": 1, "K": key_size, "V": value_size}
        shapes = {**STATE_SHAPES, **self.shapes}
        return sum(math.prod(sizes[letter] for letter in shapes[name]) for name in self.states)

    def shape(self, name: str) -> tuple[str, ...]:
        """The shape of a token's input in letters."""
        return self.shapes.get(name, INPUT_SHAPES.get(name, ()))


def _entry(name: str) -> Rule:
    from . import RULES

    return RULES[name]


class Gates(nn.Module):
    """The slow projections that belong to one rule: forward(x [B,T,D]) gives its inputs by name.

    Parameters that belong to states have them as their first dimension, in the layer's order; those whose name ends
    in `_down.weight` are shared by all states.
    """

    gives: tuple[str, ...] = ()

    def of(self, x_BTD: Tensor) -> dict[str, Any]:
        """What forward gives for the rule. It gives parameters besides, for those who spread these over processes:
        DeepSpeed keeps whole what a module's output names, after its forward too."""
        return {name: gate for name, gate in self(x_BTD).items() if name in self.gives}

    def initial(self) -> dict[str, Tensor]:
        """The values that parameters start from, where a plain Linear's are not meant."""
        return {}


def recurrence(
    step: Callable[..., tuple[States, Tensor]],
    inputs: Mapping[str, Tensor],
    states: States,
    *,
    mask: Tensor | None = None,
    **constants: Any,
) -> tuple[Tensor, States]:
    """Run `step` over dimension 1 of every input. A position whose mask is 0 changes no state and reads 0."""
    if mask is not None:
        # A NaN at a masked position would still reach the gradients of its neighbours as 0 * NaN.
        inputs = {name: keep_valid(x, mask) for name, x in inputs.items()}
    outs = []
    length = inputs["q"].shape[1]
    for t in range(length):
        new_states, out = step(states, **{name: x[:, t] for name, x in inputs.items()}, **constants)
        if mask is not None:
            new_states = {name: keep_valid(s, mask[:, t], states[name]) for name, s in new_states.items()}
            out = keep_valid(out, mask[:, t])
        states = new_states
        outs.append(out)
    if length == 0:  # an empty sequence among packed ones
        return inputs["v"].new_zeros(*inputs["q"].shape[:-1], inputs["v"].shape[-1]), states
    return torch.stack(outs, dim=1), states


def keep_valid(x: Tensor, mask: Tensor, other: Tensor | None = None) -> Tensor:
    """x where the mask (its leading dimensions) is set, elsewhere `other` or 0. Never a product: x may be NaN there."""
    valid = mask.view(*mask.shape, *(1,) * (x.ndim - mask.ndim)).bool()
    return torch.where(valid, x, x.new_zeros(()) if other is None else other)


def normal(std: float, mean: float = 0.0) -> Callable[..., Tensor]:
    """Draws from the normal distribution."""
    return lambda *shape: mean + std * torch.randn(*shape)


def read(state_BHKV: Tensor, q_BHxK: Tensor) -> Tensor:
    """Sᵀ q for one query per head [B, H, K] or several [B, H, R, K]."""
    return torch.einsum("bhkv,bh...k->bh...v", state_BHKV, q_BHxK)


def positive_features(x: Tensor) -> Tensor:
    """ELU(x) + 1 over its sum, for the rules that map features themselves."""
    positive = F.elu(x) + 1
    return positive / (positive.sum(-1, keepdim=True) + SUM_EPS)


def through(weight_HIO: Tensor, x_xHI: Tensor) -> Tensor:
    """Wᵀ x, with a matrix for each head, for one token or all of a sequence."""
    return torch.einsum("hio,...hi->...ho", weight_HIO, x_xHI)
