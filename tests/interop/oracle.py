"""I50: rules of the linear class against the naive recurrences of flash-linear-attention, a second reading of the same
papers. Run by test_second_oracle.py in a process of its own: importing that library registers its models.

Its recurrences compute in float32 whatever they are given, so that is how far they can be trusted.
"""

import pytest
import torch
from fla.ops.comba.naive import naive_recurrent_comba
from fla.ops.delta_rule.naive import delta_rule_recurrence
from fla.ops.gated_delta_product.naive import naive_recurrent_gated_delta_product
from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
from fla.ops.gdn2.naive import naive_recurrent_gdn2
from fla.ops.kda.naive import naive_recurrent_kda
from fla.ops.linear_attn.naive import naive_recurrent_linear_attn
from fla.ops.precond_gated_delta_rule.naive import naive_recurrent_precond_gated_delta_rule

from hf_fwp.rules import RULES

B, T, H, K, V = 2, 70, 2, 8, 6
TOLERANCE = 1e-5


def rand(*shape):
    return torch.rand(*shape, dtype=torch.float64)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture
def given():
    """q, k of length 1, v, rates, log-decays, and a state to start from."""
    torch.manual_seed(0)
    unit = torch.nn.functional.normalize
    return {
        "q": randn(B, T, H, K),
        "k": unit(randn(B, T, H, K), dim=-1),
        "v": randn(B, T, H, V),
        "beta": rand(B, T, H),
        "g": -rand(B, T, H),
        "g_K": -rand(B, T, H, K),
        "state": randn(B, H, K, V),
    }


def by_heads(*tensors):
    return [x.transpose(1, 2) for x in tensors]


def linear_attention(q, k, v, state, **_):
    theirs = naive_recurrent_linear_attn(q, k, v, scale=1.0, initial_state=state.float(), output_final_state=True)
    return {}, {"normalize": False}, theirs


def delta_net(q, k, v, beta, state, **_):
    out, final = delta_rule_recurrence(*by_heads(q, k, v, beta), initial_state=state)
    return {"beta": beta}, {}, (out.transpose(1, 2), final)


def gated_delta_net(q, k, v, beta, g, state, **_):
    theirs = naive_recurrent_gated_delta_rule(q, k, v, beta, g, initial_state=state, output_final_state=True)
    return {"beta": beta, "g": g}, {}, theirs


def kimi_delta(q, k, v, beta, g_K, state, **_):
    theirs = naive_recurrent_kda(q, k, v, g_K, beta, initial_state=state, output_final_state=True)
    return {"beta": beta, "g": g_K}, {}, theirs


def gated_delta_net_2(q, k, v, g_K, state, **_):
    erase, write = rand(B, T, H, K), rand(B, T, H, V)
    theirs = naive_recurrent_gdn2(q, k, v, g_K, erase, write, initial_state=state, output_final_state=True)
    return {"g": g_K, "erase": erase, "write": write}, {}, theirs


def comba(q, k, v, beta, g, state, **_):
    """Its recurrence is given the corrected query and p."""
    closeness, correction = rand(B, T, H), rand(B, T, H)
    p = closeness[..., None] * k
    corrected = q - correction[..., None] * p
    theirs = naive_recurrent_comba(corrected, k, v, p, beta, g, initial_state=state, output_final_state=True)
    return {"beta": beta, "g": g, "closeness": closeness, "correction": correction}, {}, theirs


def precond_delta(q, k, v, beta, g, state, **_):
    """Its recurrence gives queries the length 1."""
    a, b, moment = -rand(B, T, H), rand(B, T, H), rand(B, H, K)
    start = {"initial_state": state.float(), "initial_A_state": moment.float()}
    out, final, last = naive_recurrent_precond_gated_delta_rule(
        q, k, v, a, g, b, beta, **start, output_final_state=True, eps=0.0
    )
    inputs = {"beta": beta, "g": g, "moment_g": a, "moment_beta": b, "qk_l2norm": True, "moment": moment}
    return inputs, {"forget_gate": True}, (out, final, last)


def delta_product(q, k, v, g, state, **_):
    k2 = torch.nn.functional.normalize(randn(B, T, 2, H, K), dim=-1)
    v2, beta2 = randn(B, T, 2, H, V), 2 * rand(B, T, 2, H)
    theirs = naive_recurrent_gated_delta_product(
        q,
        k2.flatten(1, 2),
        v2.flatten(1, 2),
        g,
        beta2.flatten(1, 2),
        K**-0.5,
        initial_state=state.float(),
        output_final_state=True,
        num_householder=2,
    )
    inputs = {"k": k2.transpose(2, 3), "v": v2.transpose(2, 3), "beta": beta2.transpose(2, 3), "g": g}
    return inputs, {"num_householder": 2}, theirs


ORACLES = [
    linear_attention,
    delta_net,
    gated_delta_net,
    kimi_delta,
    gated_delta_net_2,
    comba,
    precond_delta,
    delta_product,
]


def error(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("oracle", ORACLES, ids=lambda oracle: oracle.__name__)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_i50_somebody_else_s_recurrence_says_the_same(given, oracle, backend):
    inputs, options, (out, final, *moment) = oracle(**given)
    states = {"state": given["state"]} | ({"moment": inputs.pop("moment")} if moment else {})
    scale = 1.0 if oracle is linear_attention else None
    arguments = {name: given[name] for name in ("q", "k", "v")} | inputs
    apply = RULES[oracle.__name__].apply
    ours, after = apply(**arguments, states=states, scale=scale, options=options, backend=backend)
    assert error(ours, out) < TOLERANCE
    assert error(after["state"], final) < TOLERANCE
    assert not moment or error(after["moment"], moment[0]) < TOLERANCE
    for name in ("k", "v", "beta", "g"):
        if name in arguments:
            late = arguments | {name: arguments[name].roll(1, dims=1)}
            wrong, _ = apply(**late, states=states, scale=scale, options=options)
            assert error(wrong, out) > 100 * TOLERANCE, f"it says the same with another {name}"
