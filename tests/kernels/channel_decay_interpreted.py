"""The Triton kernels of the channel decay against the float64 recurrence, under Triton's interpreter or on a GPU.

Run by test_channel_decay.py in a process of its own: TRITON_INTERPRET must be set before triton is imported.
Memory that nothing was written to holds NaN.
"""

import dataclasses

import operators as problems
import pytest
import torch
from interpreted import Changed, agrees, constants_of_a_layer, not_at_all, one_program_less, without
from operators import Problem

from hf_fwp import ops
from hf_fwp.kernels import channel_decay, channel_decay_tiles, linear_class_launches
from hf_fwp.rules import RULES

CHOICES = problems.CHOICES | {
    "rule": problems.SERVED_BY_CHANNEL,
    "option": (0, 1),
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "length": (2, 65),
    "sizes": ((16, 16), (5, 7), (36, 20)),  # the last takes two tiles of keys
    "heads": ((1, 2, 1), (1, 2, 2), (1, 1, 2)),
}
# chunks of a segment (0 = whole sequences); gates that are not computed yet, or a bound for their decay
WAYS = {"segment": (0, 1, 2), "raw": (False, True, -5.0)}


def _split(row):
    return Problem(**{name: x for name, x in row.items() if name not in WAYS}), row["segment"], row["raw"]


COVERING = [_split(row) for row in problems.pairwise(CHOICES | WAYS)]
KIMI = Problem("kimi_delta", torch.float32, 65, layout="padded", heads=(1, 2, 1), qk_l2norm=True)


@pytest.fixture(autouse=True)
def _poison():
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def in_segments(monkeypatch, segment: int) -> None:
    monkeypatch.setattr(linear_class_launches, "segment_chunks", lambda *_: segment)


@pytest.mark.parametrize(("problem", "segment", "raw"), COVERING, ids=str)
def test_kernels_agree_with_the_recurrence(problem, segment, raw, monkeypatch):
    in_segments(monkeypatch, segment)
    agrees(problem, raw=raw)


@pytest.mark.parametrize("rule", ["kimi_delta", "gated_delta_net_2", "gated_oja"])
def test_padding_may_hold_nan(rule):
    problem = dataclasses.replace(KIMI, rule=rule, length=20)
    given = problems.tensors(problem)
    for x in given.leaves.values():
        x[~given.keywords["mask"]] = float("nan")
    agrees(problem, given)


def test_several_steps_a_token_are_one_sequence():
    agrees(Problem("delta_product", torch.float32, 20, layout="padded", heads=(1, 1, 1)))


@pytest.mark.parametrize("heads", [(1, 1, 2), (1, 2, 4), (1, 2, 1), (2, 4, 2)], ids=str)
@pytest.mark.parametrize(
    ("rule", "raw"), [("gated_delta_net_2", True), ("kimi_delta", -5.0), ("precond_delta", False), ("comba", False)]
)
def test_a_key_has_the_gradients_of_all_its_readers(rule, raw, heads):
    """Value heads that share a key, several queries of one state, and both. Of the gradient of a key's length every
    query would take all, if not only the first did."""
    length_1 = RULES[rule].shape("g") == ("HV", "K")
    agrees(Problem(rule, torch.float32, 20, heads=heads, sizes=(4, 4), qk_l2norm=length_1), raw=raw)


def kimi(length: int = 65, **changes) -> problems.Tensors:
    return problems.tensors(Problem("kimi_delta", torch.float32, length, heads=(1, 1, 1), **changes))


def judged(given: problems.Tensors, tolerance: float) -> None:
    rule = RULES["kimi_delta"]
    result = problems.outcome(rule.apply, given.copy(torch.float32), "triton")
    problems.assert_agrees(result, problems.truth(given, rule), tolerance)


def test_one_token():
    judged(kimi(1), 2e-6)


@pytest.mark.parametrize("segment", [0, 1])
def test_many_short_sequences_find_their_chunks(segment, monkeypatch):
    in_segments(monkeypatch, segment)
    given = kimi(131, initial=False, layout="packed")
    given.keywords["cu_seqlens"] = torch.tensor([0, 1, 1, 65, 66, 67, 131, 131], dtype=torch.int32)
    judged(given, 3e-6)


