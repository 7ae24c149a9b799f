"""The operators on a GPU against the float64 recurrence: outputs, final states, the gradients of every input.

What a kernel is compiled for (rule, dtype, sizes, heads, layout, ...) is a set in which every two values meet; every
member of it runs with every length, with and without an initial state.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import operators as problems
import pytest
import torch
from operators import Problem

from hf_fwp import ops
from hf_fwp.rules import RULES
from hf_fwp.rules.base import BACKENDS

linear_class_launches = pytest.importorskip("hf_fwp.kernels.linear_class_launches")
COMPILED_FOR = {name: problems.CHOICES[name] for name in ("layout", "heads", "qk_l2norm")} | {
    "rule": (*problems.SERVED, *problems.SERVED_BY_CHANNEL),
    "option": (0, 1),
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "sizes": ((16, 16), (64, 64), (128, 128), (96, 80), (20, 128), (256, 256)),
}
# how the kernels are called: gates that are not computed yet, and chunks of a segment, 0 = sequences are not cut
WAYS = {"raw": (False, True), "segment": (0, 1, 2)}
# (length, with an initial state); a single token without one has no gradient of g to compare with.
LENGTHS = ((1, True), (2, False), *((n, i) for n in (63, 64, 65, 130, 400) for i in (False, True)))
COVERING = problems.pairwise(COMPILED_FOR | WAYS)
MATRIX = [
    (Problem(**{name: row[name] for name in COMPILED_FOR}, length=n, initial=initial), row["raw"], row["segment"])
    for row in COVERING
    for n, initial in LENGTHS
]
# with rules whose kernels have a decay for every channel: with gates, without, and read across
SERVED = (*problems.SERVED, "kimi_delta", "gated_delta_net_2", "gated_oja")
KERNELS = pytest.mark.skipif("triton" not in BACKENDS, reason="this version has no Triton backend")
# gradients with few numbers, each of them a sum over the tokens: of one or two tokens they are judged over eight seeds
OF_A_HEAD = ("grad A_log", "grad dt_bias")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def outcome(
    given: problems.Tensors, problem: Problem, backend: str | None, *, raw: bool = False
) -> dict[str, torch.Tensor]:
    apply = RULES[problem.rule].apply
    return problems.outcome(problems.from_raw(apply) if raw else apply, given, backend)


def together(outcomes: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Those of several problems as those of one."""
    return {name: torch.stack([each[name] for each in outcomes]) for name in outcomes[0]}


def on_device(given: problems.Tensors) -> problems.Tensors:
    return problems.on_device(given, problems.GPU)


@pytest.mark.parametrize("backend", [None, "torch"])
@pytest.mark.parametrize(("problem", "raw", "segment"), MATRIX, ids=str)
def test_agrees_with_the_recurrence(problem, raw, segment, backend, monkeypatch):
    if backend == "torch" and problem.length not in (64, 130):
        pytest.skip("the chunked form in PyTorch is proved at every length on the processor")
    monkeypatch.setattr(linear_class_launches, "segment_chunks", lambda *_: segment)
    raw = raw and RULES[problem.rule].raw_gates
    pooled: list[Any] = []
    for seed in range(8 if problem.length < 63 else 1):
        given = problems.tensors(replace(problem, seed=seed))
        given = on_device(rounded(problems.raw_gates(given), problem.dtype) if raw else given)
        expected = outcome(given.copy(torch.float64), problem, "reference", raw=raw)
        result = outcome(given.copy(problem.dtype), problem, backend, raw=raw)
        assert result["out"].dtype == problem.dtype
        assert result["final state"].dtype == torch.float32
        pooled.append(tuple({name: x.pop(name) for name in OF_A_HEAD if name in x} for x in (result, expected)))
        problems.assert_agrees(result, expected, problems.TOLERANCE[problem.dtype])
    problems.assert_agrees(*map(together, zip(*pooled, strict=True)), problems.TOLERANCE[problem.dtype])


@pytest.mark.parametrize("rule", problems.SERVED)
def test_the_recurrence_on_the_gpu_is_the_one_on_the_processor(rule):
    problem = Problem(rule, length=65)
    given = problems.tensors(problem)
    result = outcome(on_device(given).copy(torch.float64), problem, "reference")
    expected = outcome(given.copy(torch.float64), problem, "reference")
    problems.assert_agrees({name: x.cpu() for name, x in result.items()}, expected, 1e-12)


@KERNELS
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("length", [1, 65])
@pytest.mark.parametrize("size", [64, 256])
def test_the_fastest_backend_is_chosen(dtype, length, size):
    given = on_device(problems.tensors(Problem("gated_delta_net", length=length, sizes=(size, size)))).copy(dtype)
    ran: list[str] = []
    with torch.no_grad():
        RULES["gated_delta_net"].apply(**given.leaves, ran=ran)
    assert ran == ["step" if length == 1 else "triton"]


