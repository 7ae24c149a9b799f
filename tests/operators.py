"""Random problems for the update rules, and the one comparison that every test of an operator uses."""

import itertools
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager

from hf_fwp.rules import RULES, Rule
from hf_fwp.rules.base import Own
from hf_fwp.rules.gating import Decay, Rate

# Relative error ‖a - b‖ / ‖b‖ against the float64 recurrence on the same (rounded) inputs.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
CHOICES: dict[str, tuple[Any, ...]] = {
    "rule": tuple(RULES),
    "dtype": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    "length": (1, 63, 64, 65, 130),
    "initial": (False, True),
    "layout": ("plain", "padded", "packed"),
    "sizes": ((8, 8), (5, 7), (16, 3)),
    "heads": ((2, 2, 2), (2, 4, 2), (2, 4, 4), (1, 3, 6), (2, 2, 4)),
    "qk_l2norm": (False, True),
    "option": (0, 1, 2),
}
HALF = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ["reference", "torch"]
SERVED = ("linear_attention", "delta_net", "gated_delta_net")  # the rules that have Triton kernels
SERVED_BY_CHANNEL = ("kimi_delta", "gated_delta_net_2", "comba", "precond_delta", "oja", "gated_oja")
# the options with which a sequential rule has something to walk through, where it is not the first
WALKS_WITH = {"fwp_1991": 1, "continuous_fwp": 2}
# As they are these are chaotic: after 20 tokens (srwm: 300) rounding has grown a thousandfold, in the recurrence too,
# and which of two errors is the larger is chance.
STEADY = {"fwp_1991": {"tau": 4.0}, "fwp_1993": {"eta": 0.02, "tau": 4.0}, "srwm": {}}
unit = torch.nn.functional.normalize
GPU = "cuda"  # where the tests in tests/gpu compute


def random_inputs(
    length: int = 70, heads: int = 2, size: int = 6, batch: int = 2
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k of length 1, v, beta and g in float64."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(batch, length, heads, size, dtype=torch.float64) for _ in range(3))
    beta, g = (torch.rand(batch, length, heads, dtype=torch.float64) for _ in range(2))
    return q, unit(k, dim=-1), v, beta, -g


def in_one_graph(function: Callable[..., Any]) -> tuple[Callable[..., Any], list[Any]]:
    """The function compiled without graph breaks, and the graphs that are made of it."""
    graphs = []

    def remember(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend=remember), graphs


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@dataclass(frozen=True)
class Problem:
    rule: str
    dtype: torch.dtype = torch.float64
    length: int = 65
    initial: bool = True
    layout: str = "plain"
    sizes: tuple[int, int] = (5, 7)  # K, V
    heads: tuple[int, int, int] = (2, 4, 4)  # H, HV, HQ
    qk_l2norm: bool = False
    option: int = 0  # the number of every option's value, for booleans and for those with a list of choices
    seed: int = 0

    def __str__(self) -> str:
        parts = (self.rule, str(self.dtype)[6:], self.length, self.layout, *self.sizes, *self.heads)
        flags = [n for n in ("initial", "qk_l2norm", "option") if getattr(self, n)]
        return "-".join(map(str, (*parts, *flags)))


@dataclass
class Tensors:
    """The arguments of `Rule.apply`: leaves that can be differentiated, and the rest, a rule's own weights with it."""

    leaves: dict[str, Tensor]
    states: dict[str, Tensor]
    keywords: dict[str, Any] = field(default_factory=dict)

    @property
    def weights(self) -> dict[str, Tensor]:
        return self.keywords.get("weights", {})

    def copy(self, dtype: torch.dtype) -> "Tensors":
        """Fresh leaves in `dtype`; states in float32, or float64 for float64."""
        wide = dtype if dtype == torch.float64 else torch.float32
        leaves = {n: x.detach().to(dtype, copy=True).requires_grad_() for n, x in self.leaves.items()}
        weights = {n: x.detach().to(dtype, copy=True).requires_grad_() for n, x in self.weights.items()}
        keywords = self.keywords | ({"weights": weights} if weights else {})
        states = {n: x.detach().to(wide, copy=True).requires_grad_() for n, x in self.states.items()}
        return Tensors(leaves, states, keywords)


def pairwise(choices: dict[str, tuple[Any, ...]], seed: int = 0) -> list[dict[str, Any]]:
    """Combinations in which every two values of two different choices meet at least once."""
    names = list(choices)
    missing = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in choices[a] for y in choices[b]}
    draw, found = random.Random(seed), []
    while missing:
        start = dict(min(missing, key=str))
        tries = [{n: start.get(n, draw.choice(choices[n])) for n in names} for _ in range(60)]
        best = max(tries, key=lambda row: len(pairs(row) & missing))
        missing -= pairs(best)
        found.append(best)
    return found


def pairs(row: dict[str, Any]) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    return set(itertools.combinations(row.items(), 2))


