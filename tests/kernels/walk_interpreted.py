"""The kernels of the sequential rules against the float64 recurrence, under Triton's interpreter or on a GPU.

Run by test_walk.py in a process of its own: TRITON_INTERPRET must be set before triton is imported. Memory that nothing
was written to holds NaN. Segments are three tokens long, so that five tokens are two segments.
"""

import dataclasses
import importlib.util
import itertools
import sys
from pathlib import Path

import operators as problems
import pytest
import torch
import triton_interpreter
from operators import WALKS_WITH, Problem

from hf_fwp.kernels import srwm as srwm_kernel
from hf_fwp.kernels import twins
from hf_fwp.kernels import walk as frame
from hf_fwp.rules import RULES, sequential, walk

FOLDER = Path(frame.__file__).parent
SERVED = [name for name, rule in RULES.items() if rule.own and rule.apply.args[0].kernel is not None]
# delta_mlp has a number for every depth: two show what there is to see
VARIANTS = [(rule, number) for rule, number in problems.every_variant(SERVED) if rule != "delta_mlp" or number < 2]
triton_interpreter.patch()


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    monkeypatch.setattr(walk, "SHORTEST", 3)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def problem(rule, number=0, **changes):
    sizes = (5, 5) if RULES[rule].square or rule == "ba_fast_weights" else (5, 7)
    given = {"dtype": torch.float32, "length": 5, "heads": (1, 1, 1), "sizes": sizes, "option": number}
    return Problem(rule, **given | changes)


def agrees(given_problem, given=None):
    """At most 1e-5, or twice the error of the recurrence in float32."""
    clean, rule = problems.tensors(given_problem), RULES[given_problem.rule]
    result = problems.outcome(rule.apply, (given or clean).copy(given_problem.dtype), "triton")
    assert result["out"].dtype == given_problem.dtype
    assert all(x.isfinite().all() for x in result.values()), "relative error: not finite"
    tolerance, yardstick = problems.TOLERANCE[given_problem.dtype], None
    if given_problem.dtype == torch.float32:
        yardstick = problems.outcome(rule.apply, clean.copy(torch.float32), "reference")
    problems.assert_agrees(result, problems.truth(clean, rule), tolerance, yardstick)


LAYOUTS = ("padded", "plain", "packed")
AGREE = [
    pytest.param(
        problem(rule, number, layout=LAYOUTS[i % 3], initial=i % 4 != 3, seed=i),
        marks=pytest.mark.slow if number > 1 or (rule, number) == ("delta_mlp", 1) else (),
    )
    for i, (rule, number) in enumerate(VARIANTS)
]
TYPES = [
    problem("recurrent_delta_net", dtype=torch.bfloat16),
    problem("delta_rnn", dtype=torch.float16, sizes=(16, 16), layout="packed"),
    problem("srwm", length=1, sizes=(20, 3)),
]


@pytest.mark.parametrize("case", AGREE + TYPES, ids=str)
def test_kernels_agree_with_the_recurrence(case):
    agrees(case)


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "layout"), list(itertools.product(SERVED, LAYOUTS)))
def test_longer_sequences_of_several_heads_agree(rule, layout):
    agrees(problem(rule, WALKS_WITH.get(rule, 0), length=11, layout=layout, heads=(2, 2, 2), sizes=(20, 20)))


@pytest.mark.parametrize("rule", ["self_modifying_delta", "delta_delta"])
def test_wide_values_are_split_over_programs(rule, monkeypatch):
    monkeypatch.setattr(sequential, "LARGEST", 16)
    monkeypatch.setattr(srwm_kernel, "LARGEST", 16)
    agrees(problem(rule, layout="padded", heads=(2, 2, 2), length=3))


def test_padding_may_hold_nan():
    case = problem("recurrent_delta_net", layout="padded")
    given = problems.tensors(case)
    for x in given.leaves.values():
        x[~given.keywords["mask"]] = float("nan")
    agrees(case, given)


@pytest.mark.parametrize("rule", ["recurrent_delta_net", "srwm", "fwp_1993"])
def test_a_masked_token_leaves_the_states_bit_for_bit(rule):
    given = problems.tensors(problem(rule, 2)).copy(torch.float32)
    keywords = given.keywords | {"mask": torch.zeros(2, 5).bool()}
    out, final = RULES[rule].apply(**given.leaves, states=given.states, backend="triton", **keywords)
    assert not out.any()
    assert all(torch.equal(final[name], x) for name, x in given.states.items())


def arguments(keep, mask=None):
    """A walk of the recurrent delta net, K = 3 and V = 2, over five tokens."""
    x, w, s = torch.randn(1, 5, 1, 9), torch.randn(1, 18), torch.randn(1, 1, 8)
    leaves = [a.requires_grad_(keep) for a in (x, w, s)]
    return (*leaves, mask, "recurrent_delta_net", [3, 2], [], keep)


