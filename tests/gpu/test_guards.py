"""What a kernel may not do, on a GPU: leave a part of its output unwritten, write beside it, compute something else
when it is called again. And what the inverse of a chunk must keep.
"""

import math

import operators as problems
import pytest
import torch
from operators import Problem
from test_every_rule import SEQUENTIAL
from test_models import MIXERS, mixers
from test_operators import SERVED, on_device, outcome

from hf_fwp import decoding
from hf_fwp.cache import MixerInputs
from hf_fwp.companions import KERNEL_GATES, ShortConvolution, gated
from hf_fwp.packing import Window
from hf_fwp.rules import RULES

linear_class_launches = pytest.importorskip("hf_fwp.kernels.linear_class_launches")


@pytest.mark.parametrize("segment", [0, 2])
@pytest.mark.parametrize("layout", ["plain", "packed"])
@pytest.mark.parametrize("rule", SERVED)
def test_the_same_call_twice_gives_the_same_bits(rule, layout, segment, monkeypatch):
    monkeypatch.setattr(linear_class_launches, "segment_chunks", lambda *_: segment)
    problem = Problem(rule, torch.bfloat16, 400, layout=layout, sizes=(128, 128), heads=(2, 4, 4), option=1)
    given = on_device(problems.tensors(problem))
    first, second = (outcome(given.copy(problem.dtype), problem, None) for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


class Guarded:
    """Allocates every new tensor full of NaN, between two strips of NaN that nothing may write to."""

    STRIP = 1024

    def __init__(self, monkeypatch):
        self.buffers: list[tuple[torch.Tensor, int]] = []
        self.full = torch.full
        monkeypatch.setattr(torch, "empty", self._empty)
        monkeypatch.setattr(torch, "empty_like", lambda x, **kw: self._new_empty(x, x.shape, **kw))
        monkeypatch.setattr(torch.Tensor, "new_empty", self._method())

    def _method(self):
        return lambda x, *size, **kw: self._new_empty(x, size[0] if isinstance(size[0], (tuple, list)) else size, **kw)

    def _empty(self, *size, dtype=None, device=None, **_):
        shape = size[0] if isinstance(size[0], (tuple, list)) else size
        dtype = dtype or torch.get_default_dtype()
        poison = math.nan if dtype.is_floating_point else 77
        count = math.prod(shape)
        buffer = self.full((count + 2 * self.STRIP,), poison, dtype=dtype, device=device)
        self.buffers.append((buffer, count))
        return buffer[self.STRIP : self.STRIP + count].view(shape)

    def _new_empty(self, x, shape, dtype=None, device=None, **_):
        return self._empty(tuple(shape), dtype=dtype or x.dtype, device=device or x.device)

    def place(self, x: torch.Tensor) -> torch.Tensor:
        return self._new_empty(x, x.shape).copy_(x)

    def check(self) -> None:
        for buffer, count in self.buffers:
            for strip in (buffer[: self.STRIP], buffer[self.STRIP + count :]):
                # as this type has it: of booleans 77 is True
                untouched = strip.isnan() if buffer.dtype.is_floating_point else strip == strip.new_tensor(77)
                assert untouched.all(), "something was written outside a tensor"


@pytest.mark.parametrize("segment", [0, 1])
@pytest.mark.parametrize("length", [1, 65, 130])
@pytest.mark.parametrize("layout", ["plain", "padded", "packed"])
@pytest.mark.parametrize("rule", SERVED)
def test_every_output_is_written_and_nothing_else(rule, layout, length, segment, monkeypatch):
    monkeypatch.setattr(linear_class_launches, "segment_chunks", lambda *_: segment)
    problem = Problem(rule, torch.float32, length, layout=layout, sizes=(24, 40), heads=(2, 4, 4), option=1)
    given = on_device(problems.tensors(problem))
    expected = outcome(given.copy(torch.float64), problem, "reference")
    guard = Guarded(monkeypatch)
    tensors = given.copy(problem.dtype)
    tensors.leaves = {name: guard.place(x.detach()).requires_grad_() for name, x in tensors.leaves.items()}
    tensors.states = {name: guard.place(x.detach()).requires_grad_() for name, x in tensors.states.items()}
    result = outcome(tensors, problem, None)
    guard.check()
    problems.assert_agrees(result, expected, 1e-5)
    if length == 1 and layout != "packed":
        with torch.no_grad():
            out, states = RULES[rule].apply(
                **tensors.leaves, states=dict(tensors.states), backend="step", in_place=True, **tensors.keywords
            )
        guard.check()
        stepped = {"out": out} | {f"final {name}": x.detach() for name, x in states.items()}
        problems.assert_agrees(stepped, {name: expected[name] for name in stepped}, 1e-5)


def test_the_guard_notices_a_write_outside(monkeypatch):
    guard = Guarded(monkeypatch)
    x = torch.empty(8, device=problems.GPU)
    guard.check()
    x.as_strided((9,), (1,)).fill_(0)
    with pytest.raises(AssertionError, match="outside a tensor"):
        guard.check()


@pytest.mark.parametrize("layout", ["plain", "padded", "packed"])
@pytest.mark.parametrize("rule", SEQUENTIAL)
def test_a_walk_writes_every_output_and_nothing_else(rule, layout, monkeypatch):
    sizes, number = (24, 24) if RULES[rule].square else (24, 40), problems.WALKS_WITH.get(rule, 0)
    problem = Problem(rule, torch.float32, 7, layout=layout, sizes=sizes, heads=(2, 2, 2), option=number)
    given = on_device(problems.tensors(problem))
    first = problems.outcome(RULES[rule].apply, given.copy(problem.dtype), "triton")
    guard = Guarded(monkeypatch)
    second = problems.outcome(RULES[rule].apply, given.copy(problem.dtype), "triton")
    guard.check()
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MIXERS)
def test_a_mixer_in_one_launch_writes_its_states_and_nothing_else(name, dtype, monkeypatch):
    layer, _ = mixers(name, dtype)
    x_BTD = torch.randn(3, 5, 128, device=problems.GPU, dtype=dtype)
    turns = torch.randn(2, 1, 5, 64, device=problems.GPU, dtype=dtype) if any(layer.options.rotates) else None

    def token(start: int, length: int) -> MixerInputs:
        span = slice(start, start + length)
        return MixerInputs(x_BTD[:, span], None, None if turns is None else (turns[0, :, span], turns[1, :, span]))

    begun = layer._mix(token(0, 4), {})[1]
    states = {n: x.float() if n == "state" else x.clone() for n, x in begun.items()}
    free = {n: x.clone() for n, x in states.items()}
    expected = decoding.decode(layer, token(4, 1), free)
    guard = Guarded(monkeypatch)
    guarded = {n: guard.place(x) for n, x in states.items()}
    found = decoding.decode(layer, token(4, 1), guarded)
    guard.check()
    assert torch.equal(found, expected)
    assert all(torch.equal(x, guarded[n]) for n, x in free.items())
    assert not torch.equal(guarded["state"], states["state"])