def covering_problems() -> list[Problem]:
    return [Problem(**row) for row in pairwise(CHOICES)]


def tensors(problem: Problem) -> Tensors:
    """Float64 tensors of a problem, rounded to its dtype."""
    torch.manual_seed(problem.seed)
    rule, (heads, value_heads, query_heads) = RULES[problem.rule], problem.heads
    (key_size, value_size), length = problem.sizes, problem.length
    batch = 1 if problem.layout == "packed" else 2
    value_size = key_size if rule.square else value_size
    options = {n: chosen(rule, n, problem.option) for n in rule.options}
    own = rule.own(key_size, value_size, options) if rule.own else Own({"state": (key_size, value_size)})
    if rule.own:  # one query per state
        query_heads = min(query_heads, value_heads)
    sizes = {"H": heads, "HV": value_heads, "HQ": query_heads, "K": key_size, "V": value_size, **options}
    names = (*(("q", "k", "v") if rule.qkv else ()), *rule.inputs_with(options))
    leaves = {n: draw(n, (batch, length, *(sizes[letter] for letter in rule.shape(n)))) for n in names}
    if options.get("normalize"):
        leaves |= {name: leaves[name].abs() for name in ("q", "k")}
    leaves |= {name: torch.randn(batch, length, value_heads, width) for name, width in own.projections.items()}
    if own.hidden:
        leaves["x"] = torch.randn(batch, length, value_heads, key_size)
    keywords: dict[str, Any] = {"options": options, "qk_l2norm": problem.qk_l2norm and rule.qkv}
    keywords |= {"mask": None, "cu_seqlens": None}
    count = batch
    if problem.layout == "packed":
        keywords["cu_seqlens"] = torch.tensor([0, length // 3, length // 3, length])  # one of them is empty
        count = 3
    if problem.layout == "padded":
        keywords["mask"] = torch.rand(batch, length) > 0.3
    if own.weights:
        weights = {name: weight.draw(value_heads, *weight.shape) for name, weight in own.weights.items()}
        keywords["weights"] = {name: x.to(problem.dtype).double() for name, x in weights.items()}
    states = {}
    if problem.initial:
        states = {name: torch.randn(count, value_heads, *shape) for name, shape in own.states.items()}
    if problem.initial and options.get("normalize"):
        states["norm_state"] = torch.rand(count, heads, key_size)
    if problem.initial:
        beside = set(rule.states) & set(rule.shapes)
        states |= {name: draw(name, (count, *(sizes[letter] for letter in rule.shape(name)))) for name in beside}
    rounded = {name: x.to(problem.dtype).double() for name, x in leaves.items()}
    return Tensors(rounded, {name: x.double() for name, x in states.items()}, keywords)


def draw(name: str, shape: tuple[int, ...]) -> Tensor:
    """Keys of length 1, log-decays below 0, rates from 0 to 2; every other gate from 0 to 1."""
    if name in ("q", "v"):
        return torch.randn(shape)
    if name == "k":
        return torch.nn.functional.normalize(torch.randn(shape), dim=-1)
    return {"g": -1, "moment_g": -1, "beta": 2}.get(name, 1) * torch.rand(shape)


def chosen(rule: Rule, option: str, number: int) -> Any:
    """A value of an option: of a boolean its opposite for number 1, of several choices the one with this number."""
    default = rule.options[option]
    if isinstance(default, bool):
        return default != bool(number)
    choices = rule.choices.get(option, (default,))
    return choices[number % len(choices)]


def variants(rule: Rule) -> int:
    """How many numbers `chosen` needs to reach every choice."""
    booleans = [2 for x in rule.options.values() if isinstance(x, bool)]
    return max([1, *booleans, *(len(choices) for choices in rule.choices.values())])


def every_variant(names: Iterable[str] = tuple(RULES)) -> list[tuple[str, int]]:
    """Every rule with every number that `chosen` needs for it."""
    return [(rule, number) for rule in names for number in range(variants(RULES[rule]))]


def of_head(keywords: dict[str, Any], heads: slice) -> dict[str, Any]:
    """Keywords with the weights of some heads only."""
    weights = {name: x[heads] for name, x in keywords.get("weights", {}).items()}
    return keywords | ({"weights": weights} if weights else {})


def outcome(apply: Callable[..., Any], given: Tensors, backend: str | None) -> dict[str, Tensor]:
    """Outputs, final states, and the gradient of a random function of both with respect to every leaf."""
    out, states = apply(**given.leaves, states=given.states or None, backend=backend, **given.keywords)
    result = {"out": out} | {f"final {name}": states[name] for name in sorted(states)}
    generator = torch.Generator().manual_seed(1)
    weights = {n: torch.randn(x.shape, dtype=torch.float64, generator=generator) for n, x in result.items()}
    loss = sum((x.double() * weights[name].to(x.device)).sum() for name, x in result.items())
    leaves = given.leaves | given.weights | {f"initial {name}": x for name, x in given.states.items()}
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {n: x.detach() for n, x in result.items()} | {f"grad {n}": x for n, x in zip(leaves, grads, strict=True)}


def raw_gates(given: Tensors) -> Tensors:
    """The same with gates as what they are computed from, for the function `from_raw`; others as they are."""
    names = ("beta", "g", "erase", "write")
    leaves = {name: torch.randn(x.shape) if name in names else x for name, x in given.leaves.items()}
    if "g" in leaves:
        states = leaves["g"].shape[2:]
        leaves |= {"A_log": torch.rand(states[0]), "dt_bias": torch.randn(states.numel()) - 3}
    return Tensors({name: x.double() for name, x in leaves.items()}, given.states, given.keywords)


RANGES = {"beta": 2.0, "erase": 1.5, "write": 1.0}


def from_raw(apply: Callable[..., Any], lower_bound: float | None = None) -> Callable[..., Any]:
    """`apply` for the leaves of `raw_gates`: β = 2 sigmoid(beta), g = -exp(A_log) softplus(g + dt_bias) or, if channels
    have a bound, lower_bound · sigmoid(exp(A_log) (g + dt_bias))."""

    def applied(*, g: Any = None, A_log: Any = None, dt_bias: Any = None, **rest: Any) -> Any:
        gates = {name: Rate(rest[name], reach) for name, reach in RANGES.items() if name in rest}
        g = {} if g is None else {"g": Decay(g, A_log, dt_bias, lower_bound)}
        return apply(**rest | gates | g)

    return applied


def on_device(given: Tensors, device: str) -> Tensors:
    """The same problem on another device."""
    tables = (given.leaves, given.states, given.keywords)
    moved = [{n: x.to(device) if isinstance(x, Tensor) else x for n, x in table.items()} for table in tables]
    if given.weights:
        moved[2]["weights"] = {n: x.to(device) for n, x in given.weights.items()}
    return Tensors(*moved)


def check_inverse(linear_class: Any, channel_decay: Any, *, seed: int, size: int, place: str) -> None:
    """Assert that the inverses of chunks are right to 1e-6, by the kernels of both families. Keys have cosine 0.9 to
    each other, β = 1.9: where a Neumann series has no correct digit. Keys and β are multiples of 1/64, so that the
    triangle itself is exact in float32: rounding it alone costs 2e-6 of the inverse."""
    torch.manual_seed(seed)
    common, own = torch.randn(1, 1, 1, size), torch.randn(1, 100, 1, size)
    k = unit(0.9**0.5 * unit(common, dim=-1) + 0.1**0.5 * unit(own, dim=-1), dim=-1)
    k, rate = ((64 * k).round() / 64).to(place), 122 / 64
    beta, g = torch.full((1, 100, 1), rate, device=place), torch.zeros(1, 100, 1, size, device=place)
    form = channel_decay.Form(1.0, 0.0, 0.0, 0.0, 0.0, False, False, False)
    found = linear_class.linear_class_forward(k, k, k, beta, *[None] * 6, 1.0, 0.0, True, False, True)[2]
    by_channel = channel_decay.channel_decay_forward(k, k, k, None, None, beta, g, *[None] * 5, *form, True)[2]
    for solve in (found, by_channel):
        length = solve.shape[-1]
        for chunk, keys in zip(solve[:, 0], k[0, :, 0].double().split(length), strict=True):
            count = keys.shape[0]
            exact = torch.linalg.inv(torch.eye(count, device=place).double() + (rate * keys @ keys.mT).tril(-1))
            assert (chunk[:count, :count] - exact).norm() <= 1e-6 * exact.norm()
            assert torch.equal(chunk, chunk.tril())


def truth(given: Tensors, rule: Rule) -> dict[str, Tensor]:
    """The float64 recurrence."""
    return outcome(rule.apply, given.copy(torch.float64), "reference")


def relative_error(x: Tensor, expected: Tensor) -> float:
    """One that is nearly zero is judged as if it were a little larger."""
    size = max(float(expected.detach().norm()), 0.05 * expected.numel() ** 0.5)
    return float((x.detach().double() - expected.detach().double()).norm()) / size


def assert_agrees(
    result: dict[str, Tensor],
    expected: dict[str, Tensor],
    tolerance: float,
    yardstick: dict[str, Tensor] | None = None,
) -> None:
    """Every tensor within the relative tolerance, or within twice the error of the recurrence in the same dtype."""
    assert result.keys() == expected.keys()
    for name, x in result.items():
        allowed = tolerance
        if yardstick is not None:
            allowed = max(allowed, 2 * relative_error(yardstick[name], expected[name]))
        error = relative_error(x, expected[name])
        assert error <= allowed, f"{name}: relative error {error:.1e}, allowed {allowed:.0e}"
