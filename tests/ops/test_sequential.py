"""The rules with states of their own against equations written a second time, and the loop that keeps few states."""

import operators as problems
import pytest
import torch
from brute_force import BRUTE_FORCE
from operators import Problem

from hf_fwp.rules import RULES
from hf_fwp.rules.walk import Loop, segment_length, walk, walked

OWN = [rule for rule in RULES if RULES[rule].own]
VARIANTS = problems.every_variant(OWN)


def brute_force(rule):
    """`Rule.apply` by the equations of brute_force.py, head by head."""

    def apply(*, states, weights=None, options, backend=None, mask=None, cu_seqlens=None, qk_l2norm=False, **inputs):
        assert mask is None
        assert cu_seqlens is None
        batch, _, heads = next(iter(inputs.values())).shape[:3]
        reads, final = [], []
        for row in range(batch):
            for head in range(heads):
                own = {n: s[row, head] for n, s in states.items()}
                given = {n: x[row, :, head] for n, x in inputs.items()}
                of_head = {n: x[head] for n, x in (weights or {}).items()}
                reads.append(BRUTE_FORCE[rule](given, of_head, own, options))
                final.append(own)
        out = torch.stack(reads).unflatten(0, (batch, heads)).transpose(1, 2)
        return out, {n: torch.stack([s[n] for s in final]).unflatten(0, (batch, heads)) for n in states}

    return apply


def problem(rule, number=0, **changes):
    return Problem(rule, option=number, heads=(2, 2, 2), **{"length": 21, "sizes": (5, 4), **changes})


@pytest.mark.parametrize(("rule", "number"), VARIANTS)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_the_rule_is_its_equations(rule, number, backend):
    given = problems.tensors(problem(rule, number)).copy(torch.float64)
    result = problems.outcome(RULES[rule].apply, given, backend)
    problems.assert_agrees(result, problems.outcome(brute_force(rule), given, None), 1e-9)


@pytest.mark.parametrize("rule", OWN)
def test_the_comparison_rejects_a_wrong_input(rule):
    given = problems.tensors(problem(rule)).copy(torch.float64)
    expected = problems.outcome(brute_force(rule), given, None)
    for name in [*given.leaves, *given.weights, *given.states]:
        changed = problems.tensors(problem(rule)).copy(torch.float64)
        parts = [part for part in (changed.leaves, changed.weights, changed.states) if name in part]
        parts[0][name].data[-1] *= 1.01
        parts[0][name].data[-1] += 0.01
        with pytest.raises(AssertionError, match="relative error"):
            problems.assert_agrees(problems.outcome(RULES[rule].apply, changed, "torch"), expected, 1e-9)


@pytest.mark.parametrize("rule", OWN)
def test_a_state_can_be_left_out(rule):
    given = problems.tensors(problem(rule))
    zeros = {name: torch.zeros_like(x) for name, x in given.states.items()}
    out, final = RULES[rule].apply(**given.leaves, states=zeros, **given.keywords)
    fresh, fresh_final = RULES[rule].apply(**given.leaves, **given.keywords)
    assert torch.equal(out, fresh)
    assert all(torch.equal(final[name], fresh_final[name]) for name in final)


@pytest.mark.parametrize("rule", OWN)
def test_what_does_not_fit_is_named(rule):
    given = problems.tensors(problem(rule))
    apply, rest = RULES[rule].apply, {**given.leaves, "states": given.states, **given.keywords}
    name = next(iter(given.leaves))
    with pytest.raises(ValueError, match=f"unknown argument of {rule}: 'speed'"):
        apply(**rest, speed=given.leaves[name])
    with pytest.raises(ValueError, match="shape"):
        apply(**(rest | {"states": {n: x[:, :1] for n, x in given.states.items()}}))
    with pytest.raises(ValueError, match="unknown state 'memory'"):
        apply(**(rest | {"states": {"memory": given.states["state"]}}))
    with pytest.raises(ValueError, match=r"must be torch\.float64"):
        apply(**(rest | {"states": {n: x.float() for n, x in given.states.items()}}))
    with pytest.raises(ValueError, match="mask has shape"):
        apply(**(rest | {"mask": torch.ones(2, 3)}))
    for missing in given.leaves:
        with pytest.raises(ValueError, match=missing):
            apply(**{n: x for n, x in rest.items() if n != missing})


def test_more_queries_than_states_are_refused():
    given = problems.tensors(Problem("recurrent_delta_net", heads=(2, 2, 2)))
    given.leaves["q"] = given.leaves["q"].repeat(1, 1, 2, 1)
    with pytest.raises(ValueError, match="every state has one query"):
        RULES["recurrent_delta_net"].apply(**given.leaves, **given.keywords)


def leaky(states, *, x, decay):
    """A step for the tests of the loop: S <- tanh(decay S + x)."""
    new = {"state": torch.tanh(decay * states["state"] + x)}
    return new, new["state"] ** 2


def kept_elements(run):
    """(elements kept by the forward, the most kept at once by the backward)."""
    counts = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: counts.append(x.numel()) or x, lambda x: x):
        loss = run()
        forward, before = sum(counts), len(counts)
        loss.backward()
    return forward, sum(counts[before:])


