"""The Triton kernels of the linear class against the float64 recurrence, under Triton's interpreter or on a GPU.

Run by test_linear_class.py in a process of its own: TRITON_INTERPRET must be set before triton is imported.
Memory that nothing was written to holds NaN.
"""

import dataclasses

import operators as problems
import pytest
import torch
import triton
import triton_interpreter
from operators import Problem

from hf_fwp import ops
from hf_fwp.kernels import linear_class as kernels
from hf_fwp.rules import RULES

CHOICES = problems.CHOICES | {
    "rule": problems.SERVED,
    "option": (0, 1),
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "sizes": ((16, 16), (5, 7), (40, 20), (16, 36)),  # the last two take several tiles of keys and values
    "heads": ((2, 2, 2), (1, 2, 1), (1, 2, 2), (1, 1, 2)),
}
COVERING = [Problem(**row) for row in problems.pairwise(CHOICES)]
GATED = Problem("gated_delta_net", torch.float32, 65, layout="padded", heads=(1, 2, 1), qk_l2norm=True)

triton_interpreter.patch_once_per_launch()


@pytest.fixture(autouse=True)
def _poison():
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def agrees(problem: Problem, given: problems.Tensors | None = None) -> None:
    """float32: at most twice the error of the PyTorch backend, tensor by tensor. Half precision: the common tolerance,
    because the PyTorch backend multiplies in float32 there and only rounds its results."""
    clean, rule = problems.tensors(problem), RULES[problem.rule]
    expected = problems.truth(clean, rule)
    result = problems.outcome(rule.apply, (given or clean).copy(problem.dtype), "triton")
    assert result["out"].dtype == problem.dtype
    assert result["final state"].dtype == torch.float32
    if problem.dtype != torch.float32:
        problems.assert_agrees(result, expected, problems.TOLERANCE[problem.dtype])
        return
    by_torch = problems.outcome(rule.apply, clean.copy(problem.dtype), "torch")
    for name, x in result.items():
        assert expected.keys() == result.keys()
        size = max(float(expected[name].norm()), 0.05 * expected[name].numel() ** 0.5)
        allowed = max(2 * float((by_torch[name].double() - expected[name]).norm()), ROUNDING * size)
        error = float((x.double() - expected[name]).norm())
        assert error <= allowed, f"{name}: relative error {error / size:.1e}, allowed {allowed / size:.1e}"


ROUNDING = 6e-7  # five units in the last place: a single token has hardly an error to double


@pytest.mark.parametrize("problem", COVERING, ids=str)
def test_kernels_agree_with_the_recurrence(problem):
    agrees(problem)


def test_padding_may_hold_nan():
    given = problems.tensors(GATED)
    for x in given.leaves.values():
        x[~given.keywords["mask"]] = float("nan")
    agrees(GATED, given)


def test_many_short_sequences_find_their_chunks():
    given = problems.tensors(Problem("gated_delta_net", torch.float32, 131, False, "packed", heads=(1, 1, 1)))
    given.keywords["cu_seqlens"] = torch.tensor([0, 1, 1, 65, 66, 67, 131, 131], dtype=torch.int32)
    result = problems.outcome(RULES["gated_delta_net"].apply, given.copy(torch.float32), "triton")
    problems.assert_agrees(result, problems.truth(given, RULES["gated_delta_net"]), 3e-6)


def test_the_inverse_keeps_its_digits_with_correlated_keys():
    """Keys with cosine 0.9 to each other, β = 1.9: where a Neumann series has no correct digit. Keys and β are
    multiples of 1/64, so that the triangle itself is exact in float32: rounding it alone costs 2e-6 of the inverse."""
    unit = torch.nn.functional.normalize
    common, own = torch.randn(1, 1, 1, 32), torch.randn(1, 100, 1, 32)
    k = unit(0.9**0.5 * unit(common, dim=-1) + 0.1**0.5 * unit(own, dim=-1), dim=-1)
    k, rate = (64 * k).round() / 64, 122 / 64
    beta = torch.full((1, 100, 1), rate)
    settings = (1.0, 0.0, True, False, True)
    _, _, solve, *_ = kernels.linear_class_forward(k, k, k, beta, *[None] * 6, *settings)
    for chunk, keys in zip(solve[:, 0], k[0, :, 0].double().split(64), strict=True):
        size = keys.shape[0]
        exact = torch.linalg.inv(torch.eye(size).double() + (rate * keys @ keys.mT).tril(-1))
        assert (chunk[:size, :size] - exact).norm() <= 1e-6 * exact.norm()
        assert torch.equal(chunk, chunk.tril())


