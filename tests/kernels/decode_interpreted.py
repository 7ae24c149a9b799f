"""Run by tests/kernels/test_decode.py in a process of its own, with TRITON_INTERPRET=1: the decode kernel, interpreted.

bf16 is left out: the interpreter computes it wrongly without saying so.
"""

import importlib.util
import itertools
import sys
from dataclasses import replace
from pathlib import Path

import operators as problems
import pytest
import torch
import triton_interpreter
from operators import Problem

from hf_fwp.kernels import decode
from hf_fwp.rules import RULES, linear_class

CHOICES = problems.CHOICES | {
    "rule": (*problems.SERVED, *problems.SERVED_BY_CHANNEL),
    "option": (0, 1),
    "dtype": (torch.float32, torch.float16),
    "length": (1,),
    "layout": ("plain", "padded"),
    "sizes": ((16, 16), (24, 40), (5, 7), (64, 33), (256, 8)),
}
COVERING = [Problem(**row) for row in problems.pairwise(CHOICES)]
SOURCE = Path(decode.__file__).read_text()
triton_interpreter.patch()

# What the kernel does, and what a broken kernel would do instead.
MUTATIONS = {
    "decay forgotten": ("decayed = state * tl.exp(tl.load(g", "decayed = state + 0 * tl.exp(tl.load(g"),
    "decay not exponentiated": ("tl.exp(tl.load(g + pair", "(1 + tl.load(g + pair"),
    "beta forgotten": ("write = write * tl.load(beta", "write = write + 0 * tl.load(beta"),
    "nothing erased": ("write = write - tl.sum(erase[:, None] * decayed, 0)", "write = write"),
    "erased before the decay": ("tl.sum(erase[:, None] * decayed, 0)", "tl.sum(erase[:, None] * state, 0)"),
    "read before the write": ("tl.sum(query[:, None] * new, 0)", "tl.sum(query[:, None] * decayed, 0)"),
    "scale forgotten": ("L2NORM) * scale", "L2NORM)"),
    "state not stored": ("tl.store(after + at, new, mask=here)", "pass"),
    "mask ignored": ("valid = tl.load(mask + n) != 0", "valid = tl.load(mask + n) < 2"),
    "key of another head": ("head // (VALUE_HEADS // HEADS)", "head % HEADS"),
    "query of another read": ("SHARE else pair * QUERIES + i", "SHARE else pair * QUERIES"),
    "norm forgotten": ("value = value * tl.rsqrt(", "value = value + 0 * tl.rsqrt("),
    "columns of the first tile": ("tl.program_id(1) * BLOCK_V + tl", "0 * tl.program_id(1) * BLOCK_V + tl"),
    "last rows lost": ("here = (rows < K)", "here = (rows < K - 1)"),
}
STRICT = Problem(
    "gated_delta_net", torch.float32, 1, layout="padded", sizes=(24, 40), heads=(2, 4, 8), qk_l2norm=True, seed=2
)
GATES, VECTOR = (replace(STRICT, rule=rule) for rule in ("gated_delta_net_2", "comba"))
# the same of what only rules with a decay per channel, or a direction of their own to erase along, do
MUTATIONS_OF = {
    "decay of a channel forgotten": (GATES, "state * tl.exp(_load_row(g", "state + 0 * tl.exp(_load_row(g"),
    "decay of another channel": (GATES, "_load_row(g, pair, rows", "_load_row(g, pair, 0 * rows"),
    "gate of another head": (GATES, "_load_row(along, pair, rows", "_load_row(along, pair // 2, rows"),
    "gate taken for a vector": (GATES, "ALONG == 2", "ALONG == 3"),
    "vector taken for a gate": (VECTOR, "ALONG == 2", "ALONG > 0"),
    "erased along the key": (VECTOR, "ALONG > 0:", "ALONG > 2:"),
}


@pytest.fixture(autouse=True)
def _kernel_instead_of_torch(monkeypatch):
    """The rules take the kernel on the processor too, and every output is NaN until it is written."""
    monkeypatch.setattr(linear_class, "has_decode_kernel", lambda device_type: True)
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **kw: empty(*a, **kw).fill_(float("nan")))


def decoded(problem: Problem, in_place: bool) -> None:
    """Raise AssertionError unless one step of the kernel agrees with the float64 recurrence."""
    given, rule = problems.tensors(problem), RULES[problem.rule]
    tensors = given.copy(problem.dtype)
    if problem.layout == "padded":
        with torch.no_grad():
            for x in tensors.leaves.values():
                x[~given.keywords["mask"]] = float("nan")
    before = {name: x.detach().clone() for name, x in tensors.states.items()}
    with torch.no_grad():
        out, states = rule.apply(
            **tensors.leaves, states=tensors.states or None, backend="step", in_place=in_place, **tensors.keywords
        )
    expected = problems.truth(given, rule)
    result = {"out": out} | {f"final {name}": x.detach() for name, x in states.items()}
    tolerance = problems.TOLERANCE[problem.dtype]
    assert out.dtype == problem.dtype
    assert all(torch.isfinite(x).all() for x in result.values()), "relative error: not written"
    problems.assert_agrees(result, {name: expected[name] for name in result}, tolerance)
    for name, x in tensors.states.items():
        assert torch.equal(x.detach(), states[name] if in_place else before[name])


