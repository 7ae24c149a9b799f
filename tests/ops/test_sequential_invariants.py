"""Laws of the rules with states of their own (the numbers are those of the specification)."""

import operators as problems
import pytest
import torch
from operators import Problem

from hf_fwp.rules import RULES

BACKENDS = ["reference", "torch"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def given_for(rule, **changes):
    return problems.tensors(
        Problem(rule, heads=(2, 2, 2), **{"length": 20, "sizes": (5, 5), "initial": False, **changes})
    )


def run(rule, given, backend, **changes):
    return RULES[rule].apply(
        **{**given.leaves, **given.keywords, "states": given.states or None, **changes}, backend=backend
    )


def delta_net(q, k, v, beta, backend, scale=1.0):
    return RULES["delta_net"].apply(q, k, v, beta=beta, scale=scale, backend=backend)


def same(a, b, tolerance=1e-9):
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance)


def test_i17_a_delta_rnn_without_recurrent_writes_is_a_delta_net(backend):
    given = given_for("delta_rnn")
    expected, state = delta_net(*(given.leaves[n] for n in ("q", "k", "v", "beta")), backend)
    assert not same(run("delta_rnn", given, backend)[0], expected)
    given.leaves["b_r"].fill_(-1e9)
    out, states = run("delta_rnn", given, backend)
    assert same(out, expected)
    assert same(states["state"], state["state"])


def test_i18_a_delta_lstm_with_open_gates_is_the_update_s_delta_net(backend):
    """The gates are opened by the reads of their own delta nets, which store large values under every key."""
    given = given_for("delta_lstm", sizes=(4, 4), initial=True)
    given.leaves["b_r"].fill_(-1e9)
    given.states["recurrent_state"].zero_()
    positive = torch.nn.functional.elu(given.leaves["q"].unflatten(-1, (3, 4))[:, :, :, 1]) + 1
    key = torch.nn.functional.elu(given.leaves["k"].unflatten(-1, (3, 4))[:, :, :, 1]) + 1
    q, k = (x / (x.sum(-1, keepdim=True) + 1e-5) for x in (positive, key))
    v, beta = given.leaves["v"].unflatten(-1, (3, 4))[:, :, :, 1], given.leaves["b"][..., 1].sigmoid()
    expected, _ = RULES["delta_net"].apply(
        q, k, v, beta=beta, scale=1.0, states={"state": given.states["state"][:, :, 1].clone()}, backend=backend
    )
    assert not same(run("delta_lstm", given, backend)[0], expected)
    given.states["state"][:, :, [0, 2]] = 1e4
    given.leaves["b"][..., [0, 2]] = -1e9
    assert same(run("delta_lstm", given, backend)[0], expected)


def test_i19_a_recurrent_delta_net_without_recurrence_is_a_delta_net(backend):
    given = given_for("recurrent_delta_net")
    q, k, v, b = (given.leaves[n] for n in ("q", "k", "v", "b"))
    expected, state = delta_net(q.softmax(-1), k.softmax(-1), v, b[..., 0].sigmoid(), backend)
    assert not same(run("recurrent_delta_net", given, backend)[0], expected)
    zeros = {name: torch.zeros_like(x) for name, x in given.weights.items()}
    out, states = run("recurrent_delta_net", given, backend, weights=zeros)
    assert same(out, expected)
    assert same(states["state"], state["state"])
    for name in zeros:
        one = zeros | {name: given.weights[name]}
        assert not same(run("recurrent_delta_net", given, backend, weights=one)[0], expected), name


@pytest.mark.parametrize(("name", "invariant"), [("q", True), ("k", True), ("v", False)])
def test_i20_a_constant_added_to_queries_and_keys_changes_nothing(backend, name, invariant):
    given = given_for("recurrent_delta_net")
    before, states = run("recurrent_delta_net", given, backend)
    given.leaves[name] += torch.randn(2, 20, 2, 1, dtype=torch.float64)
    after, final = run("recurrent_delta_net", given, backend)
    assert same(before, after) == invariant
    assert same(states["state"], final["state"]) == invariant