def test_states_are_kept_for_a_gradient_alone_and_one_in_a_segment():
    assert frame.forward(*arguments(keep=False))[2].numel() == 0
    assert frame.forward(*arguments(keep=True))[2].shape == (1, 1, 2, 8)


@pytest.mark.parametrize("mask", [None, torch.tensor([[True, False, True, True, True]])])
def test_opcheck(mask):
    torch.use_deterministic_algorithms(False)  # NaN where nothing is written differs from itself
    for keep in (False, True):
        torch.library.opcheck(frame.forward, arguments(keep, mask), test_utils=("test_schema", "test_faketensor"))


def test_compiles_without_graph_breaks():
    given = problems.tensors(problem("recurrent_delta_net")).copy(torch.float32)
    leaves = [*given.leaves.values(), *given.weights.values(), *given.states.values()]

    def loss():
        out, states = RULES["recurrent_delta_net"].apply(
            **given.leaves, states=given.states, backend="triton", **given.keywords
        )
        return out.sum() + states["state"].square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(), leaves), torch.autograd.grad(loss(), leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_a_rule_without_a_kernel_says_so():
    form = dataclasses.replace(RULES["srwm"].apply.args[0], kernel=None)
    given = problems.tensors(problem("srwm")).copy(torch.float32)
    with pytest.raises(ValueError, match="'triton' cannot run this: srwm has no kernel; use 'torch'"):
        sequential.apply_form(form, **given.leaves, backend="triton", **given.keywords)


def test_heads_that_are_too_large_are_refused():
    for rule, what, sizes in (
        ("srwm", "keys of size 129, and the kernel goes up to 128", (129, 3)),
        ("srwm", "values of size 129, and the kernel goes up to 128", (3, 129)),
        ("fast_weight_memory", "keys of size 33, and the kernel goes up to 32", (33, 33)),
    ):
        given = problems.tensors(problem(rule, length=1, sizes=sizes))
        with pytest.raises(ValueError, match=f"heads have {what}; use 'torch'"):
            RULES[rule].apply(**given.leaves, backend="triton", **given.keywords)


# What a kernel does, and what a broken one would do instead.
MUTATIONS = [
    ("recurrent_delta_net", "h = tanh(y)\n", "h = y\n"),
    ("recurrent_delta_net", "+ read(r_q, h), K, BK", ", K, BK"),
    ("recurrent_delta_net", "d_y += d_out", "d_y += 0 * d_out"),
    ("recurrent_delta_net", "d_memory + outer(q, d_y)", "d_memory"),
    ("recurrent_delta_net", "d_k + d_e", "d_k"),
    ("recurrent_delta_net", "+ r_b * d_b", ""),
    ("recurrent_delta_net", "store_vector(note, h, V, BV)", "store_vector(note, y, V, BV)"),
    ("recurrent_delta_net", "store_vector(s + K * V, y, V, BV)", "store_vector(s + K * V, 0 * y, V, BV)"),
    ("delta_rnn", "return d_matrix, d_y", "return d_matrix, 0 * d_y"),
    ("delta_rnn", "d_y = softmax_back(s, spread(after, d_z))", "d_y = spread(after, d_z)"),
    ("delta_rnn", "spread(after, d_z))", "spread(matrix, d_z))"),
    ("delta_lstm", "(1.0 - i) * d_c", "d_c"),
    ("delta_lstm", "d_o_matrix, s, d_a_o", "d_i_matrix, s, d_a_o"),
    ("delta_lstm", "9 * V - gate * (V - 1), d_beta", "9 * V - gate * V, d_beta"),
    ("srwm", "d_rate_y, d_rate_q", "d_rate_q, d_rate_y"),
    ("srwm", "d_k_b + d_e)", "d_k_b)"),
    ("srwm", "y = read(w_y, x)\n    q, k", "y = 0 * read(w_y, x)\n    q, k"),
    ("fwp_1993", "+ OPT[2] + s_1", ""),
    ("fwp_1993", "h_before, d_a), d_s_1", "h, d_a), d_s_1"),
    ("fwp_1993", "store_vector(note, h_before", "store_vector(note, h"),
    ("ba_fast_weights", "+ read(d_matrix, h))", ")"),
    ("ba_fast_weights", "d_sum = normalized_back(n, inverse, d_a * gain, V, BV)", "d_sum = inverse * d_a * gain"),
    ("ba_fast_weights", "return OPT[0] * d_matrix", "return d_matrix"),
    ("fwp_1991", "d_s *= 1.0 - s * s", "d_s *= 1.0 + s * s"),
    ("fwp_1991", "matrix - OPT[2],", "matrix,"),
    ("continuous_fwp", "beta * d_written - read(matrix, d_k)", "beta * d_written"),
    ("continuous_fwp", "d_matrix -= outer(d_k, v)", "d_matrix += outer(d_k, v)"),
    ("continuous_fwp", "d_key - spread(matrix, d_v)", "d_key"),
    ("continuous_fwp", "(1.0 - value * value)", "value"),
    ("lstm", "V, BV) + 1.0)", "V, BV))"),
    ("lstm", "return d_before, d_c * f", "return d_before, d_c"),
    ("lstm", "d_before += back_through(d_c * c", "d_before = back_through(d_c * c"),
    ("lstm", "store_vector(note, h, V, BV)", "store_vector(note, c, V, BV)"),
    ("fast_weight_memory", "(a * K + b) * K", "(b * K + a) * K"),
    ("fast_weight_memory", "memory *= shrinking(memory, OPT[0])", ""),
    ("fast_weight_memory", "factor * (d_memory - along * memory)", "factor * d_memory"),
    ("fast_weight_memory", "where(factor < 1.0, ", "where(True, "),
    ("fast_weight_memory", "d_memory += outer(pair(q, r_i, BK), d_read)", ""),
    ("fast_weight_memory", "spread(d_outer, b), read(d_outer, a)", "read(d_outer, a), spread(d_outer, b)"),
    ("cells", "-spread(s, d_v)", "spread(s, d_v)"),
    ("cells", "d_s - outer(e, d_v)", "d_s"),
    ("cells", "outer(k, beta * (v - read(s, e)))", "outer(k, beta * v - read(s, e))"),
]
# the options, where they are not those of WALKS_WITH
NOTICED_WITH = {
    "+ OPT[2] + s_1": 2,
    "matrix - OPT[2],": 2,
    "d_key - spread(matrix, d_v)": 3,
    "(1.0 - value * value)": 3,
}
QUICK = {"recurrent_delta_net", "cells"}
BROKEN = [
    pytest.param(*row, id=f"{row[0]}-{i}", marks=() if row[0] in QUICK else pytest.mark.slow)
    for i, row in enumerate(MUTATIONS)
]


def load(name, source, folder, monkeypatch):
    """A module of hf_fwp.kernels from changed source; Triton reads the source again, so it must be a file."""
    file = folder / f"{name}.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location(f"hf_fwp.kernels.{name}", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    if name in twins.WALKS:
        monkeypatch.setitem(twins.WALKS, name, module.walk)


@pytest.mark.parametrize(("module", "right", "wrong"), BROKEN)
def test_a_broken_kernel_is_noticed(module, right, wrong, tmp_path, monkeypatch):
    source = (FOLDER / f"{module}.py").read_text()
    assert source.count(right) == 1, f"{right!r} is no longer in {module}.py"
    name, user = module, source.replace(right, wrong)
    if module == "cells":
        load("broken_cells", user, tmp_path, monkeypatch)
        name = "delta_rnn"
        user = (FOLDER / f"{name}.py").read_text().replace("from .cells", "from .broken_cells")
    load(name, user, tmp_path, monkeypatch)
    rule = "fast_weight_memory" if name == "lstm" else name
    with pytest.raises(AssertionError, match="relative error"):
        agrees(problem(rule, NOTICED_WITH.get(right, WALKS_WITH.get(rule, 0)), seed=3))


class Changed:
    """A kernel that is launched in another way: `change` gets the grid and the constants."""

    def __init__(self, kernel, change):
        self.kernel, self.change = kernel, change

    def __getitem__(self, grid):
        def launch(*given, **constants):
            grid_now, constants_now = self.change(grid, constants)
            if grid_now[0]:
                self.kernel[grid_now](*given, **constants_now)

        return launch


LAUNCHES = {
    "not launched": lambda grid, constants: ((0,), constants),
    "one program less": lambda grid, constants: ((grid[0] - 1,), constants),
    "mask forgotten": lambda grid, constants: (grid, constants | {"HAS_MASK": False}),
}


@pytest.mark.parametrize("change", LAUNCHES)
@pytest.mark.parametrize("kernel", ["walk_forward", "walk_backward"])
def test_a_wrong_launch_is_noticed(kernel, change, monkeypatch):
    monkeypatch.setattr(frame, kernel, Changed(getattr(frame, kernel), LAUNCHES[change]))
    with pytest.raises(AssertionError, match="relative error"):
        agrees(problem("recurrent_delta_net", layout="padded"))


def test_a_segment_that_starts_from_the_wrong_state_is_noticed(monkeypatch):
    backward = frame.backward
    monkeypatch.setattr(frame, "backward", lambda a, b, x, w, kept, *rest: backward(a, b, x, w, kept.roll(1, 2), *rest))
    with pytest.raises(AssertionError, match="relative error"):
        agrees(dataclasses.replace(problem("recurrent_delta_net"), initial=False))
