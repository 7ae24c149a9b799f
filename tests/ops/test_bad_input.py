"""What the operators refuse, and that they say what was given and what is allowed."""

import operators as problems
import pytest
import torch
from operators import Problem

from hf_fwp import ops
from hf_fwp.rules import RULES

T = 5
GOOD = {
    "q": torch.zeros(2, T, 2, 4),
    "k": torch.zeros(2, T, 2, 4),
    "v": torch.zeros(2, T, 2, 3),
    "g": torch.zeros(2, T, 2),
    "beta": torch.zeros(2, T, 2),
}
PACKED = {name: x[:1] for name, x in GOOD.items()}
BAD = {
    "unknown backend": ({"backend": "cuda"}, "unknown backend 'cuda'.*reference, torch, triton, step"),
    "triton": ({"backend": "triton"}, "Triton needs one of cuda, xpu"),
    "step with several tokens": ({"backend": "step"}, "one token per row, but T = 5"),
    "integers": ({"v": torch.zeros(2, T, 2, 3, dtype=torch.int64)}, "v has dtype torch.int64; allowed are float32"),
    "three dimensions": ({"q": torch.zeros(2, T, 8)}, "q has 3 dimensions"),
    "other length": ({"k": torch.zeros(2, 4, 2, 4)}, "differ"),
    "key size": ({"q": torch.zeros(2, T, 2, 6)}, "q has size 6 per head and k 4"),
    "value heads": ({"v": torch.zeros(2, T, 3, 3)}, "v has 3 heads and k 2"),
    "query heads": ({"q": torch.zeros(2, T, 3, 4)}, "q has 3 heads"),
    "beta": ({"beta": torch.zeros(2, T, 1)}, r"beta has shape \[2, 5, 1\]"),
    "g": ({"g": torch.zeros(2, T, 2, 5)}, r"g has shape \[2, 5, 2, 5\]"),
    "mask": ({"mask": torch.ones(2, 4)}, r"mask has shape \[2, 4\]"),
    "additive mask": ({"mask": torch.tensor([[0.0] * T, [0.0] * 4 + [-1e9]])}, "1 for tokens and 0 for padding"),
    "state shape": ({"initial_state": torch.zeros(2, 2, 3, 4)}, r"state has shape .* need \[2, 2, 4, 3\]"),
    "state dtype": ({"initial_state": torch.zeros(2, 2, 4, 3).bfloat16()}, "must be torch.float32"),
    "packed batch": ({"cu_seqlens": torch.tensor([0, T])}, "but B = 2"),
    "packed floats": (PACKED | {"cu_seqlens": torch.tensor([0.0, 5.0])}, "int32 or int64"),
    "packed end": (PACKED | {"cu_seqlens": torch.tensor([0, 3])}, "end with T = 5"),
    "packed order": (PACKED | {"cu_seqlens": torch.tensor([0, 4, 3, 5])}, "never decrease"),
    "no decay": ({"g": None}, "g .* was not given|g is"),
    "scale 0": ({"scale": 0.0}, "scale is 0.0; it must be a number other than 0"),
    "scale to learn": ({"scale": torch.tensor(0.5, requires_grad=True)}, "multiply the outputs"),
    "empty": ({name: x[:, :0] for name, x in GOOD.items()}, "T = 0"),
}


@pytest.mark.parametrize("layout", ["plain", "padded", "packed"])
@pytest.mark.parametrize(("rule", "number"), problems.every_variant())
def test_every_rule_refuses_an_empty_sequence(rule, number, layout):
    given = problems.tensors(Problem(rule, length=3, layout=layout, heads=(2, 2, 2), option=number))
    nothing = {name: x[:, :0] for name, x in given.leaves.items()}
    if layout != "plain":
        given.keywords |= {"padded": {"mask": torch.ones(2, 0)}, "packed": {"cu_seqlens": torch.tensor([0, 0])}}[layout]
    for backend in (None, "torch", "reference", "step"):
        with pytest.raises(ValueError, match="T = 0"):
            RULES[rule].apply(**nothing, backend=backend, **given.keywords)


@pytest.mark.parametrize("case", BAD)
def test_refused_with_a_sentence(case):
    change, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        ops.gated_delta_rule(**(GOOD | change))


@pytest.mark.parametrize("rule", ["linear_attention", "gated_delta_net"])
def test_forward_mode_derivatives_are_refused_where_they_would_be_lost(rule):
    given = problems.tensors(Problem(rule, length=5))

    def out(q, backend):
        return RULES[rule].apply(**given.leaves | {"q": q}, backend=backend, **given.keywords)[0]

    q = given.leaves["q"].detach()
    found = torch.func.jvp(lambda x: out(x, "reference"), (q,), (torch.ones_like(q),))[1]
    assert found.norm() > 0
    for backend in (None, "torch"):
        with pytest.raises(ValueError, match="use backend='reference'"):
            torch.func.jvp(lambda x, name=backend: out(x, name), (q,), (torch.ones_like(q),))


def test_linear_attention_state_must_fit_normalize():
    q, k, v = GOOD["q"], GOOD["k"], GOOD["v"]
    with pytest.raises(ValueError, match="a pair"):
        ops.linear_attention(q, k, v, normalize=True, initial_state=torch.zeros(2, 2, 4, 3))
    with pytest.raises(ValueError, match="one tensor"):
        ops.linear_attention(q, k, v, initial_state=(torch.zeros(2, 2, 4, 3), torch.zeros(2, 2, 4)))
    with pytest.raises(ValueError, match="normaliser has no decay"):
        ops.linear_attention(q, k, v, GOOD["g"], normalize=True)
