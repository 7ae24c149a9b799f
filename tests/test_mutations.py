"""The comparison that the operator tests rely on must fail on wrong implementations. Here are some."""

import operators as problems
import pytest
import torch
from operators import Problem

from hf_fwp.rules import RULES

RULE = RULES["gated_delta_net"]


def shifted_by_one_token(q, k, v, **rest):
    return RULE.apply(q, k.roll(1, dims=1), v.roll(1, dims=1), **rest)


def without_beta(q, k, v, *, beta, **rest):
    return RULE.apply(q, k, v, beta=torch.ones_like(beta) + 0 * beta, **rest)


def keys_and_values_swapped(q, k, v, **rest):
    return RULE.apply(q, v, k, **rest)


def without_state_gradient(*arguments, states, **rest):
    cut = {name: x.detach() + 0 * x for name, x in states.items()}
    return RULE.apply(*arguments, states=cut, **rest)


def without_gradient_of_the_final_state(*arguments, **rest):
    out, states = RULE.apply(*arguments, **rest)
    return out, {name: x.detach() for name, x in states.items()}


def without_decay_gradient(*arguments, g, **rest):
    return RULE.apply(*arguments, g=g.detach() + 0 * g, **rest)


def read_before_write(q, k, v, **rest):
    out, states = RULE.apply(q.roll(-1, dims=1), k, v, **rest)
    return out.roll(1, dims=1), states


def all_zero(*arguments, **rest):
    out, states = RULE.apply(*arguments, **rest)
    return 0 * out, states


def mask_ignored(*arguments, mask, **rest):
    return RULE.apply(*arguments, mask=None, **rest)


MUTATIONS = [
    shifted_by_one_token,
    without_beta,
    keys_and_values_swapped,
    without_state_gradient,
    without_gradient_of_the_final_state,
    without_decay_gradient,
    read_before_write,
    all_zero,
    mask_ignored,
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.__name__)
@pytest.mark.parametrize("dtype", problems.TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_comparison_rejects(mutation, dtype, backend):
    given = problems.tensors(Problem(RULE.name, dtype, 9, layout="padded", sizes=(5, 5), heads=(2, 2, 2)))
    expected = problems.truth(given, RULE)
    result = problems.outcome(mutation, given.copy(dtype), backend)
    with pytest.raises(AssertionError, match="relative error"):
        problems.assert_agrees(result, expected, problems.TOLERANCE[dtype])


def a_decay_shared_by_all_channels(*arguments, g, **rest):
    return RULES["kimi_delta"].apply(*arguments, g=g.mean(-1, keepdim=True).expand_as(g), **rest)


def erased_where_it_writes(*arguments, erase, write, **rest):
    return RULES["gated_delta_net_2"].apply(*arguments, erase=erase.roll(1, dims=-1), write=write, **rest)


def everything_is_erased(*arguments, closeness, **rest):
    return RULES["comba"].apply(*arguments, closeness=torch.ones_like(closeness) + 0 * closeness, **rest)


def the_query_as_it_is(*arguments, correction, **rest):
    return RULES["comba"].apply(*arguments, correction=0 * correction, **rest)


def steps_in_the_wrong_order(q, k, v, *, beta, **rest):
    return RULES["delta_product"].apply(q, k.flip(3), v.flip(3), beta=beta.flip(-1), **rest)


def a_moment_that_is_never_forgotten(*arguments, moment_g, **rest):
    return RULES["precond_delta"].apply(*arguments, moment_g=0 * moment_g, **rest)


def values_decay_as_one(*arguments, g, **rest):
    return RULES["gated_oja"].apply(*arguments, g=g.mean(-1, keepdim=True).expand_as(g), **rest)


def read_from_the_other_side(q, k, v, **rest):
    return RULES["oja"].apply(v, k, q, **rest)


OF_ONE_RULE = {
    a_decay_shared_by_all_channels: "kimi_delta",
    erased_where_it_writes: "gated_delta_net_2",
    everything_is_erased: "comba",
    the_query_as_it_is: "comba",
    steps_in_the_wrong_order: "delta_product",
    a_moment_that_is_never_forgotten: "precond_delta",
    values_decay_as_one: "gated_oja",
    read_from_the_other_side: "oja",
}


@pytest.mark.parametrize("mutation", OF_ONE_RULE, ids=lambda m: m.__name__)
@pytest.mark.parametrize("dtype", problems.TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_comparison_rejects_what_one_rule_could_get_wrong(mutation, dtype, backend):
    rule = RULES[OF_ONE_RULE[mutation]]
    given = problems.tensors(Problem(rule.name, dtype, 9, layout="padded", sizes=(5, 5), heads=(2, 2, 2)))
    result = problems.outcome(mutation, given.copy(dtype), backend)
    with pytest.raises(AssertionError, match="relative error"):
        problems.assert_agrees(result, problems.truth(given, rule), problems.TOLERANCE[dtype])


@pytest.mark.parametrize("rule", RULES)
def test_comparison_accepts_every_rule(rule):
    given = problems.tensors(Problem(rule, torch.float32, 9, layout="padded", sizes=(5, 5), heads=(2, 2, 2)))
    result = problems.outcome(RULES[rule].apply, given.copy(torch.float32), "torch")
    problems.assert_agrees(result, problems.truth(given, RULES[rule]), 1e-5)