@pytest.mark.parametrize("length", [100, 400])
def test_the_loop_keeps_few_states(length):
    """T/C states in the forward where a plain loop keeps several for each of T steps."""
    size, segment = 64, segment_length(length)
    x = torch.randn(1, length, size, size, dtype=torch.float64, requires_grad=True)
    start = torch.randn(1, size, size, dtype=torch.float64, requires_grad=True)
    decay = torch.rand(1, dtype=torch.float64, requires_grad=True)

    def kept_by(loop):
        forward, backward = kept_elements(lambda: loop(leaky, {"x": x}, {"state": start}, weights={"decay": decay}))
        return forward - x.numel(), backward

    plain = kept_by(lambda *a, **k: plain_loop(*a, **k).sum())[0]
    forward, backward = kept_by(lambda *a, **k: walk(*a, **k)[0].sum())
    assert segment == {100: 10, 400: 20}[length]
    assert forward <= (-(-length // segment) + 1) * size * size
    assert plain > 2 * length * size * size
    # all segments together record what the plain loop records, one after the other
    assert backward / (-(-length // segment)) <= 1.5 * plain / length * segment


@pytest.mark.parametrize("rule", OWN)
def test_a_rule_compiles_once_for_all_lengths(rule):
    """The loop over time is one operator: unrolled, forty tokens took a minute to compile."""

    def loss(leaves, states, keywords):
        out, states = RULES[rule].apply(**leaves, states=states, **keywords)
        return out.square().sum() + sum(x.square().sum() for x in states.values())

    number = problems.WALKS_WITH.get(rule, 0)
    compiled, graphs = problems.in_one_graph(loss)
    for length in (20, 30, 50):
        given = problems.tensors(problem(rule, number, length=length, layout="padded")).copy(torch.float64)
        leaves = {**given.leaves, **given.keywords.get("weights", {}), **given.states}
        call = (given.leaves, given.states, given.keywords)
        found, expected = (torch.autograd.grad(run(*call), list(leaves.values())) for run in (compiled, loss))
        for name, a, b in zip(leaves, found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)
    assert len(graphs) <= 2


def test_a_number_that_changes_compiles_without_graph_breaks():
    given = problems.tensors(problem("fwp_1991", 1)).copy(torch.float64)

    def outputs(tau):
        keywords = given.keywords | {"options": given.keywords["options"] | {"tau": tau}}
        return RULES["fwp_1991"].apply(**given.leaves, states=given.states, **keywords)[0]

    compiled, _ = problems.in_one_graph(outputs)
    for tau in (4.0, 3.0):
        problems.close(compiled(tau), outputs(tau))


@pytest.mark.parametrize("rule", OWN)
def test_packed_sequences_break_a_compiled_graph(rule):
    given = problems.tensors(problem(rule, layout="packed")).copy(torch.float64)

    def outputs():
        return RULES[rule].apply(**given.leaves, states=given.states, **given.keywords)[0]

    torch.compiler.reset()
    problems.close(torch.compile(outputs, backend="aot_eager")(), outputs())
    whole, _ = problems.in_one_graph(outputs)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="from the values of cu_seqlens only"):
        whole()


def test_opcheck():
    x, decay, mask = torch.rand(2, 20, 3, dtype=torch.float64), torch.rand(3, dtype=torch.float64), torch.ones(2, 20)
    tensors = [t.requires_grad_() for t in (x, decay, torch.rand(2, 3, dtype=torch.float64))]
    loop = Loop(leaky, ("x",), ("decay",), ("state",), {})
    torch.library.opcheck(walked, (tensors, mask, *loop.written()))


@pytest.mark.parametrize("rule", OWN)
def test_a_rule_keeps_few_states(rule):
    """A state in every 11 of 128 steps, beside vectors for every token; the recurrence keeps each state, and more."""
    length, size, number = 128, 16 if rule == "fast_weight_memory" else 32, problems.WALKS_WITH.get(rule, 0)
    given = problems.tensors(Problem(rule, length=length, sizes=(size, size), heads=(1, 1, 1), option=number))
    given = given.copy(torch.float32)
    leaves = sum(x.nbytes for x in (*given.leaves.values(), *given.weights.values()))

    def kept_bytes(backend):
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.setdefault(x.data_ptr(), x), lambda x: x):
            RULES[rule].apply(**given.leaves, states=given.states, backend=backend, **given.keywords)
        return sum(x.untyped_storage().nbytes() for x in kept.values()) - leaves

    half = length * sum(x.nbytes for x in given.states.values()) / 2
    assert kept_bytes("torch") < half < kept_bytes("reference")


def plain_loop(step, inputs, states, *, weights):
    outs = []
    for t in range(inputs["x"].shape[1]):
        states, out = step(states, x=inputs["x"][:, t], **weights)
        outs.append(out)
    return torch.stack(outs, dim=1)


def test_a_weight_gets_the_gradient_of_every_segment():
    x = torch.randn(2, 100, 3, dtype=torch.float64)
    start, decay = torch.zeros(2, 3, dtype=torch.float64), torch.rand(1, dtype=torch.float64, requires_grad=True)
    walked = walk(leaky, {"x": x}, {"state": start}, weights={"decay": decay})[0].sum()
    plain = plain_loop(leaky, {"x": x}, {"state": start}, weights={"decay": decay}).sum()
    torch.testing.assert_close(*(torch.autograd.grad(loss, decay)[0] for loss in (walked, plain)))