@pytest.mark.parametrize("rule", [rule for rule in RULES if RULES[rule].qkv])
def test_i21_a_query_reaches_later_outputs_only_through_a_recurrent_read(rule, backend):
    given = given_for(rule)
    before, _ = run(rule, given, backend)
    given.leaves["q"][:, 7] += torch.randn(2, 2, 5, dtype=torch.float64)
    after, _ = run(rule, given, backend)
    later = [same(before[:, t], after[:, t]) for t in range(8, 20)]
    assert not same(before[:, 7], after[:, 7])
    assert not later[0] if "y" in RULES[rule].states else all(later)


def test_i22_a_srwm_with_rates_zero_is_a_linear_layer(backend):
    given = given_for("srwm")
    expected = torch.einsum("bthk,hkv->bthv", given.leaves["x"], given.weights["W_y"])
    out, _ = run("srwm", given, backend)
    assert not same(out[:, 1:], expected[:, 1:])
    x = given.leaves["x"]
    x[..., 0] = 1.0
    weights = given.weights | {"W_b": torch.zeros_like(given.weights["W_b"])}
    weights["W_b"][:, 0] = -1e9
    expected = torch.einsum("bthk,hkv->bthv", x, given.weights["W_y"])
    out, states = run("srwm", given, backend, weights=weights)
    assert same(out, expected)
    assert torch.equal(states["state"], torch.zeros_like(states["state"]))


def test_i23_a_srwm_with_equal_query_and_key_never_changes(backend):
    given = given_for("srwm")
    assert run("srwm", given, backend)[1]["state"].abs().sum() > 0
    flat = {name: torch.zeros_like(given.weights[name]) for name in ("W_q", "W_k")}
    assert torch.equal(*(run("srwm", given, backend, weights=given.weights | flat)[1]["state"] * x for x in (0, 1)))


def test_i24_a_srwm_reads_before_it_writes(backend):
    given = given_for("srwm")
    static = torch.einsum("bthk,hkv->bthv", given.leaves["x"], given.weights["W_y"])
    out, _ = run("srwm", given, backend)
    assert same(out[:, 0], static[:, 0])
    assert not same(out[:, 1], static[:, 1])


@pytest.mark.parametrize("block", range(4))
def test_i25_a_rate_of_the_srwm_acts_on_its_own_columns(backend, block):
    given = given_for("srwm", length=1, sizes=(5, 3))
    given.leaves["x"][..., 0] = 1.0
    rates = torch.full((2, 5, 4), 0.0, dtype=torch.float64)
    rates[:, 0] = -1e9
    rates[:, 0, block] = 1.0
    _, states = run("srwm", given, backend, weights=given.weights | {"W_b": rates})
    changed = [part.abs().max() > 0 for part in states["state"].split((3, 5, 5, 4), dim=-1)]
    assert changed == [number == block for number in range(4)]


def test_i14_an_unsquashed_from_to_programmer_is_linear_attention(backend):
    given = given_for("fwp_1991")
    x, f, t = (given.leaves[name] for name in ("x", "f", "t"))
    expected, state = RULES["linear_attention"].apply(x, f, t, scale=1.0, options={"normalize": False}, backend=backend)
    plain = given.keywords["options"] | {"activation": "identity", "eta": 1.0}
    assert not same(run("fwp_1991", given, backend)[0], expected)
    out, states = run("fwp_1991", given, backend, options=plain)
    assert same(out, expected)
    assert same(states["state"], state["state"])
    squashed = plain | {"squashing": "tanh"}
    assert not same(run("fwp_1991", given, backend, options=squashed)[0], expected)


def test_a_logistic_squash_without_a_write_stays_at_its_fixed_point(backend):
    given = given_for("fwp_1991")
    options = given.keywords["options"] | {"squashing": "logistic", "eta": 0.0}
    out, states = run("fwp_1991", given, backend, options=options)
    assert torch.equal(states["state"], torch.zeros_like(states["state"]))
    assert same(out, 0.5 * given.leaves["x"].sum(-1, keepdim=True).expand_as(out))
    assert run("fwp_1991", given, backend, options=options | {"eta": 0.5})[1]["state"].abs().max() > 0.1