def long_problem(rule: str, length: int, *, sizes=(64, 64), heads=2, cosine=0.0, seed=0) -> problems.Tensors:
    torch.manual_seed(seed)
    unit = torch.nn.functional.normalize
    common, own = torch.randn(1, 1, heads, sizes[0]), torch.randn(1, length, heads, sizes[0])
    k = unit(cosine**0.5 * unit(common, dim=-1) + (1 - cosine) ** 0.5 * unit(own, dim=-1), dim=-1)
    leaves = {"q": unit(torch.randn_like(k), dim=-1), "k": k, "v": torch.randn(1, length, heads, sizes[1])}
    channels = sizes[:1] if RULES[rule].shape("g") == ("HV", "K") else ()
    gates = {"beta": 1.9 * torch.rand(1, length, heads), "g": -0.05 * torch.rand(1, length, heads, *channels)}
    leaves |= {name: gates[name] for name in RULES[rule].inputs}
    options = {"options": {"normalize": False} if RULES[rule].options.get("normalize") else {}}
    return on_device(problems.Tensors({n: x.double() for n, x in leaves.items()}, {}, options))


def rounded(given: problems.Tensors, dtype: torch.dtype) -> problems.Tensors:
    leaves = {name: x.to(dtype).double() for name, x in given.leaves.items()}
    return problems.Tensors(leaves, given.states, given.keywords)


@pytest.mark.parametrize(("length", "cosine"), [(8192, 0.0), (1024, 0.9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", problems.SERVED)
def test_long_sequences(rule, dtype, length, cosine):
    given = rounded(long_problem(rule, length, cosine=cosine), dtype)
    problem = Problem(rule, dtype, length)
    expected = outcome(given.copy(torch.float64), problem, "reference")
    problems.assert_agrees(outcome(given.copy(dtype), problem, None), expected, problems.TOLERANCE[dtype])


@KERNELS
@pytest.mark.parametrize("bounds", [None, (0, 100, 100, 4096)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", ["gated_delta_net", "kimi_delta"])
def test_a_long_sequence_is_cut_by_itself(rule, dtype, bounds):
    given = rounded(long_problem(rule, 4096, sizes=(128, 128)), dtype)
    given.keywords["cu_seqlens"] = None if bounds is None else torch.tensor(bounds, device=problems.GPU)
    problem, tensors = Problem(rule, dtype, 4096), given.copy(dtype).leaves
    assert linear_class_launches.sizes_of(*(tensors[n] for n in "qkv"), given.keywords["cu_seqlens"]).segments > 4
    expected = outcome(given.copy(torch.float64), problem, "reference")
    problems.assert_agrees(outcome(given.copy(dtype), problem, None), expected, problems.TOLERANCE[dtype])


@pytest.mark.parametrize("rule", [*problems.SERVED, "kimi_delta"])
def test_4096_decode_steps_do_not_drift(rule):
    given = long_problem(rule, 4096, sizes=(128, 128)).copy(torch.float32)
    apply = RULES[rule].apply
    with torch.no_grad():
        exact = {name: x.double() for name, x in given.leaves.items()}
        truth, truth_states = apply(**exact, backend="reference", **given.keywords)
        prefill, prefill_states = apply(**given.leaves, **given.keywords)
        states, outs = {"state": torch.zeros(1, 2, 128, 128, device=problems.GPU)}, []
        for t in range(4096):
            token = {name: x[:, t : t + 1] for name, x in given.leaves.items()}
            out, states = apply(**token, states=states, in_place=True, **given.keywords)
            outs.append(out)
    decoded = {"out": torch.cat(outs, 1), "state": states["state"]}
    expected = {"out": truth, "state": truth_states["state"]}
    problems.assert_agrees(decoded, expected, 1e-5)
    problems.assert_agrees({"out": prefill, "state": prefill_states["state"]}, expected, 1e-5)


@KERNELS
def test_addresses_beyond_32_bits():
    """2.2e9 numbers in each of q, k, v and out."""
    shape = (66, 2048, 128, 128)
    if torch.cuda.get_device_properties(0).total_memory < 60 * 2**30:
        pytest.skip("needs 60 GiB of GPU memory")
    torch.manual_seed(0)
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16, device=problems.GPU) for _ in range(3))
    beta, g = torch.rand(shape[:3], device=problems.GPU), -0.1 * torch.rand(shape[:3], device=problems.GPU)
    with torch.no_grad():
        out, _ = ops.gated_delta_rule(q, k, v, g, beta, use_qk_l2norm_in_kernel=True)
        last = [x[-1:].clone() for x in (q, k, v, g, beta)]
        expected, _ = ops.gated_delta_rule(*last, use_qk_l2norm_in_kernel=True)
    problems.assert_agrees({"out": out[-1:]}, {"out": expected}, 1e-2)


@KERNELS
@pytest.mark.parametrize("segment", [0, 2])
@pytest.mark.parametrize("rule", SERVED)
def test_packed_sequences_do_not_wait_for_the_device(rule, segment, monkeypatch):
    monkeypatch.setattr(linear_class_launches, "segment_chunks", lambda *_: segment)
    problem = Problem(rule, torch.bfloat16, 400, layout="packed", sizes=(64, 64), initial=False, option=1)
    given = on_device(problems.tensors(problem)).copy(problem.dtype)
    outcome(given, problem, None)  # compiles, which may wait

    def run():
        out, _ = RULES[rule].apply(**given.leaves, **given.keywords)
        torch.autograd.grad(out, list(given.leaves.values()), torch.ones_like(out))

    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
