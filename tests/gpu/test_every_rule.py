"""The operators on a GPU agree with the float64 recurrence on the processor."""

import operators as problems
import pytest
import torch
from operators import Problem

from hf_fwp.rules import RULES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that PyTorch can use"),
]

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rule", RULES)
def test_the_gpu_computes_the_recurrence(rule, dtype):
    given = problems.tensors(Problem(rule, dtype, length=200, sizes=(32, 32), heads=(3, 3, 3), initial=False))
    with torch.no_grad():
        truth, _ = RULES[rule].apply(**given.leaves, backend="reference", **given.keywords)
        there = given.copy(dtype)
        weights = {name: x.cuda() for name, x in there.weights.items()}
        keywords = there.keywords | ({"weights": weights} if weights else {})
        out, _ = RULES[rule].apply(**{name: x.cuda() for name, x in there.leaves.items()}, **keywords)
    assert (out.cpu().double() - truth).norm() <= TOLERANCE[dtype] * truth.norm()
