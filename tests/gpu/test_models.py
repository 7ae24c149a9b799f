"""Models on a GPU: torch.compile without a graph break, CUDA graphs, generation in step with the whole sequence."""

import operators as problems
import pytest
import torch
from operators import Problem
from tiny_fwp import assert_close, tiny_model, tokens

from hf_fwp import ops
from hf_fwp.rules import RULES
from hf_fwp.rules.linear_class import BACKENDS

DEVICE = "cuda"
SIZES = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 128}


def model_on_gpu(rule: str, dtype: torch.dtype = torch.float32):
    return tiny_model(rule, dtype=dtype, **SIZES).to(DEVICE)


@pytest.mark.parametrize("rule", problems.SERVED)
def test_a_whole_model_compiles_without_a_graph_break(rule):
    model, ids = model_on_gpu(rule), tokens(2, 130).to(DEVICE)
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
    model, ids = model_on_gpu(rule), tokens(2, 70).to(DEVICE)
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        out = model(input_ids=ids[:, :65], use_cache=True)
        parts, cache = [out.logits], out.past_key_values
        for t in range(65, 70):
            parts.append(model(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
    assert_close(torch.cat(parts, 1), whole, 1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_generation_in_bf16_with_padding(rule):
    model, ids = model_on_gpu(rule, torch.bfloat16), tokens(2, 20).to(DEVICE)
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
    given = problems.on_device(problems.tensors(problem), DEVICE).copy(dtype)
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
    given = problems.on_device(problems.tensors(problem), DEVICE).copy(torch.bfloat16)
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
