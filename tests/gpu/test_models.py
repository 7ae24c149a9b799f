"""Models on a GPU: torch.compile without a graph break, CUDA graphs, generation in step with the whole sequence."""

import copy

import operators as problems
import pytest
import torch
from operators import Problem
from tiny_fwp import assert_close, tiny_model, tokens
from transformers.cache_utils import StaticCache

from hf_fwp import FastWeightLayer, MixerOptions, decoding, ops
from hf_fwp.cache import MixerInputs
from hf_fwp.rules import RULES
from hf_fwp.rules.base import BACKENDS

SIZES = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 128}


def model_on_gpu(rule: str, dtype: torch.dtype = torch.float32):
    steady = problems.STEADY.get(rule)
    return tiny_model(rule, dtype=dtype, **SIZES, **({"rule_options": steady} if steady else {})).to(problems.GPU)


@pytest.mark.parametrize("rule", problems.SERVED)
def test_a_whole_model_compiles_without_a_graph_break(rule):
    model, ids = model_on_gpu(rule), tokens(2, 130).to(problems.GPU)
    parameters = list(model.parameters())

    def loss(ids):
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    expected = torch.autograd.grad(loss(ids), parameters)
    compiled = torch.compile(loss, fullgraph=True)(ids)
    assert_close(compiled, loss(ids), 1e-4)
    for a, b in zip(torch.autograd.grad(compiled, parameters), expected, strict=True):
        assert float((a - b).norm()) <= 1e-3 * float(b.norm()) + 1e-6


@pytest.mark.parametrize("rule", problems.SERVED)
def test_tokens_one_by_one_are_the_whole_sequence(rule):
    model, ids = model_on_gpu(rule), tokens(2, 70).to(problems.GPU)
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        out = model(input_ids=ids[:, :65], use_cache=True)
        parts, cache = [out.logits], out.past_key_values
        for t in range(65, 70):
            parts.append(model(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
    assert_close(torch.cat(parts, 1), whole, 1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_generation_in_bf16_with_padding(rule):
    model, ids = model_on_gpu(rule, torch.bfloat16), tokens(2, 20).to(problems.GPU)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=-1)
    assert out.shape == (2, 32)
    alone = model.generate(input_ids=ids[1:], max_new_tokens=12, do_sample=False, eos_token_id=-1)
    assert (out[1] == alone[0]).float().mean() > 0.9  # a tie in bf16 may fall the other way


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", problems.SERVED)
def test_decode_steps_in_a_cuda_graph(rule, dtype):
    problem = Problem(rule, dtype, 1, layout="padded", sizes=(64, 96), heads=(2, 4, 4), qk_l2norm=True, option=1)
    given = problems.on_device(problems.tensors(problem), problems.GPU).copy(dtype)
    leaves = {name: x.detach() for name, x in given.leaves.items()}
    start = {name: x.detach() for name, x in given.states.items()}
    keywords = given.keywords | {"backend": "step", "in_place": True}

    def step(states):
        return RULES[rule].apply(**leaves, states=states, **keywords)[0]

    with torch.no_grad():
        eager = {name: x.clone() for name, x in start.items()}
        expected = [step(eager) for _ in range(5)][-1]
        captured = {name: x.clone() for name, x in start.items()}
        warm = torch.cuda.Stream()
        warm.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm):
            step(captured)
        torch.cuda.current_stream().wait_stream(warm)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step(captured)
        for name, x in start.items():
            captured[name].copy_(x)
        for _ in range(5):
            graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)
    for name, x in eager.items():
        assert torch.equal(captured[name], x)
        assert not torch.equal(x, start[name])


