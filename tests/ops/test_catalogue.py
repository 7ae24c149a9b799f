"""What RULES says of a rule is what the rule does."""

import operators as problems
import pytest
import torch
from operators import Problem
from torch.utils._python_dispatch import TorchDispatchMode

from hf_fwp import catalogue
from hf_fwp.rules import RULES
from hf_fwp.rules.base import BACKENDS


class Counted(TorchDispatchMode):
    """How many operations ran."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(rule, length):
    given = problems.tensors(Problem(rule, length=length, sizes=(4, 4), heads=(2, 2, 2)))
    given.keywords["options"] = dict(RULES[rule].options)
    with torch.no_grad(), Counted() as counted:
        RULES[rule].apply(**given.leaves, states=given.states, backend="torch", **given.keywords)
    return counted.count


@pytest.mark.parametrize("rule", RULES)
def test_only_what_is_chunked_takes_no_step_for_every_token(rule):
    more = operations(rule, 64) - operations(rule, 33)  # both fill the same chunks
    assert (RULES[rule].parallel == "chunked") == (more < 31)
    assert RULES[rule].parallel in ("chunked", "mixed", "sequential")


@pytest.mark.parametrize("rule", RULES)
def test_the_size_of_the_state_is_that_of_what_is_returned(rule):
    given = problems.tensors(Problem(rule, length=3, sizes=(5, 5), heads=(1, 1, 1), layout="packed"))
    _, states = RULES[rule].apply(**given.leaves, **given.keywords | {"cu_seqlens": torch.tensor([0, 3])})
    assert sum(x.numel() for x in states.values()) == RULES[rule].state_size(5, 5)
    assert catalogue.rule_table()[rule][catalogue.STATE] == str(RULES[rule].state_size(64, 64))


@pytest.mark.parametrize("rule", RULES)
def test_a_backend_that_is_not_named_is_refused(rule):
    """Those that are named are run by every test of an operator, the kernels by those in tests/kernels."""
    assert set(RULES[rule].backends) <= set(BACKENDS)
    given = problems.tensors(Problem(rule, torch.float32, 1)).copy(torch.float32)
    for backend in RULES[rule].backends:
        if backend != "triton":
            RULES[rule].apply(**given.leaves, states=given.states, backend=backend, **given.keywords)
    for backend in set(BACKENDS) - set(RULES[rule].backends):
        with pytest.raises(ValueError, match=backend):
            RULES[rule].apply(**given.leaves, states=given.states, backend=backend, **given.keywords)


@pytest.mark.parametrize("rule", RULES)
def test_triton_is_named_where_kernels_serve_the_rule(rule):
    """A rule without kernels says so; one with kernels says what is wrong with these tensors."""
    if RULES[rule].own:
        served = getattr(RULES[rule].apply.args[0], "kernel", None) is not None
    else:
        given = problems.tensors(Problem(rule))
        with pytest.raises(ValueError, match="triton") as refused:
            RULES[rule].apply(**given.leaves, states=given.states, backend="triton", **given.keywords)
        served = "has no kernel" not in str(refused.value)
    assert ("triton" in RULES[rule].backends) == served, f"change RULES[{rule!r}].backends"


def test_a_table_in_markdown():
    rows = {"a": {"what": "S + k", "where": "here"}}
    expected = "| rule | what | where |\n| --- | --- | --- |\n| `a` | `S + k` | here |"
    assert catalogue.markdown(rows, first="rule", code=("what",)) == expected
