"""Rules that become one another (the numbers are those of the specification), and what only some of them promise."""

import operators as problems
import pytest
import torch
from operators import BACKENDS, Problem, close, random_inputs, unit

import hf_fwp
from hf_fwp.rules import RULES
from hf_fwp.rules.decays import ChannelDecay, SharedDecay


def per_channel(g, size=6):
    """A decay for every channel of a key, different in each."""
    return g[..., None] * torch.linspace(0.1, 2, size, dtype=g.dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_i11_equal_channels_are_one_decay_per_head(backend):
    q, k, v, beta, g = random_inputs()
    equal, final = hf_fwp.gated_delta_rule(
        q, k, v, g[..., None].expand_as(k), beta, output_final_state=True, backend=backend
    )
    expected, state = hf_fwp.gated_delta_rule(q, k, v, g, beta, output_final_state=True)
    close(equal, expected)
    close(final, state)
    different, _ = hf_fwp.gated_delta_rule(q, k, v, per_channel(g), beta, backend=backend)
    assert (different - expected).norm() > 0.1 * expected.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_i11_gates_with_equal_channels_are_one_rate(backend):
    q, k, v, beta, g = random_inputs()
    equal = beta[..., None].expand_as(k)
    out, _ = RULES["gated_delta_net_2"].apply(q, k, v, g=per_channel(g), erase=equal, write=equal, backend=backend)
    close(out, hf_fwp.gated_delta_rule(q, k, v, per_channel(g), beta)[0])
    out, _ = RULES["gated_delta_net_2"].apply(q, k, v, g=per_channel(g), erase=0 * equal, write=equal, backend=backend)
    assert (out - hf_fwp.gated_delta_rule(q, k, v, per_channel(g), beta)[0]).norm() > 0.1 * out.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_i11_comba_that_erases_all_and_corrects_nothing_is_the_gated_delta_rule(backend):
    q, k, v, beta, g = random_inputs()
    gates = {"beta": beta, "g": g, "backend": backend, "qk_l2norm": True}
    out, _ = RULES["comba"].apply(q, k, v, closeness=torch.ones_like(g), correction=0 * g, **gates)
    close(out, hf_fwp.gated_delta_rule(q, k, v, g, beta, use_qk_l2norm_in_kernel=True)[0])
    half = torch.full_like(g, 0.5)
    part, _ = RULES["comba"].apply(q, 3 * k, v, closeness=half, correction=0.7 * half, **gates)
    out, _ = RULES["comba"].apply(q - 0.7 / 4 * 3 * k, 3 * k, v, closeness=half, correction=0 * half, **gates)
    close(part, out)  # corrected with the key as it was given, before both are normalised


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("decay", [-50.0, -1e4])
def test_a_channel_may_forget_everything_at_once(backend, decay):
    """exp(G_i) exp(-G_j) over a chunk would be 0 · ∞."""
    q, k, v, beta, g = random_inputs(length=130)
    g = per_channel(g)
    g[:, ::3, :, ::2] = decay
    tensors = [x.requires_grad_() for x in (q, k, v, g, beta)]
    results = []
    for run in (backend, "reference"):
        out, state = hf_fwp.gated_delta_rule(*tensors, output_final_state=True, backend=run)
        results.append((out, state, *torch.autograd.grad(out.square().sum() + state.sum(), tensors)))
    for found, expected in zip(*results, strict=True):
        assert torch.isfinite(found).all()
        close(found, expected)
    if decay < -1000:
        assert not results[0][5][g == decay].any()  # what is exactly 0 cannot learn


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("channels", [0, 1, 5])
def test_products_under_decay_are_what_they_say(channels, queries):
    """None, one decay per token, one per channel: against the tensor [C, C, D] that no form may hold."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 16, queries, 5, dtype=torch.float64), torch.randn(2, 16, 5, dtype=torch.float64)
    m = torch.randn(2, 16, queries, 16, dtype=torch.float64)
    g = -torch.rand(2, 16, max(channels, 1), dtype=torch.float64)
    total = (g if channels else 0 * g).cumsum(1)
    gamma = (total[:, :, None] - total[:, None]).exp().expand(-1, -1, -1, 5)
    gamma = torch.where(torch.ones(16, 16).tril().bool()[..., None], gamma, 0)
    decay = ChannelDecay(g) if channels > 1 else SharedDecay(g if channels else None, like=y)
    close(decay.products(x, y), torch.einsum("mird,mjd,mijd->mirj", x, y, gamma))
    close(decay.mix(m, y), torch.einsum("mirj,mjd,mijd->mird", m, y, gamma))
    mixed, columns = decay.gradients(m, x, y)
    close(mixed, decay.mix(m, y))
    close(columns, torch.einsum("mirj,mird,mijd->mjd", m, x, gamma))
    close(decay.from_start(x), x * total.exp()[:, :, None])
    close(decay.to_end(y), y * (total[:, -1:] - total).exp())


def steps(count, length=20):
    torch.manual_seed(0)
    k = unit(torch.randn(2, length * count, 2, 6, dtype=torch.float64), dim=-1)
    q = torch.randn(2, length, 2, 6, dtype=torch.float64)
    rates = torch.rand(2, length * count, 2, dtype=torch.float64)
    return q, k, torch.randn_like(k), -torch.rand(2, length, 2, dtype=torch.float64), 2 * rates


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [1, 3])
def test_i12_delta_product_is_the_delta_rule_on_all_steps(backend, count):
    q, k, v, g, beta = steps(count)
    every = q.repeat_interleave(count, dim=1)
    expected, state = hf_fwp.delta_rule(every, k, v, beta, output_final_state=True, backend=backend)
    out, final = hf_fwp.delta_product(
        q, k, v, None, beta, num_householder=count, output_final_state=True, backend=backend
    )
    close(out, expected[:, count - 1 :: count])
    close(final, state)
    first = torch.zeros_like(beta)
    first[:, ::count] = g
    expected, _ = hf_fwp.gated_delta_rule(every, k, v, first, beta, backend=backend)
    out, _ = hf_fwp.delta_product(q, k, v, g, beta, num_householder=count, backend=backend)
    close(out, expected[:, count - 1 :: count])


def test_i13_two_reflections_rotate():
    """Keys at an angle of 60°: a rotation by 120°, of order 3, which no single reflection is."""
    angle = torch.tensor(torch.pi / 3, dtype=torch.float64)
    pair = torch.stack([torch.tensor([1.0, 0.0], dtype=torch.float64), torch.stack([angle.cos(), angle.sin()])])
    k = pair.repeat(3, 1)[None, :, None]
    start = torch.eye(2, dtype=torch.float64)[None, None]
    rest = {"num_householder": 2, "initial_state": start, "output_final_state": True, "scale": 1.0}
    zeros, twos = torch.zeros_like(k), torch.full((1, 6, 1), 2.0, dtype=torch.float64)
    _, once = hf_fwp.delta_product(k[:, :1], k[:, :2], zeros[:, :2], None, twos[:, :2], **rest)
    turn = torch.tensor([[-0.5, -(0.75**0.5)], [0.75**0.5, -0.5]], dtype=torch.float64)
    close(once[0, 0], turn)
    _, thrice = hf_fwp.delta_product(k[:, :3], k, zeros, None, twos, **rest)
    close(thrice, start)


def test_options_and_sizes_that_do_not_fit_are_refused():
    q, k, v, g, beta = steps(2)
    with pytest.raises(ValueError, match=r"num_householder = 3 .* need 60"):
        hf_fwp.delta_product(q, k, v, g, beta, num_householder=3)
    with pytest.raises(ValueError, match="num_householder is 0"):
        hf_fwp.FwpConfig(rule="delta_product", rule_options={"num_householder": 0})
    with pytest.raises(ValueError, match="lower_bound is 1"):
        hf_fwp.FwpConfig(rule="kimi_delta", rule_options={"lower_bound": 1})
    with pytest.raises(ValueError, match="normalize is 'both'; choose from None, 'output', 'full'"):
        hf_fwp.FwpConfig(rule="delta_net", rule_options={"normalize": "both"})
    with pytest.raises(ValueError, match=r"range is 0\.5"):
        hf_fwp.FwpConfig(rule="precond_delta", rule_options={"range": 0.5})
    with pytest.raises(ValueError, match="v_norm is 'sum'"):
        hf_fwp.FwpConfig(rule="oja", rule_options={"v_norm": "sum"})


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_that_are_not_scaled_leave_the_delta_rule(backend):
    q, k, v, beta, g = random_inputs()
    shared = {"beta": beta, "moment_g": g, "moment_beta": beta, "backend": backend}
    out, states = RULES["precond_delta"].apply(q, k, v, options={"range": 1.0}, **shared)
    close(out, hf_fwp.delta_rule(q, k, v, beta)[0])
    left = (g.flip(1).cumsum(1).flip(1) - g).exp()
    close(states["moment"], torch.einsum("bthk,bth->bhk", k.square(), beta * left))
    out, _ = RULES["precond_delta"].apply(q, k, v, g=g, options={"range": 1.0, "forget_gate": True}, **shared)
    close(out, hf_fwp.gated_delta_rule(q, k, v, g, beta)[0])
    scaled, _ = RULES["precond_delta"].apply(q, k, v, options={"range": 1.5}, **shared)
    assert (scaled - hf_fwp.delta_rule(q, k, v, beta)[0]).norm() > 0.05 * scaled.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_i9_normalised_removal_is_a_shorter_key_at_a_higher_rate(backend):
    q, k, v, beta, _ = random_inputs()
    q, k = q.abs(), k.abs()
    totals = k.cumsum(1)
    kappa = (torch.nn.functional.pad(totals, (0, 0, 0, 0, 1, 0))[:, :-1] * k).sum(-1)
    kappa[:, 0] = 1
    plain, state = hf_fwp.delta_rule(
        q, k / kappa[..., None], v, beta * kappa, scale=1.0, output_final_state=True, backend=backend
    )
    shared = {"beta": beta, "scale": 1.0, "backend": backend}
    out, states = RULES["delta_net"].apply(q, k, v, options={"normalize": "full", "eps": 0.0}, **shared)
    close(out, plain / (totals * q).sum(-1, keepdim=True))
    close(states["state"], state)
    close(states["norm_state"], totals[:, -1])
    out, _ = RULES["delta_net"].apply(q, k, v, options={"normalize": "output", "eps": 0.0}, **shared)
    close(out, hf_fwp.delta_rule(q, k, v, beta, scale=1.0)[0] / (totals * q).sum(-1, keepdim=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_i34_oja_is_the_transposed_delta_rule(backend):
    q, k, v, beta, _ = random_inputs()
    v = unit(v, dim=-1)
    start = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    shared = {"beta": beta, "backend": backend, "states": {"state": start}, "options": {"v_norm": "none"}}
    out, states = RULES["oja"].apply(q, k, v, scale=1.0, **shared)
    _, turned = hf_fwp.delta_rule(k, v, k, beta, initial_state=start.mT.contiguous(), output_final_state=True)
    close(states["state"], turned.mT)
    close(out[:, -1], torch.einsum("bhkv,bhk->bhv", states["state"], q[:, -1]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_i35_gated_oja_without_decay_is_oja(backend):
    q, k, v, beta, g = random_inputs()
    gated, final = RULES["gated_oja"].apply(q, k, 3 * v, g=0 * per_channel(g), beta=beta, backend=backend)
    out, state = RULES["oja"].apply(q, k, 3 * v, beta=beta, backend=backend)
    close(gated, out)
    close(final["state"], state["state"])
    decayed, _ = RULES["gated_oja"].apply(q, k, 3 * v, g=per_channel(g), beta=beta, backend=backend)
    assert (decayed - out).norm() > 0.1 * out.norm()


def test_i35_oja_without_forgetting_is_hebb():
    """Orthogonal values: S v is zero for a new one, and what is left is the sum rule."""
    v = torch.eye(6, dtype=torch.float64)[None, :, None]
    q, k, _, beta, _ = random_inputs(length=6, heads=1, batch=1)
    out, _ = RULES["oja"].apply(q, k, v, beta=beta, options={"v_norm": "none"})
    close(out, hf_fwp.linear_attention(q, k, beta[..., None] * v)[0])


def test_i30_oja_of_a_linear_neuron_finds_the_principal_component():
    torch.manual_seed(0)
    directions = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    scales = torch.tensor([3.0, 1, 1, 1, 1, 1, 1, 1], dtype=torch.float64)
    state = {"state": 0.1 * torch.randn(1, 1, 8, 1, dtype=torch.float64)}
    beta = torch.full((1, 1), 3e-3, dtype=torch.float64)
    for _ in range(3000):
        k = (torch.randn(8, dtype=torch.float64) * scales @ directions.T)[None, None]
        v = torch.einsum("bhkv,bhk->bhv", state["state"], k)
        state, _ = RULES["oja"].step(state, q=k, k=k, v=v, beta=beta, v_norm="none")
    found = state["state"].flatten()
    assert (found / found.norm() @ directions[:, 0]).abs() > 0.97
    assert 0.95 < found.norm() < 1.05


@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if rule.shapes])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gate_of_another_shape_or_none_at_all_is_refused(rule, backend):
    given = problems.tensors(Problem(rule, length=4))
    apply, name = RULES[rule].apply, RULES[rule].inputs_with(given.keywords["options"])[-1]
    with pytest.raises(ValueError, match=f"{name} has shape"):
        apply(**given.leaves | {name: given.leaves[name][..., :-1]}, backend=backend, **given.keywords)
    with pytest.raises(ValueError, match=f"{name} .* was not given"):
        apply(**given.leaves | {name: None}, backend=backend, **given.keywords)