@pytest.mark.parametrize("strength", [30.0, 3000.0])
def test_a_strong_decay_neither_overflows_nor_loses_digits(strength):
    """exp(-G) would be infinite; channels beside the strong ones hardly decay."""
    given = kimi()
    given.leaves["g"] *= torch.where(torch.rand_like(given.leaves["g"]) < 0.5, strength, 1e-3)
    given.leaves["g"] = given.leaves["g"].float().double()
    judged(given, 3e-6)


@pytest.mark.slow
def test_the_gradient_of_a_rate_is_as_good_as_others_in_bf16():
    """dA_log of a head is one number, for heads of 16 the sum of 2080 terms of both signs: their sizes add up to 37.
    Its error is 0.5 % of what it is over ten seeds; in a seed where it is 0.14 by chance, that is 10 %, and 1.8 % are
    left when all is computed in float32 and only the gradients of the outputs are rounded."""
    sizes = {"sizes": (8, 8), "heads": (1, 1, 1), "layout": "packed"}
    pairs = []
    for seed in range(10):
        given = problems.raw_gates(problems.tensors(Problem("gated_delta_net_2", torch.bfloat16, seed=seed, **sizes)))
        given.leaves = {name: x.to(torch.bfloat16).double() for name, x in given.leaves.items()}
        apply = problems.from_raw(RULES["gated_delta_net_2"].apply)
        ways = ((torch.bfloat16, "triton"), (torch.float64, "reference"))
        pairs.append([problems.outcome(apply, given.copy(dtype), way)["grad A_log"] for dtype, way in ways])
    result, exact = ({"grad A_log": torch.cat(list(x))} for x in zip(*pairs, strict=True))
    problems.assert_agrees(result, exact, problems.TOLERANCE[torch.bfloat16] / 2)


def test_a_decay_to_nothing_is_exact():
    given = kimi()
    given.leaves["g"][:, 10] = -torch.inf
    tensors = given.copy(torch.float32)
    out, states = RULES["kimi_delta"].apply(
        **tensors.leaves, states=tensors.states, backend="triton", **tensors.keywords
    )
    late = {name: x[:, 10:].double().detach() for name, x in given.leaves.items()}
    late["g"][:, 0] = 0
    truth, truth_states = RULES["kimi_delta"].apply(**late, backend="reference", **given.keywords)
    problems.assert_agrees(
        {"out": out[:, 10:], "state": states["state"]}, {"out": truth, "state": truth_states["state"]}, 2e-6
    )


def test_the_inverse_keeps_its_digits_with_correlated_keys(monkeypatch):
    """Keys with cosine 0.9 to each other, β = 1.9: where a Neumann series has no correct digit."""
    unit = torch.nn.functional.normalize
    common, own = torch.randn(1, 1, 1, 32), torch.randn(1, 64, 1, 32)
    k = unit(0.9**0.5 * unit(common, dim=-1) + 0.1**0.5 * unit(own, dim=-1), dim=-1)
    k, rate = (64 * k).round() / 64, 122 / 64
    monkeypatch.setitem(channel_decay.TABLE, (4, 64), channel_decay.TABLE[4, 64]._replace(chunk=64))
    beta = torch.full((1, 64, 1), rate)
    gates, settings = (None, None, beta, None, None, None), channel_decay.Form(1.0, 0, 0, 0, 0, False, False, False)
    _, _, solve, *_ = channel_decay.channel_decay_forward(k, k, k, *gates, *[None] * 3, *settings, True)
    size = solve.shape[-1]
    for chunk, keys in zip(solve[:, 0], k[0, :, 0].double().split(size), strict=True):
        exact = torch.linalg.inv(torch.eye(size).double() + (rate * keys @ keys.mT).tril(-1))
        assert (chunk - exact).norm() <= 1e-6 * exact.norm()
        assert torch.equal(chunk, chunk.tril())


GATES = {
    ("kimi_delta", None): {"RANGE": 2.0, "RAW_G": True, "LOWER": 0.0},
    ("kimi_delta", -5.0): {"RANGE": 2.0, "RAW_G": True, "LOWER": -5.0},
    ("gated_delta_net_2", None): {"ERASE": 2, "ERASE_RANGE": 2.0, "HAS_WRITE": True, "WRITE_RANGE": 1.0, "RAW_G": True},
}


