"""The operators on a GPU agree with the float64 recurrence on the processor."""

import pytest
import torch

from hf_fwp.rules import RULES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that PyTorch can use"),
]

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def inputs(rule: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    given = {name: torch.randn(2, 200, 3, 32) for name in ("q", "k", "v")}
    given["k"] = torch.nn.functional.normalize(given["k"].abs(), dim=-1)
    given["q"] = given["q"].abs()
    optional = {"beta": torch.rand(2, 200, 3), "g": -torch.rand(2, 200, 3)}
    return {name: x.to(dtype) for name, x in (given | {name: optional[name] for name in RULES[rule].inputs}).items()}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rule", RULES)
def test_the_gpu_computes_the_recurrence(rule, dtype):
    given = inputs(rule, dtype)
    q, k, v = (given.pop(name) for name in ("q", "k", "v"))
    exact = {name: x.double() for name, x in given.items()}
    truth, _ = RULES[rule].apply(q.double(), k.double(), v.double(), **exact, backend="reference")
    there = {name: x.cuda() for name, x in given.items()}
    out, _ = RULES[rule].apply(q.cuda(), k.cuda(), v.cuda(), **there)
    assert (out.cpu().double() - truth).norm() <= TOLERANCE[dtype] * truth.norm()
