"""Every backend of every rule against the float64 recurrence: outputs, final states, every gradient."""

import operators as problems
import pytest
import torch
from operators import Problem

from hf_fwp import ops
from hf_fwp.rules import RULES, chunked_op, general_op

# rules whose fast form solves a triangular system for coefficients that are given
LINEAR = [rule for rule in RULES if not RULES[rule].own]
COVERING = problems.covering_problems()


@pytest.mark.parametrize("problem", COVERING, ids=str)
def test_chunked_agrees_with_the_recurrence(problem):
    given, rule = problems.tensors(problem), RULES[problem.rule]
    result = problems.outcome(rule.apply, given.copy(problem.dtype), "torch")
    assert result["out"].dtype == problem.dtype
    wide = torch.float64 if problem.dtype == torch.float64 else torch.float32
    assert result["final state"].dtype == wide
    # a state that feeds a nonlinearity amplifies rounding, in the recurrence as much as here
    yardstick = problems.outcome(rule.apply, given.copy(problem.dtype), "reference") if rule.own else None
    problems.assert_agrees(result, problems.truth(given, rule), problems.TOLERANCE[problem.dtype], yardstick)


@pytest.mark.parametrize("problem", [p for p in COVERING if p.length < 65][::3], ids=str)
def test_float32_recurrence_agrees_with_float64(problem):
    given, rule = problems.tensors(problem), RULES[problem.rule]
    result = problems.outcome(rule.apply, given.copy(problem.dtype), "reference")
    problems.assert_agrees(result, problems.truth(given, rule), problems.TOLERANCE[problem.dtype])


@pytest.mark.parametrize("problem", [p for p in COVERING if p.length == 1 and p.layout != "packed"], ids=str)
@pytest.mark.parametrize("in_place", [False, True])
def test_decode_step_agrees_with_the_recurrence(problem, in_place):
    given, rule = problems.tensors(problem), RULES[problem.rule]
    expected = problems.truth(given, rule)  # first: float64 states are changed in place below
    tensors = given.copy(problem.dtype)
    before = {name: x.detach().clone() for name, x in tensors.states.items()}
    with torch.no_grad():
        out, states = rule.apply(
            **tensors.leaves, states=tensors.states or None, backend="step", in_place=in_place, **tensors.keywords
        )
    result = {"out": out} | {f"final {name}": x for name, x in states.items()}
    forward = {name: expected[name] for name in result}
    problems.assert_agrees(result, forward, problems.TOLERANCE[problem.dtype])
    for name, x in tensors.states.items():
        assert torch.equal(x, states[name] if in_place else before[name])


@pytest.mark.parametrize("rule", LINEAR)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_sequences_of_correlated_keys(rule, dtype):
    """T = 1024, keys with cosine 0.9 to each other, β = 1.9: where a Neumann series has no correct digit."""
    torch.manual_seed(0)
    size, length, unit = 32, 1024, torch.nn.functional.normalize
    options = {**RULES[rule].options, **{n: False for n, x in RULES[rule].options.items() if isinstance(x, bool)}}
    sizes = {"H": 2, "HV": 2, "HQ": 2, "K": size, "V": size, **options}
    leaves = {}
    for name in ("q", "k", "v", *RULES[rule].inputs_with(options)):
        leaves[name] = problems.draw(name, (1, length, *(sizes[letter] for letter in RULES[rule].shape(name))))
    common = torch.randn_like(leaves["k"][:, :1])
    leaves["k"] = unit(0.9**0.5 * unit(common, dim=-1) + 0.1**0.5 * leaves["k"], dim=-1)
    leaves["q"] = unit(leaves["q"], dim=-1)
    rate = 1.9 / options.get("range", 1)  # a rule that lengthens keys by it is stable up to 2 / range
    changes = {"beta": lambda x: torch.full_like(x, rate), "g": lambda x: 0.01 * x}
    leaves |= {name: changes[name](leaves[name]) for name in changes if name in leaves}
    options = {"options": options}
    given = problems.Tensors({n: x.to(dtype).double() for n, x in leaves.items()}, {}, options)
    result = problems.outcome(RULES[rule].apply, given.copy(dtype), "torch")
    problems.assert_agrees(result, problems.truth(given, RULES[rule]), problems.TOLERANCE[dtype])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_i43_gradcheck(rule, backend):
    problem = Problem(rule, length=3, sizes=(2, 3), heads=(1, 2, 2), qk_l2norm=rule != "linear_attention")
    given = problems.tensors(problem).copy(torch.float64)
    names, states = list(given.leaves), list(given.states)

    def function(*flat):
        leaves = dict(zip(names, flat, strict=False))
        carried = dict(zip(states, flat[len(names) :], strict=True))
        out, final = RULES[rule].apply(**leaves, states=carried or None, backend=backend, **given.keywords)
        return out, *final.values()

    assert torch.autograd.gradcheck(function, (*given.leaves.values(), *given.states.values()))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradient_where_beta_is_zero(backend):
    given = problems.tensors(Problem("gated_delta_net", length=70))
    given.leaves["beta"][:, ::3] = 0
    result = problems.outcome(RULES["gated_delta_net"].apply, given.copy(torch.float64), backend)
    problems.assert_agrees(result, problems.truth(given, RULES["gated_delta_net"]), 1e-9)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("erase", [False, True])