@pytest.mark.parametrize("problem", COVERING, ids=str)
@pytest.mark.parametrize("in_place", [False, True])
def test_agrees_with_the_recurrence(problem, in_place):
    decoded(problem, in_place)


def test_a_state_that_is_not_contiguous_is_updated_in_place():
    given = problems.tensors(Problem("delta_net", torch.float32, 1, sizes=(8, 16), heads=(2, 2, 2))).copy(torch.float32)
    apply, state = RULES["delta_net"].apply, given.states["state"].detach()
    turned = state.transpose(2, 3).contiguous().transpose(2, 3)
    with torch.no_grad():
        expected = apply(**given.leaves, states={"state": state.clone()}, in_place=True, **given.keywords)[1]["state"]
        apply(**given.leaves, states={"state": turned}, in_place=True, **given.keywords)
    torch.testing.assert_close(turned, expected)
    assert not torch.equal(turned, state)


def test_many_steps_are_the_whole_sequence():
    given = problems.tensors(Problem("gated_delta_net", torch.float32, 20, sizes=(16, 16), heads=(2, 4, 4)))
    rule, tensors = RULES["gated_delta_net"], given.copy(torch.float32)
    state = tensors.states["state"].detach().clone()
    with torch.no_grad():
        for t in range(20):
            token = {name: x[:, t : t + 1] for name, x in tensors.leaves.items()}
            out, _ = rule.apply(**token, states={"state": state}, in_place=True)
    expected = problems.truth(given, rule)
    result = {"out": out, "state": state}
    problems.assert_agrees(result, {"out": expected["out"][:, -1:], "state": expected["final state"]}, 1e-5)


def test_a_step_that_needs_gradients_is_left_to_torch():
    given = problems.tensors(Problem("gated_delta_net", torch.float32, 1)).copy(torch.float32)
    out, _ = RULES["gated_delta_net"].apply(**given.leaves, backend="step", **given.keywords)
    assert out.requires_grad


@pytest.mark.parametrize("option", [0, 1])
@pytest.mark.parametrize("rule", problems.SERVED)
def test_compiles_without_graph_breaks(rule, option):
    given = problems.tensors(Problem(rule, torch.float32, 1, option=option)).copy(torch.float32)
    leaves = {name: x.detach() for name, x in given.leaves.items()}

    def step(states):
        out, after = RULES[rule].apply(**leaves, states=states, in_place=True, **given.keywords)
        return out, after["state"]

    with torch.no_grad():
        eager, traced = ({name: x.detach().clone() for name, x in given.states.items()} for _ in range(2))
        expected = step(eager)
        found = torch.compile(step, fullgraph=True, backend="aot_eager")(traced)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(traced, eager)
    assert not torch.equal(traced["state"], given.states["state"])


@pytest.mark.parametrize("rule", problems.SERVED_BY_CHANNEL)
def test_a_rule_takes_the_kernel(rule, monkeypatch):
    launched = []
    launch = decode._launch
    monkeypatch.setattr(decode, "_launch", lambda *given: (launched.append(given), launch(*given)))
    decoded(Problem(rule, torch.float32, 1), in_place=True)
    assert len(launched) == (0 if rule in ("oja", "gated_oja") else 1)  # those are read across their states


@pytest.mark.parametrize(("has_state", "has_gates"), list(itertools.product([False, True], repeat=2)))
def test_opcheck(has_state, has_gates, monkeypatch):
    monkeypatch.undo()  # opcheck compares runs, and NaN is not equal to NaN
    q, k, v = torch.randn(2, 1, 2, 8), torch.randn(2, 1, 2, 8), torch.randn(2, 1, 4, 16)
    beta, g = (torch.rand(2, 1, 4), -torch.rand(2, 1, 4)) if has_gates else (None, None)
    state = torch.randn(2, 4, 8, 16) if has_state else None
    arguments = (state, q, k, v, beta, g, None, None, 0.5, True, False, True)
    torch.library.opcheck(decode.decode_anew, arguments)
    if has_state:
        torch.library.opcheck(decode.decode_in_place, arguments)


def test_the_strict_problem_has_something_of_everything():
    for problem in (STRICT, GATES, VECTOR):
        decoded(problem, in_place=True)
    assert 0 < problems.tensors(STRICT).keywords["mask"].sum() < 2


@pytest.mark.parametrize("name", [*MUTATIONS, *MUTATIONS_OF])
def test_a_broken_kernel_is_rejected(name, tmp_path, monkeypatch):
    problem, right, wrong = MUTATIONS_OF[name] if name in MUTATIONS_OF else (STRICT, *MUTATIONS[name])
    assert SOURCE.count(right) == 1, f"{right!r} is no longer in the kernel"
    file = tmp_path / "mutant.py"
    operator = f"mutant{[*MUTATIONS, *MUTATIONS_OF].index(name)}::"
    file.write_text(SOURCE.replace(right, wrong).replace("hf_fwp::", operator))
    spec = importlib.util.spec_from_file_location("hf_fwp.kernels.mutant", file)
    mutant = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, mutant)
    spec.loader.exec_module(mutant)
    monkeypatch.setattr(decode, "decode_step", mutant.decode_step)
    with pytest.raises(AssertionError, match="relative error"):
        decoded(problem, in_place=True)
