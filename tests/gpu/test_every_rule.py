"""The operators on a GPU agree with the float64 recurrence on the processor."""

import operators as problems
import pytest
import torch
from operators import Problem

from hf_fwp.rules import RULES

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
LENGTHS = {"fwp_1993": 20}
SEQUENTIAL = [name for name, rule in RULES.items() if rule.own and rule.apply.args[0].kernel]
VARIANTS = problems.every_variant(SEQUENTIAL)


def steady_tensors(problem: Problem) -> problems.Tensors:
    """With a rule whose dynamics let rounding be: small changes, and no larger weights than the learned ones."""
    given = problems.tensors(problem)
    if problem.rule in problems.STEADY:
        given.keywords["options"] |= problems.STEADY[problem.rule]
        given.states.update({name: 0.5 * state.shape[-2] ** -0.5 * state for name, state in given.states.items()})
    return given


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rule", RULES)
def test_the_gpu_computes_the_recurrence(rule, dtype):
    length = LENGTHS.get(rule, 200)
    given = steady_tensors(Problem(rule, dtype, length=length, sizes=(32, 32), heads=(3, 3, 3), initial=False))
    with torch.no_grad():
        truth, _ = RULES[rule].apply(**given.leaves, backend="reference", **given.keywords)
        there = problems.on_device(given, problems.GPU).copy(dtype)
        out, _ = RULES[rule].apply(**there.leaves, **there.keywords)
    assert (out.cpu().double() - truth).norm() <= TOLERANCE[dtype] * truth.norm()


def kernels_agree(problem: Problem) -> None:
    """Outputs, states and every gradient; float32 may have twice the error of the recurrence in float32."""
    rule, given = RULES[problem.rule], problems.on_device(steady_tensors(problem), problems.GPU)
    result = problems.outcome(rule.apply, given.copy(problem.dtype), "triton")
    yardstick = problems.outcome(rule.apply, given.copy(problem.dtype), "reference")
    problems.assert_agrees(result, problems.truth(given, rule), problems.TOLERANCE[problem.dtype], yardstick)


@pytest.mark.parametrize("layout", ["plain", "padded", "packed"])
@pytest.mark.parametrize(("rule", "number"), VARIANTS)
def test_the_kernels_of_a_sequential_rule_are_its_recurrence(rule, number, layout):
    sizes = (24, 24) if RULES[rule].square else (24, 40)
    kernels_agree(Problem(rule, torch.float32, 21, layout=layout, sizes=sizes, heads=(2, 2, 2), option=number))


@pytest.mark.parametrize("size", [16, 64, 100, 128])
@pytest.mark.parametrize("rule", SEQUENTIAL)
def test_heads_of_every_size(rule, size):
    keys, values = (min(size, largest) for largest in RULES[rule].apply.args[0].largest)
    number = problems.WALKS_WITH.get(rule, 0)
    kernels_agree(Problem(rule, torch.float32, 20, sizes=(keys, values), heads=(2, 2, 2), option=number))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", SEQUENTIAL)
def test_half_precision(rule, dtype):
    kernels_agree(Problem(rule, dtype, 20, sizes=(32, 32), heads=(2, 2, 2)))


@pytest.mark.parametrize("rule", ["recurrent_delta_net", "delta_rnn", "srwm"])
def test_long_sequences(rule):
    kernels_agree(Problem(rule, torch.float32, 300, sizes=(64, 64), heads=(2, 2, 2), layout="padded"))
