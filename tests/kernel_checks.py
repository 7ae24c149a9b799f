"""What the tests of the Triton kernels share: one comparison, and kernels that are launched wrongly on purpose."""

import operators as problems
import torch
from operators import Problem

from hf_fwp.rules import RULES

ROUNDING = 6e-7  # five units in the last place: a single token has hardly an error to double


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
