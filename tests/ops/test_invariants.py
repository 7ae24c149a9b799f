"""Laws of the update rules (the numbers are those of the specification): what must hold whatever the backend."""

import operators as problems
import pytest
import torch
from operators import BACKENDS, Problem, close, random_inputs, unit

from hf_fwp import ops
from hf_fwp.rules import RULES
from hf_fwp.rules.base import recurrence


@pytest.mark.parametrize("backend", BACKENDS)
def test_i1_i2_linear_attention_is_masked_attention_without_softmax(backend):
    q, k, v, *_ = random_inputs()
    q, k = q.abs(), k.abs()
    weights = torch.einsum("bihk,bjhk->bhij", q, k).tril()
    out, _ = ops.linear_attention(q, k, v, scale=1.0, backend=backend)
    close(out, torch.einsum("bhij,bjhv->bihv", weights, v))
    out, _ = RULES["linear_attention"].apply(q, k, v, backend=backend, options={"eps": 0.0})
    close(out, torch.einsum("bhij,bjhv->bihv", weights / weights.sum(-1, keepdim=True), v))


@pytest.mark.parametrize("backend", BACKENDS)
def test_i3_orthonormal_keys_store_every_value_exactly(backend):
    v = torch.randn(1, 8, 2, 5, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    k = basis[None, :, None].expand(1, 8, 2, 8)
    _, state = ops.delta_rule(k, k, v, torch.ones(1, 8, 2), output_final_state=True, backend=backend)
    close(torch.einsum("bhkv,bthk->bthv", state, k), v)
    close(state, ops.linear_attention(k, k, v, output_final_state=True, backend=backend)[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_i4_a_repeated_key_is_overwritten_at_rate_beta(backend):
    k = unit(torch.randn(1, 1, 1, 6, dtype=torch.float64), dim=-1).expand(1, 2, 1, 6)
    v = torch.randn(1, 2, 1, 4, dtype=torch.float64)
    for rate in (1.0, 0.3):
        beta = torch.tensor([[[1.0], [rate]]], dtype=torch.float64)
        out, _ = ops.delta_rule(k, k, v, beta, scale=1.0, backend=backend)
        close(out[:, 1], rate * v[:, 1] + (1 - rate) * v[:, 0])
    close(ops.linear_attention(k, k, v, scale=1.0, backend=backend)[0][:, 1], v.sum(1))


def test_i5_i37_keys_of_length_below_one():
    k = torch.rand(1, 1, 1, 6, dtype=torch.float64)
    k = k / k.sum()
    v = torch.randn(1, 1, 1, 4, dtype=torch.float64)
    out, _ = ops.delta_rule(k, k, v, torch.ones(1, 1, 1), scale=1.0)
    close(out, k.norm() ** 2 * v)
    for beta in (0.0, 1.0, 2.0):
        transition = torch.eye(6, dtype=torch.float64) - beta * torch.outer(k.flatten(), k.flatten())
        assert torch.linalg.matrix_norm(transition, ord=2) <= 1 + 1e-12
    k = k * 10
    transition = torch.eye(6, dtype=torch.float64) - 2 * torch.outer(k.flatten(), k.flatten())
    assert torch.linalg.matrix_norm(transition, ord=2) > 1


@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if rule.inputs and not rule.own])
@pytest.mark.parametrize("backend", BACKENDS)
def test_i6_nothing_is_written_at_rate_zero(rule, backend):
    given = problems.tensors(Problem(rule, torch.float32)).copy(torch.float32)
    for name in set(given.leaves) - {"q", "k", "v"}:
        given.leaves[name].data.zero_()
    with torch.no_grad():
        _, final = RULES[rule].apply(**given.leaves, states=given.states, backend=backend, **given.keywords)
    assert torch.equal(final["state"], given.states["state"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_i6_what_is_never_written_is_a_linear_layer(backend):
    q, k, v, beta, g = (x.float() for x in random_inputs())
    state = torch.randn(2, 2, 6, 6)
    out, final = ops.gated_delta_rule(
        q, k, v, 0 * g, 0 * beta, scale=1.0, initial_state=state, output_final_state=True, backend=backend
    )
    assert torch.equal(final, state)
    torch.testing.assert_close(out, torch.einsum("bhkv,bthk->bthv", state, q))


@pytest.mark.parametrize(("rule", "channels"), [("gated_delta_net", 1), ("kimi_delta", 6)])
def test_i7_a_step_can_be_reversed(rule, channels):
    q, k, v, beta, _ = (x[:, 0] for x in random_inputs())
    state = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    g = -torch.rand(2, 2, channels, dtype=torch.float64)
    after, _ = RULES[rule].step({"state": state}, q=q, k=k, v=v, g=g if channels > 1 else g[..., 0], beta=beta)
    decayed = g.exp()[..., None] * state
    written = beta[..., None] * (v - torch.einsum("bhkv,bhk->bhv", decayed, k))
    close((-g).exp()[..., None] * (after["state"] - k[..., None] * written[..., None, :]), state)


@pytest.mark.parametrize("chunk", [1, 16, 64, 128])
def test_i8_any_chunk_length_gives_the_recurrence(chunk, monkeypatch):
    for module in ("blocks", "chunked_op"):
        monkeypatch.setattr(f"hf_fwp.rules.{module}.chunk_length", lambda *_: chunk)
    for rule in RULES:
        given = problems.tensors(Problem(rule, length=70, layout="padded"))
        result = problems.outcome(RULES[rule].apply, given.copy(torch.float64), "torch")
        problems.assert_agrees(result, problems.truth(given, RULES[rule]), 1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_i10_without_decay_the_gated_rule_is_the_delta_rule(backend):
    q, k, v, beta, g = random_inputs()
    gated, _ = ops.gated_delta_rule(q, k, v, 0 * g, beta, backend=backend)
    close(gated, ops.delta_rule(q, k, v, beta, backend=backend)[0])
    decayed, _ = ops.linear_attention(q, k, v, g, scale=1.0, backend=backend)
    total = g.cumsum(1).transpose(1, 2)
    weights = torch.einsum("bihk,bjhk->bhij", q, k) * (total[..., None] - total[..., None, :]).exp().tril()
    close(decayed, torch.einsum("bhij,bjhv->bihv", weights.tril(), v))


@pytest.mark.parametrize("backend", BACKENDS)
def test_i38_negative_eigenvalues_count_parity(backend):
    bits = torch.randint(0, 2, (1, 100, 1), dtype=torch.float64)
    k = torch.zeros(1, 100, 1, 4, dtype=torch.float64)
    k[..., 0] = 1
    state = k[:, 0, :, :, None].clone()
    zero = torch.zeros(1, 100, 1, 1, dtype=torch.float64)
    out, _ = ops.delta_rule(k, k, zero, 2 * bits, scale=1.0, initial_state=state, backend=backend)
    close(out.squeeze(), (-1.0) ** bits.squeeze().cumsum(0))
    out, _ = ops.delta_rule(k, k, zero, 0.99 * bits, scale=1.0, initial_state=state, backend=backend)
    assert (out > -1e-12).all()


@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if rule.own is None])
def test_i21_what_is_asked_changes_nothing_later(rule):
    """True of every rule that is linear in its state: the query of a token is not among what it writes."""
    given = problems.tensors(Problem(rule, length=20))
    before, states = RULES[rule].apply(**given.leaves, states=given.states, **given.keywords)
    given.leaves["q"][:, 7] += 1
    after, changed = RULES[rule].apply(**given.leaves, states=given.states, **given.keywords)
    assert not torch.allclose(before[:, 7], after[:, 7])
    close(torch.cat([after[:, :7], after[:, 8:]], dim=1), torch.cat([before[:, :7], before[:, 8:]], dim=1))
    for name, x in states.items():
        close(changed[name], x)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("split", [1, 30, 64, 69])
def test_i42_split_is_whole(rule, split):
    """With gradients, which must flow through the carried state."""
    given = problems.tensors(Problem(rule, length=70)).copy(torch.float64)

    def in_two(backend, states, **leaves):
        keywords = {n: x for n, x in leaves.items() if n not in given.leaves}
        first = {n: leaves[n][:, :split] for n in given.leaves}
        second = {n: leaves[n][:, split:] for n in given.leaves}
        one, states = RULES[rule].apply(**first, states=states, backend=backend, **keywords)
        two, states = RULES[rule].apply(**second, states=states, backend=backend, **keywords)
        return torch.cat([one, two], dim=1), states

    result = problems.outcome(in_two, given, "torch")
    problems.assert_agrees(result, problems.outcome(RULES[rule].apply, given, "torch"), 1e-9)


@pytest.mark.parametrize("rule", RULES)
def test_i42_one_token_at_a_time_is_whole(rule):
    given = problems.tensors(Problem(rule, length=10))
    with torch.no_grad():
        expected, final = RULES[rule].apply(**given.leaves, states=given.states, **given.keywords)
        states = {name: x.clone() for name, x in given.states.items()}
        for t in range(10):
            leaves = {n: x[:, t : t + 1] for n, x in given.leaves.items()}
            out, states = RULES[rule].apply(**leaves, states=states, in_place=True, **given.keywords)
            close(out[:, 0], expected[:, t])
    for name in final:
        close(states[name], final[name])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_i44_padding_is_absence(rule, backend):
    """NaN in padded positions; the same outputs, states and gradients as the sequence without them."""
    given = problems.tensors(Problem(rule, length=90, layout="padded", seed=3))
    mask = given.keywords["mask"]
    mask[1] = mask[0]
    short = {n: x[:, mask[0]].contiguous() for n, x in given.leaves.items()}
    compact = problems.Tensors(short, given.states, given.keywords | {"mask": None}).copy(torch.float64)
    dirty = given.copy(torch.float64)
    for x in dirty.leaves.values():
        x.data[~mask] = float("nan")

    def compacted(*, mask, backend, states, **leaves):
        out, states = RULES[rule].apply(**leaves, mask=mask, backend=backend, states=states)
        assert torch.equal(out[~mask], torch.zeros_like(out[~mask]))
        return out[:, mask[0]], states

    result = problems.outcome(compacted, dirty, backend)
    expected = problems.outcome(RULES[rule].apply, compact, backend)
    for name in dirty.leaves:
        assert torch.equal(result[f"grad {name}"][~mask], torch.zeros_like(result[f"grad {name}"][~mask]))
        result[f"grad {name}"] = result[f"grad {name}"][:, mask[0]]
    problems.assert_agrees(result, expected, 1e-9)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("length", [1, 70])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_i44_padding_alone_leaves_the_state_bit_for_bit(rule, length, backend):
    given = problems.tensors(Problem(rule, torch.float32, length, layout="padded")).copy(torch.float32)
    given.keywords["mask"][:] = False
    with torch.no_grad():
        _, states = RULES[rule].apply(**given.leaves, states=given.states, backend=backend, **given.keywords)
    for name, x in states.items():
        assert torch.equal(x, given.states[name])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_is_separate(rule, backend):
    given = problems.tensors(Problem(rule, length=100, layout="packed")).copy(torch.float64)

    def separately(*, cu_seqlens, states, **arguments):
        parts = []
        for n, (a, b) in enumerate([(0, 33), (33, 33), (33, 100)]):
            leaves = {name: x[:, a:b] for name, x in arguments.items() if name in given.leaves}
            rest = {name: x for name, x in arguments.items() if name not in given.leaves}
            own = {name: x[n : n + 1] for name, x in states.items()}
            parts.append(RULES[rule].apply(**leaves, states=own, **rest) if b > a else (None, own))
        out = torch.cat([parts[0][0], parts[2][0]], dim=1)
        return out, {name: torch.cat([s[name] for _, s in parts]) for name in states}

    result = problems.outcome(RULES[rule].apply, given, backend)
    problems.assert_agrees(result, problems.outcome(separately, given, backend), 1e-9)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_i46_rows_and_heads_are_independent(rule, backend):
    given = problems.tensors(Problem(rule, length=70, heads=(2, 2, 2)))
    apply, rest = RULES[rule].apply, given.keywords | {"backend": backend}
    whole, _ = apply(**given.leaves, states=given.states, **rest)
    row = {n: x[1:] for n, x in given.leaves.items()}
    close(apply(**row, states={n: x[1:] for n, x in given.states.items()}, **rest)[0], whole[1:])
    head = {n: x[:, :, 1:] for n, x in given.leaves.items()}
    of_head = problems.of_head(rest, slice(1, None))
    close(apply(**head, states={n: x[:, 1:] for n, x in given.states.items()}, **of_head)[0], whole[:, :, 1:])


@pytest.mark.parametrize("rule", RULES)
def test_i47_the_future_does_not_reach_the_past(rule):
    given = problems.tensors(Problem(rule, length=20))
    before, _ = RULES[rule].apply(**given.leaves, backend="reference", **given.keywords)
    for x in given.leaves.values():
        x[:, 11] += torch.randn_like(x[:, 11])
    after, _ = RULES[rule].apply(**given.leaves, backend="reference", **given.keywords)
    assert torch.equal(before[:, :11], after[:, :11])
    assert not torch.equal(before[:, 11], after[:, 11])


@pytest.mark.parametrize(
    "rule", [pytest.param(name, marks=pytest.mark.slow) if rule.own else name for name, rule in RULES.items()]
)
def test_i49_bf16_inputs_are_summed_in_float32(rule):
    """Over 1024 tokens. A state that feeds a nonlinearity amplifies rounding, in the recurrence as much as here."""
    sizes = {"heads": (1, 1, 1), "sizes": (8, 8)}
    given = problems.tensors(Problem(rule, torch.bfloat16, 1024, qk_l2norm=True, **sizes))

    def run(dtype, backend="torch"):
        one = given.copy(dtype)
        with torch.no_grad():
            return RULES[rule].apply(**one.leaves, states=one.states, backend=backend, **one.keywords)

    exact, (out, states) = run(torch.float64)[0], run(torch.bfloat16)
    assert out.dtype == torch.bfloat16
    assert {x.dtype for x in states.values()} == {torch.float32}
    error = problems.relative_error(out, exact)
    assert error < 2e-2 or error < 2 * problems.relative_error(run(torch.bfloat16, "reference")[0], exact)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_given_state_is_not_modified(backend):
    q, k, v, beta, g = random_inputs()
    state = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    copy = state.clone()
    ops.gated_delta_rule(q, k, v, g, beta, initial_state=state, backend=backend)
    assert torch.equal(state, copy)
    ops.gated_delta_rule(q[:, :1], k[:, :1], v[:, :1], g[:, :1], beta[:, :1], initial_state=state, backend="step")
    assert torch.equal(state, copy)


def test_several_queries_read_one_state():
    q, k, v, beta, _ = random_inputs(heads=4)
    out, _ = ops.delta_rule(q, k[:, :, :2], v[:, :, :2], beta[:, :, :2])
    for query in range(4):
        one = slice(query // 2, query // 2 + 1)
        alone, _ = ops.delta_rule(q[:, :, query : query + 1], k[:, :, one], v[:, :, one], beta[:, :, one])
        close(out[:, :, query], alone[:, :, 0])


def test_recurrence_takes_the_public_step():
    q, k, v, beta, _ = random_inputs()
    start = {"state": torch.zeros(2, 2, 6, 6, dtype=torch.float64)}
    out, states = recurrence(RULES["delta_net"].step, {"q": q, "k": k, "v": v, "beta": beta}, start, scale=6**-0.5)
    expected, final = ops.delta_rule(q, k, v, beta, output_final_state=True)
    close(out, expected)
    close(states["state"], final)