@pytest.mark.skipif("triton" not in BACKENDS, reason="this version has no Triton backend")
def test_forward_and_backward_in_a_cuda_graph():
    problem = Problem("gated_delta_net", torch.bfloat16, 400, sizes=(64, 64), heads=(2, 4, 4), qk_l2norm=True)
    given = problems.on_device(problems.tensors(problem), problems.GPU).copy(torch.bfloat16)
    leaves = list(given.leaves.values())

    def run():
        out, state = ops.gated_delta_rule(**given.leaves, use_qk_l2norm_in_kernel=True, output_final_state=True)
        return out, state, *torch.autograd.grad(out, leaves, torch.ones_like(out))

    expected = run()
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        run()
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


FUSED = ("gated_delta_net", "delta_net")  # their default mixers are one launch per token
MIXERS = {
    "modern": {"rule": "gated_delta_net", "head_dim": 64, "value_head_dim": 128},
    "grouped": {"rule": "delta_net", "head_dim": 96, "num_attention_heads": 4, "output_gate": "sigmoid2"},
    "converted": {
        "rule": "gated_delta_net",
        "head_dim": 64,
        "num_attention_heads": 4,
        "conv_size": 0,
        "feature_map": "identity",
        "output_gate": "head_sigmoid",
        "output_norm": False,
        "head_norm": True,
        "value_skip": 1,
        "state_bias": True,
        "time_scales": 2,
        "rope_heads": (True, False) * 4,
    },
}


def mixers(name: str, dtype: torch.dtype) -> tuple[FastWeightLayer, FastWeightLayer]:
    """A mixer in this dtype and the same in float64."""
    torch.manual_seed(0)
    options = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2, **MIXERS[name]}
    exact = FastWeightLayer(MixerOptions(**options), 0).requires_grad_(False)
    for x in exact.parameters():
        x.copy_(x.to(dtype))
    small = copy.deepcopy(exact).to(dtype)
    for parameter in ("A_log", "dt_bias"):
        if hasattr(exact, parameter):
            setattr(small, parameter, copy.deepcopy(getattr(exact, parameter)))
    return small.to(problems.GPU), exact.double().to(problems.GPU)