def with_gradients(run, leaves: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The output, and the gradients of the sum of its squares."""
    given = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    out = run(**given)
    grads = torch.autograd.grad(out.square().sum(), list(given.values()))
    return {"out": out.detach()} | {f"grad {name}": x for name, x in zip(given, grads, strict=True)}


def agrees_under_guard(run, leaves: dict[str, torch.Tensor], dtype: torch.dtype, monkeypatch) -> None:
    """As in float64 on the same device, twice the same, and nothing written beside it."""
    leaves = {name: x.to(dtype).to(problems.GPU) for name, x in leaves.items()}
    expected = with_gradients(run, {name: x.double() for name, x in leaves.items()})
    first = with_gradients(run, leaves)
    guard = Guarded(monkeypatch)
    second = with_gradients(run, {name: guard.place(x) for name, x in leaves.items()})
    guard.check()
    problems.assert_agrees(second, expected, problems.TOLERANCE[dtype])
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


@pytest.mark.parametrize("dtype", problems.HALF, ids=str)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("channels", [5, 256])
def test_the_short_convolution(channels, packed, dtype, monkeypatch):
    torch.manual_seed(0)
    leaves = {"x": torch.randn(1, 130, channels), "weight": torch.randn(channels, 1, 4)}
    bounds = torch.tensor([0, 50, 50, 130], device=problems.GPU) if packed else None

    def run(x, weight):
        layer = ShortConvolution(channels, 4, True)
        del layer.weight
        layer.weight = weight
        return layer(x, Window.of(None, bounds, total=130))[0]

    agrees_under_guard(run, leaves, dtype, monkeypatch)


@pytest.mark.parametrize("dtype", problems.HALF, ids=str)
@pytest.mark.parametrize("kind", KERNEL_GATES)
def test_the_gated_norm(kind, dtype, monkeypatch):
    torch.manual_seed(0)
    leaves = {"x": torch.randn(2, 70, 3, 100), "u": torch.randn(2, 70, 300), "weight": torch.randn(100)}

    def run(x, u, weight):
        norm = torch.nn.RMSNorm(100, eps=1e-6)
        del norm.weight
        norm.weight = weight
        return gated(x, norm, u, kind)

    agrees_under_guard(run, leaves, dtype, monkeypatch)


@pytest.mark.parametrize("size", [32, 128])
@pytest.mark.parametrize("seed", range(4))
def test_the_inverse_keeps_its_digits_with_correlated_keys(seed, size):
    from hf_fwp.kernels import channel_decay, linear_class

    problems.check_inverse(linear_class, channel_decay, seed=seed, size=size, place=problems.GPU)
