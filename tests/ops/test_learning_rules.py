"""The registry of learning rules, each against its equation, written out; what is known of Hebb, Oja and delta."""

import pytest
import torch

from hf_fwp import LEARNING_RULES, RULES

outer = torch.outer
EQUATIONS = {
    "hebb": lambda S, k, v, β, k_, v_: S + β * outer(k, v),
    "oja": lambda S, k, v, β, k_, v_: S + β * outer(k - S @ v, v),
    "delta": lambda S, k, v, β, k_, v_: S + β * outer(k, v - S.T @ k),
    "stdp": lambda S, k, v, β, k_, v_: S + β * (1.0 * outer(k_, v) - 0.5 * outer(k, v_)),
}
OPTIONS = {"stdp": {"trace_decay": 0.7, "potentiation": 1.0, "depression": 0.5}}


def pairs(length=9, keys=4, values=3):
    torch.manual_seed(0)
    k, v = torch.randn(2, length, 2, keys).double(), torch.randn(2, length, 2, values).double()
    return k, v, torch.rand(2, length, 2).double()


def close(a, b):
    return torch.allclose(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", LEARNING_RULES)
def test_a_rule_is_its_equation_and_no_other(name):
    k, v, beta = pairs()
    learned = LEARNING_RULES[name].learn(k, v, beta, **OPTIONS.get(name, {}))["state"]
    reached = {}
    for other, equation in EQUATIONS.items():
        S, k_, v_ = torch.zeros(4, 3).double(), torch.zeros(4).double(), torch.zeros(3).double()
        for t in range(9):
            k_, v_ = 0.7 * k_ + k[1, t, 0], 0.7 * v_ + v[1, t, 0]
            S = equation(S, k[1, t, 0], v[1, t, 0], beta[1, t, 0], k_, v_)
        reached[other] = close(learned[1, 0], S)
    assert reached == {other: other == name for other in EQUATIONS}
    assert LEARNING_RULES[name].name == name


@pytest.mark.parametrize("name", LEARNING_RULES)
def test_learning_goes_on_from_what_was_learned_and_changes_nothing_given(name):
    k, v, beta = pairs()
    rule = LEARNING_RULES[name]
    half = rule.learn(k[:, :4], v[:, :4], beta[:, :4])
    kept = {part: x.clone() for part, x in half.items()}
    whole, rest = rule.learn(k, v, beta), rule.learn(k[:, 4:], v[:, 4:], beta[:, 4:], states=half)
    assert all(close(whole[part], rest[part]) for part in whole)
    assert all(torch.equal(half[part], kept[part]) for part in half)


def test_the_delta_rule_is_a_gradient_step_of_size_beta():
    k, v, beta = (x[:1, :1, :1] for x in pairs())
    S = torch.randn(1, 1, 4, 3).double().requires_grad_()
    loss = 0.5 * (torch.einsum("bhkv,bhk->bhv", S, k[:, 0]) - v[:, 0]).square().sum()
    (gradient,) = torch.autograd.grad(loss, S)
    stepped = LEARNING_RULES["delta"].step({"state": S}, k[:, 0], v[:, 0], beta[:, 0])["state"]
    assert close(stepped, S - beta[0, 0, 0] * gradient)


def test_i30_oja_s_neuron_finds_the_first_principal_component():
    """v = Sᵀk of one neuron: its weights become the direction of the largest variance, of length 1."""
    torch.manual_seed(0)
    turn, _ = torch.linalg.qr(torch.randn(5, 5).double())
    data = torch.randn(3000, 5).double() * torch.tensor([2.0, 1.0, 0.7, 0.5, 0.3]).double() @ turn.T
    states, beta = {"state": 0.1 * torch.randn(1, 1, 5, 1).double()}, torch.full((1, 1), 0.005).double()
    for x in data[:, None, None]:
        v = torch.einsum("bhkv,bhk->bhv", states["state"], x)
        states = LEARNING_RULES["oja"].step(states, x, v, beta)
    weights = states["state"].flatten()
    assert abs(float(weights.norm()) - 1) < 0.1
    assert abs(float(weights @ turn[:, 0])) / float(weights.norm()) > 0.97


def test_timing_decides_whether_a_connection_grows():
    """A key shortly before its value strengthens, one behind it weakens."""
    key, value = torch.eye(2).double()[None, :, None, :1], torch.eye(2).double()[None, :, None, 1:]
    beta, rule = torch.ones(1, 2, 1).double(), LEARNING_RULES["stdp"]
    assert float(rule.learn(key, value, beta)["state"]) == pytest.approx(0.9)
    assert float(rule.learn(value, key, beta)["state"]) == pytest.approx(-0.9)


def test_they_stand_beside_the_update_rules():
    assert not set(LEARNING_RULES) & (set(RULES) - {"oja"})