def test_a_recurrent_programmer_that_writes_nothing_is_a_plain_rnn(backend):
    given = given_for("fwp_1993")
    h, reads = torch.zeros(2, 2, 5, dtype=torch.float64), []
    for x_t in given.leaves["x"].unbind(1):
        s = torch.cat([x_t, h, torch.ones(2, 2, 1, dtype=torch.float64)], dim=-1)
        h = torch.einsum("hio,bhi->bho", given.weights["W_s"], s).tanh()
        reads.append(torch.einsum("hio,bhi->bho", given.weights["W_y"], h))
    expected = torch.stack(reads, dim=1)
    assert not same(run("fwp_1993", given, backend)[0], expected)
    still = given.keywords["options"] | {"eta": 0.0}
    assert same(run("fwp_1993", given, backend, options=still)[0], expected)


def test_i26_a_self_modifying_net_with_rates_zero_is_a_delta_net(backend):
    given = given_for("self_modifying_delta")
    m = torch.einsum("bthk,hkv->bthv", given.leaves["x"].softmax(-1), given.weights["W_y"])
    q, k, v, b = m.split((5, 5, 5, 1), dim=-1)
    expected, _ = delta_net(q.softmax(-1), k.softmax(-1), v, b[..., 0].sigmoid(), backend)
    assert not same(run("self_modifying_delta", given, backend)[0], expected)
    frozen = given.weights | {"W_b": torch.full_like(given.weights["W_b"], -1e9)}
    assert same(run("self_modifying_delta", given, backend, weights=frozen)[0], expected)


def test_i16_a_delta_delta_net_that_writes_nothing_reads_nothing(backend):
    """β1 = 0: the second net's query and key are uniform and its value 0; with a state it decays along that key."""
    given = given_for("delta_delta", initial=True)
    given.states["first_state"].zero_()
    state, uniform = given.states["state"].clone(), torch.full((5,), 0.2, dtype=torch.float64)
    assert not same(run("delta_delta", given, backend)[0][:, 0], 0.9 * state.mean(-2))
    given.leaves["b"].fill_(-1e9)
    out, states = run("delta_delta", given, backend)
    for t in range(20):
        state = state - 0.5 * torch.einsum("k,bhv->bhkv", uniform, torch.einsum("bhkv,k->bhv", state, uniform))
        assert same(out[:, t], torch.einsum("bhkv,k->bhv", state, uniform), 1e-4)  # the sum norm's ε is 1e-5
    assert states["first_state"].abs().max() < 1e-15
    given.states["state"].zero_()
    assert run("delta_delta", given, backend)[0].abs().max() < 1e-15


def continuous(given, backend, solver, time_step=1.0, learning_rule="delta", **changes):
    options = {"learning_rule": learning_rule, "time_step": time_step, "solver": solver}
    return run("continuous_fwp", given, backend, options=options, **changes)


def test_i27_euler_with_steps_of_one_is_the_discrete_rule(backend):
    given = given_for("continuous_fwp")
    q, k, v, b = (given.leaves[n] for n in ("q", "k", "v", "b"))
    q, k, v, beta = q.softmax(-1), k.softmax(-1), v.tanh(), b[..., 0].sigmoid()
    assert same(continuous(given, backend, "euler")[0], delta_net(q, k, v, beta, backend)[0])
    assert not same(continuous(given, backend, "euler", 0.9)[0], delta_net(q, k, v, beta, backend)[0])
    hebb = RULES["linear_attention"].apply(q, k, b.sigmoid() * v, scale=1.0, options={"normalize": False})[0]
    assert same(continuous(given, backend, "euler", learning_rule="hebb")[0], hebb)


def test_i28_exact_hold_is_the_limit_of_small_euler_steps(backend):
    given = given_for("continuous_fwp", length=1, initial=True)
    fine = given_for("continuous_fwp", length=20_000 if backend == "torch" else 2_000, initial=True)
    count = fine.leaves["q"].shape[1]
    fine.leaves = {name: x.expand(-1, count, -1, -1) for name, x in given.leaves.items()}
    fine.states = given.states
    exact = continuous(given, backend, "exact_hold", 3.0)[1]["state"]
    assert same(continuous(fine, backend, "euler", 3.0 / count)[1]["state"], exact, 1 / count)
    assert not same(continuous(given, backend, "euler", 3.0)[1]["state"], exact, 1 / count)