@pytest.mark.parametrize(("rule", "bound"), GATES)
def test_a_layer_leaves_its_gates_to_the_kernels(rule, bound, monkeypatch):
    options = {"rule_options": {"lower_bound": bound}}
    constants = constants_of_a_layer(rule, channel_decay, monkeypatch, **options)
    assert {name: constants[name] for name in GATES[rule, bound]} == GATES[rule, bound]


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed):
    q, k, v = (torch.randn(1, 20, 1, 4, requires_grad=True) for _ in range(3))
    beta, g = torch.rand(1, 20, 1, requires_grad=True), (-torch.rand(1, 20, 1, 4)).requires_grad_()
    state = torch.randn(2 if packed else 1, 1, 4, 4, requires_grad=True)
    bounds = torch.tensor([0, 9, 20]) if packed else None
    torch.use_deterministic_algorithms(False)  # NaN where nothing is written differs from itself
    checks = {"test_utils": ("test_schema", "test_faketensor")}
    rates, mask = (torch.randn(1, requires_grad=True), torch.randn(4, requires_grad=True)), torch.ones(1, 20).bool()
    for across in (False, True):
        form = channel_decay.Form(0.5, 1.0, 1.0, 1.0, 0.0, not across, not across, across)
        given = (
            q,
            k,
            v,
            None if across else k,
            None if across else v,
            beta,
            g,
            *rates,
            state,
            mask,
            bounds,
            *form,
            True,
        )
        torch.library.opcheck(channel_decay.channel_decay_forward, given, **checks)


