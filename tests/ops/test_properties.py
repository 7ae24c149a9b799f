"""Any rule, shape, length, mask and split: what holds for the listed problems holds for random ones."""

import itertools

import torch
from hypothesis import strategies as some
from operators import RULES, Problem, Tensors, assert_agrees, outcome, tensors, truth
from properties import for_any

HEADS = [(h, h * g, h * g * r) for h in (1, 2, 3) for g in (1, 2) for r in (1, 2)]
LONGEST = 80


def problems(layout=None):
    """In float64, where nothing but a mistake makes a difference; how narrower ones round is test_backends.py."""
    return some.builds(
        Problem,
        rule=some.sampled_from(sorted(RULES)),
        length=some.integers(1, LONGEST),
        initial=some.booleans(),
        layout=some.sampled_from(["plain", "padded"]) if layout is None else some.just(layout),
        sizes=some.tuples(some.integers(1, 12), some.integers(1, 12)),
        heads=some.sampled_from(HEADS),
        qk_l2norm=some.booleans(),
        option=some.integers(0, 3),
        seed=some.integers(0, 2**16),
    )


def sections(length, cuts):
    """Consecutive slices of 0..length, cut at some of the numbers given; a repeated cut makes an empty one."""
    edges = [0, *sorted(cut % (length + 1) for cut in cuts), length]
    return list(itertools.pairwise(edges))


def piece(leaves, start, end):
    return {name: x[:, start:end] for name, x in leaves.items()}


@for_any(problem=problems())
def test_the_fast_form_is_the_recurrence(problem):
    given, rule = tensors(problem), RULES[problem.rule]
    assert_agrees(outcome(rule.apply, given.copy(torch.float64), "torch"), truth(given, rule), 1e-9)


@for_any(problem=problems(), cuts=some.lists(some.integers(0, LONGEST), max_size=4))
def test_split_anywhere_is_whole(problem, cuts):
    given, rule = tensors(problem).copy(torch.float64), RULES[problem.rule]

    def in_parts(states, mask, **arguments):
        leaves = {name: arguments.pop(name) for name in given.leaves}
        outs = []
        for start, end in sections(problem.length, cuts):
            if start < end:
                part = None if mask is None else mask[:, start:end]
                out, states = rule.apply(**piece(leaves, start, end), states=states, mask=part, **arguments)
                outs.append(out)
        return torch.cat(outs, dim=1), states

    assert_agrees(outcome(in_parts, given, "torch"), outcome(rule.apply, given, "torch"), 1e-9)


@for_any(problem=problems("plain"), mask=some.lists(some.booleans(), min_size=LONGEST, max_size=LONGEST))
def test_padding_anywhere_is_absence(problem, mask):
    given, rule = tensors(problem), RULES[problem.rule]
    valid = torch.tensor(mask[: problem.length])
    short = {name: x[:, valid].contiguous() for name, x in given.leaves.items()}
    alone = Tensors(short, given.states, given.keywords).copy(torch.float64)
    padded = given.copy(torch.float64)
    for x in padded.leaves.values():
        x.data[:, ~valid] = float("nan")
    padded.keywords["mask"] = valid.expand(2, -1)

    def compacted(**arguments):
        out, states = rule.apply(**arguments)
        return out[:, valid], states

    result = outcome(lambda backend, **arguments: compacted(backend=backend, **arguments), padded, "torch")
    for name in padded.leaves:
        assert not result[f"grad {name}"][:, ~valid].any()
        result[f"grad {name}"] = result[f"grad {name}"][:, valid]
    if valid.any():
        assert_agrees(result, outcome(rule.apply, alone, "torch"), 1e-9)


@for_any(problem=problems("packed"), cuts=some.lists(some.integers(0, LONGEST), min_size=2, max_size=2))
def test_packed_anywhere_is_separate(problem, cuts):
    given, rule = tensors(problem).copy(torch.float64), RULES[problem.rule]
    parts = sections(problem.length, cuts)
    given.keywords["cu_seqlens"] = torch.tensor([0, *(end for _, end in parts)])

    def separately(cu_seqlens, states, **arguments):
        leaves = {name: arguments.pop(name) for name in given.leaves}
        outs, finals = [], []
        for n, (start, end) in enumerate(parts):
            own = {name: x[n : n + 1] for name, x in states.items()} if states else None
            if start < end:
                out, own = rule.apply(**piece(leaves, start, end), states=own, **arguments)
                outs.append(out)
            finals.append(own)
        fresh = {name: torch.zeros_like(x) for name, x in next(filter(None, finals)).items()}
        finals = [final or fresh for final in finals]
        return torch.cat(outs, dim=1), {name: torch.cat([final[name] for final in finals]) for name in fresh}

    assert_agrees(outcome(rule.apply, given, "torch"), outcome(separately, given, "torch"), 1e-9)