def test_long_sums_of_a_strong_decay_stay_exact():
    given = problems.tensors(Problem("gated_delta_net", torch.float32, 64, heads=(1, 1, 1)))
    given.leaves["g"] *= 8
    result = problems.outcome(RULES["gated_delta_net"].apply, given.copy(torch.float32), "triton")
    problems.assert_agrees(result, problems.truth(given, RULES["gated_delta_net"]), 2e-6)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("erase", [False, True])
def test_opcheck(packed, erase):
    q, k, v = (torch.randn(1, 20, 1, 4, requires_grad=True) for _ in range(3))
    beta = torch.rand(1, 20, 1, requires_grad=True) if erase else None
    g = (-torch.rand(1, 20, 1)).requires_grad_()
    state = torch.randn(2 if packed else 1, 1, 4, 4, requires_grad=True)
    bounds = torch.tensor([0, 9, 20]) if packed else None
    torch.use_deterministic_algorithms(False)  # NaN where nothing is written differs from itself
    mask, settings = torch.ones(1, 20).bool(), (0.5, 0.0, erase, True, True)
    arguments = (q, k, v, beta, g, None, None, state, mask, bounds, *settings)
    torch.library.opcheck(kernels.linear_class_forward, arguments, test_utils=("test_schema", "test_faketensor"))


def test_compiles_without_graph_breaks():
    q, k, v = (torch.randn(1, 20, 1, 4).requires_grad_() for _ in range(3))
    beta, g = torch.rand(1, 20, 1).requires_grad_(), (-torch.rand(1, 20, 1)).requires_grad_()
    leaves = (q, k, v, g, beta)

    def loss():
        out, state = ops.gated_delta_rule(
            *leaves, use_qk_l2norm_in_kernel=True, output_final_state=True, backend="triton"
        )
        return out.sum() + state.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(), leaves), torch.autograd.grad(loss(), leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_without_a_gradient_no_state_is_kept():
    q = torch.randn(1, 65, 1, 4)
    for keep in (False, True):
        settings = (1.0, 0.0, True, True, keep)
        _, _, solve, states, _ = kernels.linear_class_forward(q, q, q, torch.rand(1, 65, 1), *[None] * 6, *settings)
        assert solve.numel() == keep * 2 * 64 * 64
        assert states.numel() == keep * 2 * 4 * 4


REFUSED = {
    "float64": ({"v": torch.zeros(1, 3, 1, 4).double()}, "a tensor is float64"),
    "size": ({"v": torch.zeros(1, 3, 1, 300)}, "heads have size 300, and in 32 bits the kernels go up to 128"),
    "devices": ({"beta": torch.zeros(1, 3, 1, device="meta")}, "several devices: cpu, meta"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_reason(case):
    change, message = REFUSED[case]
    given = {name: torch.zeros(1, 3, 1, 4) for name in ("q", "k", "v")} | {"beta": torch.zeros(1, 3, 1)}
    with pytest.raises(ValueError, match=f"'triton' cannot run this: .*{message}.*; use 'torch'"):
        ops.delta_rule(**(given | change), backend="triton")


class Changed:
    """A kernel that is launched in another way: `change` gets the grid, the tensors and the constants."""

    def __init__(self, kernel, change):
        self.kernel, self.change = kernel, change

    @property
    def arg_names(self):
        return self.kernel.arg_names

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            changed = self.change(grid, list(arguments), constants)
            if changed is not None:
                grid_now, arguments_now, constants_now = changed
                self.kernel[grid_now](*arguments_now, **constants_now)

        return launch


def not_at_all(grid, arguments, constants):
    return None


def one_program_less(grid, arguments, constants):
    return (grid[0] - 1,), arguments, constants


def without(name):
    def change(grid, arguments, constants):
        return grid, arguments, constants | {name: not constants[name]}

    change.__name__ = f"other {name}"
    return change


ANY = (not_at_all, one_program_less, *map(without, ("HAS_G", "HAS_MASK", "L2NORM", "HAS_BETA")))
MUTATIONS = [
    *(("invert_chunks", change) for change in ANY),
    *(("scan_forward", change) for change in (*ANY, without("ERASE"), without("HAS_STATE"))),
    *(("scan_backward", change) for change in (*ANY, without("ERASE"), without("HAS_FINAL"))),
    *(("gradients", change) for change in (*ANY, without("ERASE"))),
]


@pytest.mark.parametrize(("kernel", "change"), MUTATIONS, ids=lambda x: getattr(x, "__name__", x))
def test_a_broken_kernel_is_noticed(kernel, change, monkeypatch):
    monkeypatch.setattr(kernels, kernel, Changed(getattr(kernels, kernel), change))
    problem = dataclasses.replace(GATED, sizes=(4, 4), length=18)
    with pytest.raises(AssertionError, match="relative error"):
        agrees(problem)


def test_the_interpreter_or_a_gpu_runs_this():
    assert kernels.interpreted() or torch.cuda.is_available(), triton.__version__