@pytest.mark.parametrize("rule", ["kimi_delta", "gated_oja"])
def test_compiles_without_graph_breaks(rule):
    given = problems.tensors(Problem(rule, torch.float32, 20, heads=(1, 1, 1))).copy(torch.float32)
    leaves = list(given.leaves.values())

    def loss():
        out, states = RULES[rule].apply(**given.leaves, states=given.states, backend="triton", **given.keywords)
        return out.sum() + states["state"].square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(), leaves), torch.autograd.grad(loss(), leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_without_a_gradient_nothing_is_kept():
    q = torch.randn(1, 65, 1, 4)
    for keep in (False, True):
        gates = (None, None, torch.rand(1, 65, 1), -torch.rand(1, 65, 1, 4), None, None)
        settings = channel_decay.Form(1.0, 0, 0, 0, 0, False, True, False)
        _, _, *kept = channel_decay.channel_decay_forward(q, q, q, *gates, *[None] * 3, *settings, keep)
        chunk = channel_decay.TABLE[4, 64].chunk
        count = keep * -(-65 // chunk)
        assert [x.numel() for x in kept] == [count * n for n in (chunk * chunk, 4 * 4, 0)]


REFUSED = {
    "float64": ({"v": torch.zeros(1, 3, 1, 4).double()}, "a tensor is float64"),
    "size": ({"v": torch.zeros(1, 3, 1, 300)}, "heads have size 300, and in 32 bits the kernels go up to 256"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_reason(case):
    change, message = REFUSED[case]
    given = {name: torch.zeros(1, 3, 1, 4) for name in ("q", "k", "v", "g")} | {"beta": torch.zeros(1, 3, 1)}
    with pytest.raises(ValueError, match=f"'triton' cannot run this: .*{message}.*; use 'torch'"):
        ops.gated_delta_rule(**(given | change), backend="triton")


def other(**constants):
    def change(grid, arguments, known):
        return grid, arguments, known | constants

    change.__name__ = "-".join(f"{name}={value}" for name, value in constants.items())
    return change


def slow_but(kernels, rows):
    """The rows of other kernels than these take their time in make test-full."""
    return [row if row[0] in kernels else pytest.param(*row, marks=pytest.mark.slow) for row in rows]


PLAIN = (not_at_all, one_program_less, other(GK=0))
ANY = (*PLAIN, *map(without, ("HAS_MASK", "L2NORM", "HAS_BETA")))
MUTATIONS = [
    *(("invert_chunks", change) for change in (*ANY, other(LEVELS=4))),
    *(("scan_forward", change) for change in (*ANY, without("HAS_STATE"))),
    *(("scan_backward", change) for change in (*ANY, without("HAS_FINAL"))),
    *(("gradients", change) for change in (*ANY, other(LEVELS=4))),
]


def is_noticed(kernel, change, monkeypatch, problem, **call):
    """With keys whose length matters."""
    drawn = problems.draw
    monkeypatch.setattr(problems, "draw", lambda name, shape: (1 + (name == "k")) * drawn(name, shape))
    monkeypatch.setattr(channel_decay, kernel, Changed(getattr(channel_decay, kernel), change))
    with pytest.raises(AssertionError, match="relative error"):
        agrees(problem, **call)


@pytest.mark.parametrize(
    ("kernel", "change"), slow_but(("scan_forward", "gradients"), MUTATIONS), ids=lambda x: getattr(x, "__name__", x)
)
def test_a_broken_kernel_is_noticed(kernel, change, monkeypatch):
    is_noticed(kernel, change, monkeypatch, dataclasses.replace(KIMI, sizes=(4, 4), length=22))


ACROSS = [
    *(("scan_across", change) for change in (*PLAIN, other(LEVELS=4), *map(without, ("HAS_STATE", "HAS_BETA")))),
    *(("scan_backward", change) for change in (other(LEVELS=4), without("ACROSS"))),
    *(("gradients", change) for change in (other(LEVELS=4), without("ACROSS"))),
]


@pytest.mark.parametrize(("kernel", "change"), ACROSS, ids=lambda x: getattr(x, "__name__", x))
def test_a_broken_kernel_that_reads_across_is_noticed(kernel, change, monkeypatch):
    is_noticed(kernel, change, monkeypatch, dataclasses.replace(KIMI, rule="gated_oja", sizes=(4, 4), length=22))


SEGMENT_MUTATIONS = [
    *(("map_segments", change) for change in ANY),
    *(("carry", change) for change in (not_at_all, one_program_less, without("BACKWARDS"), without("HAS_START"))),
    ("scan_forward", without("HAS_STATE")),
    ("scan_backward", other(HAS_FINAL=False)),
]


@pytest.mark.parametrize(("kernel", "change"), SEGMENT_MUTATIONS, ids=lambda x: getattr(x, "__name__", x))
def test_a_broken_kernel_is_noticed_in_segments(kernel, change, monkeypatch):
    in_segments(monkeypatch, 1)
    row = channel_decay.TABLE[4, 64]._replace(chunk=16)
    monkeypatch.setitem(channel_decay.TABLE, (4, 64), row)
    is_noticed(kernel, change, monkeypatch, dataclasses.replace(KIMI, sizes=(4, 4), length=34, heads=(1, 1, 1)))


GATED_KERNELS = ("invert_chunks", "map_segments", "scan_forward", "scan_backward", "gradients")
RAW_MUTATIONS = [
    *((kernel, change) for kernel in GATED_KERNELS for change in (without("RAW_G"), other(LOWER=-4.0), other(ERASE=1))),
    *((kernel, other(ERASE_RANGE=1.0)) for kernel in GATED_KERNELS),
    *((kernel, other(WRITE_RANGE=2.0)) for kernel in ("map_segments", "scan_forward", "gradients")),
    *((kernel, without("HAS_WRITE")) for kernel in ("map_segments", "scan_forward", "gradients")),
]


@pytest.mark.parametrize(
    ("kernel", "change"), slow_but(("gradients",), RAW_MUTATIONS), ids=lambda x: getattr(x, "__name__", x)
)
def test_a_broken_gate_is_noticed(kernel, change, monkeypatch):
    in_segments(monkeypatch, 1)
    row = channel_decay.TABLE[4, 64]._replace(chunk=16)
    monkeypatch.setitem(channel_decay.TABLE, (4, 64), row)
    problem = dataclasses.replace(KIMI, rule="gated_delta_net_2", sizes=(4, 4), length=20, heads=(1, 1, 1))
    is_noticed(kernel, change, monkeypatch, problem, raw=-5.0)


def test_long_sequences_are_cut_where_they_do_not_fill_the_device():
    """4 heads of 128 columns: 16 programs, or 4 that read across, of the 128 that fill the device."""
    k = torch.zeros(1, 4096, 4, 128, dtype=torch.bfloat16)
    cut = [channel_decay.channel_sizes(k, k, k, None, across) for across in (False, True)]
    assert [(sizes.span, sizes.segments) for sizes in cut] == [(64 * 4, 16)] * 2
    full = k.expand(32, -1, -1, -1)
    assert not channel_decay.channel_sizes(full, full, full, None, True).segments


def test_the_levels_of_a_chunk_are_its_lower_triangle():
    i, j = torch.arange(64)[:, None], torch.arange(64)[None, :]
    met = [(i > j) & (((i ^ j) >> level) == 1) for level in range(6)]
    assert torch.equal(sum(x.int() for x in met), (i > j).int())
    assert channel_decay_tiles.LOWEST.value < -103.97  # the logarithm of half the smallest float32