def test_i28_what_a_key_of_length_one_retrieves_nears_its_value_exponentially(backend):
    given = given_for("continuous_fwp", length=1, initial=True)
    given.leaves["k"].fill_(-1e9)
    given.leaves["k"][..., 2] = 1e9  # the softmax of that is a basis vector
    start, value = given.states["state"][:, :, 2], given.leaves["v"][:, 0].tanh()
    for duration in (0.3, 1.0, 7.0):
        state = continuous(given, backend, "exact_hold", duration)[1]["state"]
        left = (-duration * given.leaves["b"][:, 0].sigmoid()).exp()
        assert same(state[:, :, 2], value + left * (start - value))
        assert same(state[:, :, 0], given.states["state"][:, :, 0])
        euler = continuous(given, backend, "euler", duration)[1]["state"]
        assert not same(euler[:, :, 2], value + left * (start - value))


def test_i29_two_half_steps_of_exact_hold_are_one_and_none_is_nothing(backend):
    given = given_for("continuous_fwp", length=1, initial=True)
    twice = {name: torch.cat([x, x], dim=1) for name, x in given.leaves.items()}
    for solver, holds in (("exact_hold", True), ("euler", False)):
        whole = continuous(given, backend, solver)[1]["state"]
        halves = continuous(given, backend, solver, 0.5, **twice)[1]["state"]
        assert same(whole, halves) == holds
        assert torch.equal(continuous(given, backend, solver, 0.0)[1]["state"], given.states["state"])


def test_i31_a_fast_weight_memory_without_clipping_is_a_delta_rule(backend):
    """Its key is vec(s rᵀ), its rate c β."""
    given = given_for("fast_weight_memory", initial=True, sizes=(3, 4))
    w, state, h, c = given.weights, given.states["state"], given.states["h"], given.states["c"]
    keys, values, rates = [], [], []
    for gates in given.leaves["gates"].unbind(1):
        i, f, g, o = (gates + torch.einsum("hio,bhi->bho", w["W_h"], h) + w["b_h"]).chunk(4, dim=-1)
        c = (f + 1).sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        s, r, t, b = (torch.einsum("hio,bhi->bho", w["W_w"], h) + w["b_w"]).split((3, 3, 3, 1), dim=-1)
        keys.append(torch.einsum("bhs,bhr->bhsr", s.tanh(), r.tanh()).flatten(-2))
        values.append(t.tanh())
        rates.append((b[..., 0] + 1).sigmoid() / 3)
    k, v, beta = (torch.stack(parts, dim=1) for parts in (keys, values, rates))
    expected = RULES["delta_net"].apply(k, k, v, beta=beta, states={"state": state.clone()}, backend=backend)[1][
        "state"
    ]
    options = given.keywords["options"]
    assert same(run("fast_weight_memory", given, backend, options=options | {"clip": False})[1]["state"], expected)
    clipped = run("fast_weight_memory", given, backend, options=options)[1]["state"]
    assert not same(clipped, expected)
    assert (torch.linalg.matrix_norm(clipped) <= 1 + 1e-12).all()


def test_i32_ba_s_fast_weights_attend_to_the_past(backend):
    """A h = η Σ λ^age h_τ (h_τ · h)."""
    given = given_for("ba_fast_weights")
    past, states = run("ba_fast_weights", given, backend)
    probe = torch.randn(2, 2, 5, dtype=torch.float64)
    age = torch.arange(18, -1, -1, dtype=torch.float64)  # A uses all h before the last

    def attended(decay):
        scores = 0.5 * decay**age * torch.einsum("bthv,bhv->bht", past[:, :-1], probe)
        return torch.einsum("bht,bthv->bhv", scores, past[:, :-1])

    read = torch.einsum("bhij,bhj->bhi", states["state"], probe)
    assert same(read, attended(0.95))
    assert not same(read, attended(0.9))


def test_i15_a_delta_mlp_that_writes_nothing_is_its_query(backend):
    given = given_for("delta_mlp")
    assert not same(run("delta_mlp", given, backend)[0], given.leaves["q"])
    given.leaves["b"].fill_(-1e9)
    out, states = run("delta_mlp", given, backend)
    assert same(out, given.leaves["q"])
    assert all(x.abs().max() < 1e-15 for x in states.values())
