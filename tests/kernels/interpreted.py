"""The Triton kernels of the linear class against the float64 recurrence, under Triton's interpreter or on a GPU.

Run by test_linear_class.py in a process of its own: TRITON_INTERPRET must be set before triton is imported.
Memory that nothing was written to holds NaN.
"""

import dataclasses

import operators as problems
import pytest
import torch
import triton
import triton.language as tl
import triton_interpreter
from operators import Problem

from hf_fwp import ops
from hf_fwp.kernels import channel_decay
from hf_fwp.kernels import linear_class as kernels
from hf_fwp.kernels import linear_class_launches as table
from hf_fwp.layer import FastWeightLayer
from hf_fwp.options import MixerOptions
from hf_fwp.rules import RULES

CHOICES = problems.CHOICES | {
    "rule": problems.SERVED,
    "option": (0, 1),
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "sizes": ((16, 16), (5, 7), (40, 20), (16, 36)),  # the last two take several tiles of keys and values
    "heads": ((2, 2, 2), (1, 2, 1), (1, 2, 2), (1, 1, 2)),
}
WAYS = {"raw": (False, True), "segment": (0, 1, 2), "chunk": (64, 32)}


@dataclasses.dataclass(frozen=True)
class Way:
    """How the kernels are called: with gates that are not computed yet, in segments of some chunks, in short chunks."""

    raw: bool = False
    segment: int = 0
    chunk: int = 64

    def __str__(self):
        return "-".join(f"{name}={x}" for name, x in dataclasses.asdict(self).items())

    def take(self, monkeypatch):
        monkeypatch.setattr(table, "segment_chunks", lambda *_: self.segment)
        rows = {key: row._replace(chunk=self.chunk) for key, row in table.TABLE.items()}
        monkeypatch.setattr(table, "TABLE", rows)


def split(row):
    return Problem(**{n: x for n, x in row.items() if n not in WAYS}), Way(**{n: row[n] for n in WAYS})


COVERING = [split(row) for row in problems.pairwise(CHOICES | WAYS)]
GATED = Problem("gated_delta_net", torch.float32, 65, layout="padded", heads=(1, 2, 1), qk_l2norm=True)

triton_interpreter.patch()


@pytest.fixture(autouse=True)
def _poison():
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def agrees(problem: Problem, given: problems.Tensors | None = None, raw: bool | float = False) -> None:
    """float32: at most twice the error of the PyTorch backend, tensor by tensor. Half precision: the common tolerance,
    because the PyTorch backend multiplies in float32 there and only rounds its results. `raw` can be a bound of g."""
    clean, apply = problems.tensors(problem), RULES[problem.rule].apply
    if raw and RULES[problem.rule].raw_gates:
        clean, apply = problems.raw_gates(clean), problems.from_raw(apply, None if raw is True else raw)
    clean.leaves = {name: x.to(problem.dtype).double() for name, x in clean.leaves.items()}
    expected = problems.outcome(apply, clean.copy(torch.float64), "reference")
    result = problems.outcome(apply, (given or clean).copy(problem.dtype), "triton")
    assert result["out"].dtype == problem.dtype
    assert result["final state"].dtype == torch.float32
    if problem.dtype != torch.float32:
        problems.assert_agrees(result, expected, problems.TOLERANCE[problem.dtype])
        return
    by_torch = problems.outcome(apply, clean.copy(problem.dtype), "torch")
    for name, x in result.items():
        assert expected.keys() == result.keys()
        size = max(float(expected[name].norm()), 0.05 * expected[name].numel() ** 0.5)
        allowed = max(2 * float((by_torch[name].double() - expected[name]).norm()), ROUNDING * size)
        error = float((x.double() - expected[name]).norm())
        assert error <= allowed, f"{name}: relative error {error / size:.1e}, allowed {allowed / size:.1e}"


ROUNDING = 6e-7  # five units in the last place: a single token has hardly an error to double


@pytest.mark.parametrize(("problem", "way"), COVERING, ids=str)
def test_kernels_agree_with_the_recurrence(problem, way, monkeypatch):
    way.take(monkeypatch)
    agrees(problem, raw=way.raw)