def decoded(name: str, dtype: torch.dtype, steps: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(reads and states after some tokens in one launch each, the same in float64)."""
    layer, exact = mixers(name, dtype)
    x_BTD = torch.randn(3, steps + 4, 128, device=problems.GPU, dtype=dtype)
    rotary = torch.randn(2, 1, steps + 4, 64, device=problems.GPU, dtype=dtype) if any(exact.options.rotates) else None

    def token(start: int, length: int, kind: torch.dtype) -> MixerInputs:
        span = slice(start, start + length)
        turns = None if rotary is None else (rotary[0, :, span].to(kind), rotary[1, :, span].to(kind))
        return MixerInputs(x_BTD[:, span].to(kind), None, turns)

    wide = exact._mix(token(0, 4, torch.float64), {})[1]
    narrow = {n: x.to(torch.float32 if n == "state" else dtype, copy=True) for n, x in wide.items()}
    wide = {n: x.double() for n, x in narrow.items()}
    for t in range(4, steps + 4):
        expected, wide = exact._mix(token(t, 1, torch.float64), wide)
        assert decoding.can_decode(layer, token(t, 1, dtype), narrow)
        reads = decoding.decode(layer, token(t, 1, dtype), narrow)
    names = [n for n, x in narrow.items() if x.numel()]
    return {"out": reads} | {n: narrow[n] for n in names}, {"out": expected} | {n: wide[n] for n in names}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MIXERS)
def test_a_mixer_in_one_launch(name, dtype):
    problems.assert_agrees(*decoded(name, dtype, 5), problems.TOLERANCE[dtype])


@torch.no_grad()
@pytest.mark.parametrize("name", MIXERS)
def test_4096_tokens_in_one_launch_each_do_not_drift(name):
    problems.assert_agrees(*decoded(name, torch.float32, 4096), 2e-5)


@torch.no_grad()
@pytest.mark.parametrize("rule", FUSED)
def test_a_model_decodes_in_one_launch_per_mixer(rule):
    model, ids = model_on_gpu(rule), tokens(2, 12).to(problems.GPU)
    whole = model(input_ids=ids, use_cache=False).logits
    cache = model(input_ids=ids[:, :8], use_cache=True).past_key_values
    states = [layer.states["state"] for layer in cache.layers]
    parts = [model(input_ids=ids[:, t : t + 1], past_key_values=cache).logits for t in range(8, 12)]
    assert set(model.hf_fwp_backend.values()) == {"fused step"}
    assert all(a is layer.states["state"] for a, layer in zip(states, cache.layers, strict=True))
    assert_close(torch.cat(parts, 1), whole[:, 8:], 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", FUSED)
def test_a_model_decodes_in_a_cuda_graph(rule, dtype):
    """Prefill, then the step of the whole model captured once and replayed; the host is never waited for."""
    model, ids = model_on_gpu(rule, dtype), tokens(2, 14).to(problems.GPU)

    def prefilled() -> StaticCache:
        cache = StaticCache(config=model.config, max_cache_len=32)
        model(input_ids=ids[:, :8], past_key_values=cache, use_cache=True)
        return cache

    eager = prefilled()
    expected = [model(input_ids=ids[:, t : t + 1], past_key_values=eager).logits for t in range(8, 14)]
    cache, token = prefilled(), ids[:, 8:9].clone()
    start = [{name: x.clone() for name, x in layer.states.items()} for layer in cache.layers]
    seen = [layer.seen.clone() for layer in cache.layers]
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        model(input_ids=token, past_key_values=cache)
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = model(input_ids=token, past_key_values=cache).logits
    for layer, states, count in zip(cache.layers, start, seen, strict=True):
        layer.seen.copy_(count)
        for name, x in states.items():
            layer.states[name].copy_(x)
    for t in range(8, 14):
        token.copy_(ids[:, t : t + 1])
        graph.replay()
        assert_close(out, expected[t - 8], problems.TOLERANCE[dtype])


@torch.no_grad()
@pytest.mark.parametrize("rule", FUSED)
def test_a_compiled_model_decodes_without_a_graph_break(rule):
    model, ids = model_on_gpu(rule), tokens(2, 12).to(problems.GPU)

    def steps(run) -> torch.Tensor:
        cache = StaticCache(config=model.config, max_cache_len=32)
        model(input_ids=ids[:, :8], past_key_values=cache, use_cache=True)
        return torch.cat([run(input_ids=ids[:, t : t + 1], past_key_values=cache).logits for t in range(8, 12)], 1)

    assert_close(steps(torch.compile(model, fullgraph=True)), steps(model), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["plain", "packed"])
def test_convolution_and_gated_norm(layout, dtype):
    """Outputs and gradients of the kernels, and of PyTorch in float64."""
    from hf_fwp.companions import ShortConvolution, gated, has_kernels
    from hf_fwp.packing import Window

    torch.manual_seed(0)
    x = torch.randn(1, 700, 200, dtype=dtype, device=problems.GPU)
    bounds = torch.tensor([0, 3, 3, 260, 700], device=problems.GPU) if layout == "packed" else None
    assert has_kernels(x)
    results = []
    for kind in (dtype, torch.float64):
        torch.manual_seed(1)
        convolution = ShortConvolution(200, 4, silu=True).to(dtype).to(problems.GPU).to(kind)
        norm = torch.nn.RMSNorm(100, eps=1e-6).to(problems.GPU).to(kind)
        given = x.to(kind).requires_grad_()
        y, _ = convolution(given, Window.of(None, bounds, total=700))
        out = gated(y.unflatten(-1, (2, 100)), norm, given, "silu")
        leaves = {"x": given, "filter": convolution.weight, "norm": norm.weight}
        grads = torch.autograd.grad(out.double().square().sum(), list(leaves.values()))
        results.append({"y": y, "out": out} | {f"grad {n}": g for n, g in zip(leaves, grads, strict=True)})
    problems.assert_agrees(*results, problems.TOLERANCE[dtype])
