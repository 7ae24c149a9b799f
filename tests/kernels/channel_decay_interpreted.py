"""The Triton kernels of the channel decay against the float64 recurrence, under Triton's interpreter or on a GPU.

Run by test_channel_decay.py in a process of its own: TRITON_INTERPRET must be set before triton is imported.
Memory that nothing was written to holds NaN.
"""

import dataclasses

import operators as problems
import pytest
import torch
import triton_interpreter
from kernel_checks import agrees
from operators import Problem

from hf_fwp.kernels import channel_decay as kernels
from hf_fwp.kernels import channel_decay_transposed as transposed
from hf_fwp.rules import RULES

CHOICES = problems.CHOICES | {
    "rule": problems.SERVED_BY_CHANNEL,
    "option": (0, 1),
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "length": (2, 64, 65, 100),
    "sizes": ((16, 16), (5, 7), (36, 20)),  # the last takes several tiles of keys
    "heads": ((2, 2, 2), (1, 2, 1), (1, 2, 2), (1, 1, 2)),
}
COVERING = [Problem(**row) for row in problems.pairwise(CHOICES)]
KIMI = Problem("kimi_delta", torch.float32, 65, layout="padded", heads=(1, 2, 1), qk_l2norm=True)

triton_interpreter.patch_once_per_launch()


@pytest.fixture(autouse=True)
def _poison():
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("problem", COVERING, ids=str)
def test_kernels_agree_with_the_recurrence(problem):
    agrees(problem)


@pytest.mark.parametrize("rule", ["kimi_delta", "gated_delta_net_2", "gated_oja"])
def test_padding_may_hold_nan(rule):
    problem = dataclasses.replace(KIMI, rule=rule, length=20)
    given = problems.tensors(problem)
    for x in given.leaves.values():
        x[~given.keywords["mask"]] = float("nan")
    agrees(problem, given)