def test_opcheck(packed, erase):
    length, count = 70, 2 if packed else 1
    q, k, v = (torch.randn(1, length, 2, 4, requires_grad=True) for _ in range(3))
    beta = torch.rand(1, length, 2, requires_grad=True) if erase else None
    g = (-torch.rand(1, length, 2)).requires_grad_()
    state = torch.randn(count, 2, 4, 4, requires_grad=True)
    bounds = torch.tensor([0, 30, length]) if packed else None
    arguments = (q, k, v, beta, g, state, bounds, 0.5, erase, True, True)
    torch.library.opcheck(chunked_op.linear_class_forward, arguments)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck_of_the_general_rule(packed, transposed):
    length, count = 70, 2 if packed else 1
    q, k, v, e = (torch.randn(1, length, 2, 4, requires_grad=True) for _ in range(4))
    g = (-torch.rand(1, length, 2, 4)).requires_grad_()
    state = torch.randn(count, 2, 4, 4, requires_grad=True)
    bounds = torch.tensor([0, 30, length]) if packed else None
    torch.library.opcheck(general_op.general_forward, (q, k, 0.1 * e, v, g, state, bounds, transposed, True))


@pytest.mark.parametrize("rule", ["kimi_delta", "gated_oja"])
def test_the_backward_keeps_one_state_per_chunk(rule):
    """Numbers kept per token and head do not grow with T and are far fewer than a state has."""
    kept = []
    for length in (256, 512):
        given = problems.tensors(Problem(rule, torch.float32, length, sizes=(64, 64), heads=(2, 2, 2), initial=False))
        tensors, storages = given.copy(torch.float32), {}

        def remember(x, storages=storages):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(remember, lambda x: x):
            _outputs = RULES[rule].apply(**tensors.leaves, **tensors.keywords)
        kept.append(sum(storages.values()) / (2 * 2 * length * 4))
    assert kept[1] <= 1.01 * kept[0]
    assert kept[0] < 64 * 64 / 3


@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if rule.shapes])
@pytest.mark.parametrize("layout", ["plain", "packed"])
def test_rules_with_gates_of_their_own_compile_without_graph_breaks(rule, layout):
    """And once for all lengths: the second length is compiled with a length of any size."""

    def loss(leaves, states, keywords):
        out, states = RULES[rule].apply(**leaves, states=states, **keywords)
        return out.sum() + states["state"].square().sum()

    compiled, graphs = problems.in_one_graph(loss)
    for length in (70, 100, 170):
        given = problems.tensors(Problem(rule, torch.float32, length, layout)).copy(torch.float32)
        leaves, call = (*given.leaves.values(), *given.states.values()), (given.leaves, given.states, given.keywords)
        found, expected = (torch.autograd.grad(run(*call), leaves) for run in (compiled, loss))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert len(graphs) <= 2