@pytest.mark.parametrize(("dtype", "raw"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
@pytest.mark.parametrize("heads", [(1, 3, 6), (2, 4, 2), (1, 1, 3)], ids=str)
def test_a_key_has_the_gradients_of_all_its_readers(dtype, raw, heads):
    """Value heads that share a key, several queries of one state, and both."""
    agrees(Problem("gated_delta_net", dtype, 66, layout="padded", heads=heads, qk_l2norm=True), raw=raw)


def test_large_heads_in_float32(monkeypatch):
    """As the table has them: chunks of 16 tokens; two segments of two."""
    monkeypatch.setattr(table, "segment_chunks", lambda *_: 2)
    agrees(Problem("gated_delta_net", torch.float32, 50, sizes=(130, 18), heads=(1, 1, 1), qk_l2norm=True))


def test_long_sequences_are_cut_where_they_do_not_fill_the_device():
    """4 heads of 128 columns in tiles of 32: 16 programs of the 128 that fill the device."""
    k = torch.zeros(1, 4096, 4, 128, dtype=torch.bfloat16)
    sizes = table.sizes_of(k, k, k, None)
    assert (sizes.span, sizes.segments) == (64 * 4, 16)
    packed = table.sizes_of(k, k, k, torch.tensor([0, 100, 4096]))  # twice as many programs to begin with
    assert (packed.span, packed.segments) == (64 * 8, 8 + 2)
    assert table.sizes_of(k[:, :960], k[:, :960], k[:, :960], None).segments == 0
    full = k.expand(8, -1, -1, -1)
    assert table.sizes_of(full, full, full, None).segments == 0


def test_padding_may_hold_nan():
    given = problems.tensors(GATED)
    for x in given.leaves.values():
        x[~given.keywords["mask"]] = float("nan")
    agrees(GATED, given)


@pytest.mark.parametrize("way", [Way(), Way(segment=1), Way(segment=3, chunk=16)], ids=str)
def test_many_short_sequences_find_their_chunks(way, monkeypatch):
    way.take(monkeypatch)
    given = problems.tensors(Problem("gated_delta_net", torch.float32, 131, False, "packed", heads=(1, 1, 1)))
    given.keywords["cu_seqlens"] = torch.tensor([0, 1, 1, 65, 66, 67, 131, 131], dtype=torch.int32)
    result = problems.outcome(RULES["gated_delta_net"].apply, given.copy(torch.float32), "triton")
    problems.assert_agrees(result, problems.truth(given, RULES["gated_delta_net"]), 3e-6)


def test_the_inverse_keeps_its_digits_with_correlated_keys():
    problems.check_inverse(kernels, channel_decay, seed=0, size=32, place="cpu")


@pytest.mark.parametrize("rule", ["delta_net", "gated_delta_net"])
def test_bf16_keeps_its_digits_with_correlated_keys(rule):
    """Keys with cosine 0.5 to each other: with a T of 8 bits the gradient of β would be 2.4 % off."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 192, 1, 64) for _ in range(3))
    common = problems.unit(torch.randn(64), dim=-1)
    k = problems.unit((common + problems.unit(k, dim=-1)) * 0.5**0.5, dim=-1)
    leaves = {"q": problems.unit(q, dim=-1), "k": k, "v": v, "beta": torch.ones(1, 192, 1)}
    leaves |= {"g": -0.01 * torch.rand(1, 192, 1)} if rule == "gated_delta_net" else {}
    rounded = {name: x.to(torch.bfloat16).double() for name, x in leaves.items()}
    given = problems.Tensors(rounded, {}, {"options": dict(RULES[rule].options)})
    result = problems.outcome(RULES[rule].apply, given.copy(torch.bfloat16), "triton")
    problems.assert_agrees(result, problems.truth(given, RULES[rule]), problems.TOLERANCE[torch.bfloat16])


def test_long_sums_of_a_strong_decay_stay_exact():
    given = problems.tensors(Problem("gated_delta_net", torch.float32, 64, heads=(1, 1, 1)))
    given.leaves["g"] *= 8
    result = problems.outcome(RULES["gated_delta_net"].apply, given.copy(torch.float32), "triton")
    problems.assert_agrees(result, problems.truth(given, RULES["gated_delta_net"]), 2e-6)


@pytest.mark.parametrize("g", [-1e6, -torch.inf])
def test_a_decay_to_nothing_leaves_the_digits_of_the_others(g):
    given = problems.tensors(Problem("gated_delta_net", torch.float32, 64, heads=(1, 1, 1)))
    given.leaves["g"][:, [8, 40]] = g
    result = problems.outcome(RULES["gated_delta_net"].apply, given.copy(torch.float32), "triton")
    problems.assert_agrees(result, problems.truth(given, RULES["gated_delta_net"]), 2e-6)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("erase", [False, True])
def test_opcheck(packed, erase):
    q, k, v = (torch.randn(1, 20, 1, 4, requires_grad=True) for _ in range(3))
    beta = torch.rand(1, 20, 1, requires_grad=True) if erase else None
    g = (-torch.rand(1, 20, 1)).requires_grad_()
    state = torch.randn(2 if packed else 1, 1, 4, 4, requires_grad=True)
    bounds = torch.tensor([0, 9, 20]) if packed else None
    torch.use_deterministic_algorithms(False)  # NaN where nothing is written differs from itself
    mask, settings = torch.ones(1, 20).bool(), (0.5, 0.0, erase, True, True)
    arguments = (q, k, v, beta, g, None, None, state, mask, bounds, *settings)
    torch.library.opcheck(kernels.linear_class_forward, arguments, test_utils=("test_schema", "test_faketensor"))


def constants_of_a_layer(rule, module, monkeypatch, **options):
    """What the last kernel of a layer's backward is launched with. The layer agrees with its PyTorch backend."""
    found = []

    def seen(grid, arguments, constants):
        found.append(constants)
        return grid, arguments, constants

    monkeypatch.setattr(module, "gradients", Changed(module.gradients, seen))
    torch.use_deterministic_algorithms(False)
    x, results = torch.randn(2, 9, 12), {}
    for backend in ("torch", "triton"):
        torch.manual_seed(0)
        sizes = {"hidden_size": 12, "num_attention_heads": 2, "head_dim": 6}
        mixer = MixerOptions(rule=rule, allow_neg_eigval=True, backend=backend, **sizes, **options)
        layer = FastWeightLayer(mixer, 0)
        out, _ = layer(x, attention_mask=torch.tensor([[1] * 9, [0] * 4 + [1] * 5]))
        names, weights = zip(*layer.named_parameters(), strict=True)
        grads = torch.autograd.grad(out.square().sum(), weights)
        results[backend] = {"out": out.detach()} | dict(zip(names, grads, strict=True))
        assert layer.backend_ran == backend
    exact = {name: value.double() for name, value in results["torch"].items()}
    problems.assert_agrees(results["triton"], exact, 1e-5)
    (constants,) = found
    return constants


@pytest.mark.parametrize("rule", [name for name in problems.SERVED if RULES[name].raw_gates])
def test_a_layer_leaves_its_gates_to_the_kernels(rule, monkeypatch):
    constants = constants_of_a_layer(rule, kernels, monkeypatch)
    assert (constants["RANGE"], constants["RAW_G"]) == (2.0, "g" in RULES[rule].inputs)


def test_compiles_without_graph_breaks():
    shapes = dict.fromkeys("qkv", (1, 20, 1, 4)) | {"beta": (1, 20, 1), "g": (1, 20, 1), "A_log": (1,), "dt_bias": (1,)}
    given = {name: torch.randn(shape).requires_grad_() for name, shape in shapes.items()}
    leaves, apply = tuple(given.values()), problems.from_raw(RULES["gated_delta_net"].apply)

    def loss():
        out, states = apply(**given, qk_l2norm=True, backend="triton")
        return out.sum() + states["state"].square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(), leaves), torch.autograd.grad(loss(), leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_without_a_gradient_no_state_is_kept():
    q = torch.randn(1, 65, 1, 4)
    for keep in (False, True):
        settings = (1.0, 0.0, True, True, keep)
        _, _, solve, states, _ = kernels.linear_class_forward(q, q, q, torch.rand(1, 65, 1), *[None] * 6, *settings)
        assert solve.numel() == keep * 2 * 64 * 64
        assert states.numel() == keep * 2 * 4 * 4


REFUSED = {
    "float64": ({"v": torch.zeros(1, 3, 1, 4).double()}, "a tensor is float64"),
    "size": ({"v": torch.zeros(1, 3, 1, 300)}, "heads have size 300, and in 32 bits the kernels go up to 256"),
    "devices": ({"beta": torch.zeros(1, 3, 1, device="meta")}, "several devices: cpu, meta"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_reason(case):
    change, message = REFUSED[case]
    given = {name: torch.zeros(1, 3, 1, 4) for name in ("q", "k", "v")} | {"beta": torch.zeros(1, 3, 1)}
    with pytest.raises(ValueError, match=f"'triton' cannot run this: .*{message}.*; use 'torch'"):
        ops.delta_rule(**(given | change), backend="triton")


class Changed:
    """A kernel that is launched in another way: `change` gets the grid, the tensors and the constants."""

    def __init__(self, kernel, change):
        self.kernel, self.change = kernel, change

    @property
    def arg_names(self):
        return self.kernel.arg_names

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            changed = self.change(grid, list(arguments), constants)
            if changed is not None:
                grid_now, arguments_now, constants_now = changed
                self.kernel[grid_now](*arguments_now, **constants_now)

        return launch


def not_at_all(grid, arguments, constants):
    return None


def one_program_less(grid, arguments, constants):
    return (grid[0] - 1,), arguments, constants


def without(name):
    def change(grid, arguments, constants):
        return grid, arguments, constants | {name: not constants[name]}

    change.__name__ = f"other {name}"
    return change


def of_other_range(grid, arguments, constants):
    return grid, arguments, constants | {"RANGE": 1.0}


def from_zero(grid, arguments, constants):
    return grid, arguments, constants | {"HAS_FINAL": False}


ANY = (not_at_all, one_program_less, *map(without, ("HAS_G", "HAS_MASK", "L2NORM", "HAS_BETA")))
MUTATIONS = [
    *(("invert_chunks", change) for change in ANY),
    *(("scan_forward", change) for change in (*ANY, without("ERASE"), without("HAS_STATE"))),
    *(("scan_backward", change) for change in (*ANY, without("ERASE"), without("HAS_FINAL"))),
    *(("gradients", change) for change in (*ANY, without("ERASE"))),
]
SEGMENT_MUTATIONS = [
    *(("map_segments", change) for change in (*ANY, without("ERASE"))),
    *(("carry", change) for change in (not_at_all, one_program_less, without("BACKWARDS"), without("HAS_START"))),
    ("scan_forward", without("HAS_STATE")),
    ("scan_backward", from_zero),
]
KERNELS = ("invert_chunks", "map_segments", "scan_forward", "scan_backward", "gradients")
RAW_MUTATIONS = [(kernel, change) for kernel in KERNELS for change in (without("RAW_G"), of_other_range)]


@pytest.fixture
def small(monkeypatch):
    """A check of a problem that is quick, whose keys have a length that matters."""
    drawn = problems.draw
    longer = {"k": 2}
    monkeypatch.setattr(problems, "draw", lambda name, shape: longer.get(name, 1) * drawn(name, shape))

    def check(length=18, way=None):
        (way or Way()).take(monkeypatch)
        heads = (1, 2, 1) if way is None else (1, 1, 1)
        agrees(dataclasses.replace(GATED, sizes=(4, 4), length=length, heads=heads), raw=way is not None and way.raw)

    return check


def is_noticed(kernel, change, monkeypatch, check, *arguments):
    monkeypatch.setattr(kernels, kernel, Changed(getattr(kernels, kernel), change))
    with pytest.raises(AssertionError, match="relative error"):
        check(*arguments)


@pytest.mark.parametrize(("kernel", "change"), MUTATIONS, ids=lambda x: getattr(x, "__name__", x))
def test_a_broken_kernel_is_noticed(kernel, change, monkeypatch, small):
    is_noticed(kernel, change, monkeypatch, small)


IN_SEGMENTS = (34, Way(segment=1, chunk=16))
RAW = (20, Way(raw=True, segment=1, chunk=16))


@pytest.mark.parametrize(("kernel", "change"), SEGMENT_MUTATIONS, ids=lambda x: getattr(x, "__name__", x))
def test_a_broken_kernel_is_noticed_in_segments(kernel, change, monkeypatch, small):
    is_noticed(kernel, change, monkeypatch, small, *IN_SEGMENTS)


@pytest.mark.parametrize(("kernel", "change"), RAW_MUTATIONS, ids=lambda x: getattr(x, "__name__", x))
def test_a_broken_gate_is_noticed(kernel, change, monkeypatch, small):
    is_noticed(kernel, change, monkeypatch, small, *RAW)


@pytest.mark.parametrize("arguments", [(), IN_SEGMENTS, RAW], ids=["plain", "in segments", "raw"])
def test_kernels_that_are_not_broken_pass(small, arguments):
    small(*arguments)


@triton.jit
def _copy(x, y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y + at, tl.load(x + at).to(y.dtype.element_ty))


def test_numbers_are_rounded_to_the_nearest():
    x, (low, high) = torch.randn(64), torch.tensor([0x3F80_8000, 0x3F81_8000], dtype=torch.int32).view(torch.float32)
    x[:5] = torch.tensor([low, high, torch.nan, torch.inf, 2 - 2**-20])  # two ties; the last is rounded up to 2
    y = torch.empty(64, dtype=torch.bfloat16)
    _copy[(1,)](x, y, 64)
    torch.testing.assert_close(y, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_the_interpreter_or_a_gpu_runs_this():
    assert kernels.interpreted() or torch.cuda.is_available(), triton.__version__
