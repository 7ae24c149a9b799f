"""Long sequences, narrow dtypes, extreme gates: nothing drifts, nothing becomes NaN, and a run repeats bit for bit."""

import pytest
import torch
from every_model import CONVERTED, every_model
from tiny_fwp import assert_close, tokens
from torch.nn import functional as F
from transformers import DynamicCache

from hf_fwp import RULES

EXTREMES = {
    "as they are": {},
    "nothing remembered (g = -50)": {"g": -50.0},
    "nothing forgotten (g = 0)": {"g": 0.0},
    "everything written twice (beta = 2)": {"beta": 2.0},
    "nothing written (beta = 0)": {"beta": 0.0},
    "zero keys": {"k": 0.0},
    "zero queries": {"q": 0.0},
    "zero values": {"v": 0.0},
    "one key again and again": {"k": "repeated", "beta": 2.0, "g": 0.0},
    "nothing at all": {"q": 0.0, "k": 0.0, "v": 0.0},
}
# the rules that take q, k, v and one rate per state, as operator_inputs draws them
PLAIN = [name for name, rule in RULES.items() if set(rule.inputs) <= {"g", "beta"} and not rule.shapes and not rule.own]


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def operator_inputs(rule, extreme, dtype, length=40):
    torch.manual_seed(0)
    inputs = {"q": torch.randn(2, length, 2, 8), "k": torch.randn(2, length, 2, 8), "v": torch.randn(2, length, 2, 4)}
    inputs |= {"beta": torch.rand(2, length, 2), "g": -torch.rand(2, length, 2)}
    for name, value in EXTREMES[extreme].items():
        inputs[name] = inputs[name][:, :1].expand_as(inputs[name]) if value == "repeated" else inputs[name] * 0 + value
    if RULES[rule].options.get("normalize"):  # reads are divided by z.q: features are positive, as in the layer
        inputs |= {"q": inputs["q"].abs(), "k": inputs["k"].abs()}
    taken = {"q", "k", "v", *RULES[rule].inputs}
    return {name: x.to(dtype).requires_grad_() for name, x in inputs.items() if name in taken}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("rule", PLAIN)
def test_extreme_gates_and_vectors_stay_finite(rule, extreme, dtype):
    """Against the recurrence too, for outputs and every gradient."""
    found = {}
    for backend in ("reference", None):
        inputs = operator_inputs(rule, extreme, torch.float64 if backend else dtype)
        out, states = RULES[rule].apply(**inputs, backend=backend, qk_l2norm=True)
        loss = out.float().square().sum() + sum(state.square().sum() for state in states.values())
        grads = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
        found[backend] = [out, *states.values(), *(x for x in grads if x is not None)]
    assert all(x.isfinite().all() for results in found.values() for x in results)
    exact, narrow = found["reference"][0], found[None][0]
    assert (narrow - exact).norm() <= {torch.float32: 1e-4, torch.float16: 0.02}.get(dtype, 0.1) * (1 + exact.norm())


def test_extreme_inputs_stay_finite(name):
    """Hidden states of zeros, of one token again and again, and a thousand times too large."""
    model = every_model(name, dtype=torch.float32)
    size = model.get_input_embeddings().embedding_dim
    same, huge = torch.ones(1, 1, size).expand(1, 12, size), 1e3 * torch.randn(1, 12, size)
    for embeds in (torch.zeros(1, 12, size), same, huge):
        leaf = embeds.clone().requires_grad_()
        logits = model(inputs_embeds=leaf).logits
        (gradient,) = torch.autograd.grad(logits.square().mean(), leaf)
        assert logits.isfinite().all()
        assert gradient.isfinite().all()


@torch.no_grad()
def test_the_state_after_many_steps_is_that_of_a_prefill(name):
    model, ids = every_model(name, dtype=torch.float32), tokens(1, 40).repeat(1, 4)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    model(ids, past_key_values=caches[0])
    for t in range(ids.shape[1]):
        model(ids[:, t : t + 1], past_key_values=caches[1])
    for layer_idx in model.hf_fwp_layers:
        prefilled, stepped = (cache.layers[layer_idx].states for cache in caches)
        assert prefilled.keys() == stepped.keys()
        for state in prefilled:
            assert stepped[state].dtype == (torch.long if state == "near_seen" else torch.float32)  # or a count
            assert_close(stepped[state].float(), prefilled[state].float(), 2e-4)


@torch.no_grad()
def test_states_are_float32_under_bf16_weights(name):
    model = every_model(name, dtype=torch.bfloat16)
    cache = model(tokens(), use_cache=True).past_key_values
    for part in tokens(2, 3).split(1, dim=1):
        model(part, past_key_values=cache)
    kept = [cache.layers[i].states for i in model.hf_fwp_layers]
    assert {states["state"].dtype for states in kept if "state" in states} <= {torch.float32}
    assert kept


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*RULES, *CONVERTED])
@torch.no_grad()
def test_8192_tokens_in_bf16_drift_no_more_than_their_start(kind):
    """The error of the last tokens against float32 is that of the first, up to chance.

    A rule that feeds its own reads back may be unstable: then rounding nothing but the embeddings moves it as far.
    """
    ids = tokens(1, 8192)
    one_layer = {"num_hidden_layers": 1, "initializer_range": 0.02}
    config = {"max_position_embeddings": 8192} if kind in CONVERTED else one_layer
    narrow, wide = (every_model(kind, dtype=dtype, **config) for dtype in (torch.bfloat16, torch.float32))
    wide.load_state_dict({key: x.float() for key, x in narrow.state_dict().items()})
    exact, embeds = wide(ids).logits, wide.get_input_embeddings()(ids)
    noise = 2 * torch.rand(3, *embeds.shape[1:], generator=torch.Generator().manual_seed(0)) - 1
    rounded = wide(inputs_embeds=embeds * (1 + torch.finfo(torch.bfloat16).eps / 2 * noise)).logits

    def error(logits, span):
        return ((logits - exact).norm(dim=-1) / exact.norm(dim=-1))[:, span].mean(1).max()

    first, last = slice(None, 1024), slice(-1024, None)
    unavoidable = error(rounded, last)
    found = narrow(ids).logits.float()
    assert error(found, last) <= max(0.05, 2 * unavoidable)
    assert error(found, last) <= 2 * max(error(found, first), unavoidable)


@pytest.mark.usefixtures("deterministic")
def test_a_step_repeats_bit_for_bit(name):
    outcomes = []
    for _ in range(2):
        model = every_model(name, dtype=torch.float32).train()
        logits = model(tokens()).logits
        loss = F.cross_entropy(logits.flatten(0, 1), tokens().flatten())
        outcomes.append((logits, *torch.autograd.grad(loss, list(model.parameters()))))
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


@pytest.mark.usefixtures("deterministic")
def test_packed_padded_and_generated_repeat_too(model):
    packed = {"position_ids": torch.arange(13)[None] % 5}
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[0, :4] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 3, "do_sample": False}
    for run in (
        lambda: model(tokens(1), **packed).logits,
        lambda: model(tokens(), attention_mask=mask).logits,
        lambda: model.generate(tokens(), **settings),
    ):
        assert torch.equal(run(), run())