@pytest.mark.parametrize("operator", ["linear_attention", "delta_rule", "gated_delta_rule"])
@pytest.mark.parametrize("packed", [False, True])
def test_compiles_without_graph_breaks(operator, packed):
    rule = {"linear_attention": "linear_attention", "delta_rule": "delta_net"}.get(operator, "gated_delta_net")
    q, k, v = (torch.nn.functional.normalize(torch.randn(1, 70, 2, 4), dim=-1).requires_grad_() for _ in range(3))
    gates = {n: (torch.rand(1, 70, 2) - float(n == "g")).requires_grad_() for n in RULES[rule].inputs}
    bounds = torch.tensor([0, 30, 70]) if packed else None

    def loss():
        out, state = getattr(ops, operator)(q, k, v, **gates, cu_seqlens=bounds, output_final_state=True)
        return out.sum() + state.square().sum()

    leaves = (q, k, v, *gates.values())
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(), leaves), torch.autograd.grad(loss(), leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_a_scale_that_changes_compiles_without_graph_breaks():
    q, k, v, beta = torch.randn(1, 8, 2, 4), torch.randn(1, 8, 2, 4), torch.randn(1, 8, 2, 4), torch.rand(1, 8, 2)
    compiled = torch.compile(ops.delta_rule, fullgraph=True, backend="aot_eager")
    for scale in (0.5, 0.25):
        out, expected = (rule(q, k, v, beta, scale=scale)[0] for rule in (compiled, ops.delta_rule))
        torch.testing.assert_close(out, expected)


def test_decode_step_compiles_without_graph_breaks():
    q, k, v, state = torch.randn(2, 1, 2, 4), torch.randn(2, 1, 2, 4), torch.randn(2, 1, 2, 4), torch.zeros(2, 2, 4, 4)
    beta, g = torch.rand(2, 1, 2), -torch.rand(2, 1, 2)

    def decode(state):
        rule = RULES["gated_delta_net"]
        return rule.apply(q, k, v, beta=beta, g=g, states={"state": state}, in_place=True)[0]

    with torch.no_grad():
        expected = decode(state.clone())
        out = torch.compile(decode, fullgraph=True, backend="aot_eager")(state)
    torch.testing.assert_close(out, expected)
    assert state.abs().sum() > 0


def test_autocast_does_not_reach_the_state():
    given = problems.tensors(Problem("gated_delta_net", torch.float32, 130))
    expected = problems.truth(given, RULES["gated_delta_net"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = problems.outcome(RULES["gated_delta_net"].apply, given.copy(torch.float32), "torch")
    problems.assert_agrees(result, expected, 1e-5)


@pytest.mark.parametrize("rule", ["linear_attention", "gated_delta_net", "kimi_delta", "comba", "oja"])
def test_autocast_does_not_reach_the_recurrence(rule):
    given = problems.tensors(Problem(rule, torch.float32, 10)).copy(torch.float32)
    call = {**given.leaves, **given.keywords, "states": given.states or None, "backend": "reference"}
    expected, _ = RULES[rule].apply(**call)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(RULES[rule].apply(**call)[0], expected)


@pytest.mark.parametrize("g", [-1e3, -1e6, -torch.inf])
@pytest.mark.parametrize("rule", ["gated_delta_net", "kimi_delta", "comba"])
def test_a_decay_to_nothing_leaves_the_digits_of_the_others(rule, g):
    """A chunk holds sums of g."""
    given = problems.tensors(Problem(rule, torch.float32, 70))
    given.leaves["g"][:, [8, 40]] = g
    result = problems.outcome(RULES[rule].apply, given.copy(torch.float32), "torch")
    problems.assert_agrees(result, problems.truth(given, RULES[rule]), 1e-5)


def test_an_empty_batch_gives_empty_outputs():
    for rule in ("gated_delta_net", "kimi_delta"):
        given = problems.tensors(Problem(rule, torch.float32, 5, initial=False))
        nothing = {name: x[:0] for name, x in given.leaves.items()}
        shapes = [RULES[rule].apply(**nothing, backend=b, **given.keywords)[0].shape for b in ("torch", "reference")]
        assert shapes == [(0, 5, *given.leaves["v"].shape[2:])] * 2


def test_a_decay_of_more_digits_does_not_change_the_state():
    given = problems.tensors(Problem("kimi_delta", torch.float32, 5)).copy(torch.float32)
    given.leaves["g"] = given.leaves["g"].double()
    apply = RULES["kimi_delta"].apply
    _, states = apply(**given.leaves, states=given.states, **given.keywords)
    assert states["state"].dtype == torch.float32
    apply(**given.leaves, states=states, **given.keywords)


def test_bf16_inputs_at_1024_tokens():
    given = problems.tensors(Problem("gated_delta_net", torch.float32, 1024, sizes=(16, 16), heads=(1, 1, 1)))
    with torch.no_grad():
        out, states = RULES["gated_delta_net"].apply(
            **given.copy(torch.bfloat16).leaves, states=given.copy(torch.bfloat16).states, **given.keywords
        )
        exact, _ = RULES["gated_delta_net"].apply(
            **given.leaves, states=given.states, backend="reference", **given.keywords
        )
    assert states["state"].dtype == torch.float32
    assert float((out.double() - exact).norm() / exact.norm()) <= 2e-2
