"""Run by tests/kernels/test_companions.py in a process of its own, with TRITON_INTERPRET=1.

The short convolution and the gated norm against PyTorch in float64, gradients included; memory that nothing was written
to holds NaN. bf16 is left out: the interpreter computes it wrongly without saying so.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import triton_interpreter
from operators import TOLERANCE, assert_agrees, pairwise
from tiny_fwp import tiny_model, tokens
from torch.nn import functional as F

from hf_fwp.companions import GATES, KERNEL_GATES, ShortConvolution, gated
from hf_fwp.kernels import convolution, gated_norm
from hf_fwp.packing import Window
from hf_fwp.rules import linear_class

CONVOLUTIONS = pairwise(
    {
        "dtype": (torch.float32, torch.float16),
        "size": (1, 2, 4),
        "silu": (False, True),
        "length": (1, 3, 32, 70),
        "layout": ("plain", "packed", "padded", "continued"),
        "channels": (5, 64, 70),
    }
)
NORMS = pairwise(
    {
        "dtype": (torch.float32, torch.float16),
        "gate": tuple(KERNEL_GATES),
        "shape": ((2, 3, 2, 8), (1, 1, 1, 5), (3, 70, 2, 100)),
    }
)

triton_interpreter.patch()


@pytest.fixture(autouse=True)
def _kernel_instead_of_torch(monkeypatch):
    monkeypatch.setattr(linear_class, "has_decode_kernel", lambda device_type: True)
    empty = torch.Tensor.new_empty

    def poisoned(*arguments, **keywords):
        new = empty(*arguments, **keywords)
        return new.fill_(float("nan")) if new.is_floating_point() else new

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


def rounded(dtype, *shape):
    return torch.randn(*shape).to(dtype).double()


def judged(run, leaves, dtype) -> None:
    """Raise AssertionError unless outputs and gradients of `run` in this dtype agree with those in float64."""
    results = []
    for kind in (dtype, torch.float64):
        given = {name: x.to(kind).requires_grad_() for name, x in leaves.items()}
        out = {f"out {i}": x for i, x in enumerate(run(**given))}
        torch.manual_seed(3)
        loss = sum((x.double() * torch.randn(x.shape).double()).sum() for x in out.values())
        grads = torch.autograd.grad(loss, list(given.values()))
        out |= {f"grad {name}": x for name, x in zip(given, grads, strict=True)}
        results.append({name: x for name, x in out.items() if x.numel()})
        assert out["out 0"].dtype == kind
    assert all(torch.isfinite(x).all() for x in results[0].values()), "relative error: not written"
    assert_agrees(*results, TOLERANCE[dtype])


def convolved(row) -> None:
    batch = 1 if row["layout"] == "packed" else 2
    length, channels, size = (row[name] for name in ("length", "channels", "size"))
    torch.manual_seed(0)
    leaves = {"x": rounded(row["dtype"], batch, length, channels), "weight": rounded(row["dtype"], channels, 1, size)}
    if row["layout"] == "continued" and size > 1:
        leaves["history"] = rounded(row["dtype"], batch, size - 1, channels)
    bounds = torch.tensor([0, length // 3, length // 3, length]) if row["layout"] == "packed" else None
    mask = None
    if row["layout"] == "padded":  # the layer puts the real tokens first
        mask = torch.arange(length) < torch.tensor([[length], [length // 2]])

    def run(x, weight, history=None):
        layer = ShortConvolution(channels, size, row["silu"])
        del layer.weight
        layer.weight = weight
        y, kept = layer(x, Window.of(mask, bounds, total=length), history)
        return y if mask is None else y * mask[..., None], kept

    judged(run, leaves, row["dtype"])


def normed(row) -> None:
    torch.manual_seed(0)
    *batch, reads, size = row["shape"]
    leaves = {"x": rounded(row["dtype"], *row["shape"]), "u": rounded(row["dtype"], *batch, reads * size)}
    leaves["weight"] = rounded(row["dtype"], size)

    def run(x, u, weight):
        norm = torch.nn.RMSNorm(size, eps=0.1)
        del norm.weight
        norm.weight = weight
        return (gated(x, norm, u, row["gate"]),)

    judged(run, leaves, row["dtype"])


@pytest.mark.parametrize("row", CONVOLUTIONS, ids=range(len(CONVOLUTIONS)))
def test_the_convolution_agrees_with_pytorch(row):
    convolved(row)


@pytest.mark.parametrize("row", NORMS, ids=range(len(NORMS)))
def test_the_gated_norm_agrees_with_pytorch(row):
    normed(row)


def test_pytorch_convolves_as_conv1d_does(monkeypatch):
    """The float64 that the kernel is judged by."""
    x, layer = torch.randn(2, 9, 6).double(), ShortConvolution(6, 4, silu=True).double()
    expected = F.silu(F.conv1d(F.pad(x.mT, (3, 0)), layer.weight, groups=6).mT)
    torch.testing.assert_close(layer(x, Window.of(None, None, total=9))[0], expected)
    assert set(KERNEL_GATES) < set(GATES)


STRICT_CONVOLUTION = {"dtype": torch.float32, "size": 4, "silu": True, "length": 70, "layout": "packed", "channels": 70}
STRICT_NORM = {"dtype": torch.float32, "gate": "silu", "shape": (3, 70, 2, 100)}
# kernel -> what it does, and what a broken kernel would do instead
MUTATIONS = {
    "filter reversed": (
        convolution,
        "SIZE + (SIZE - 1 - j), mask=inside, other=0.0).to(tl.float32)\n        seen",
        "SIZE + j, mask=inside, other=0.0).to(tl.float32)\n        seen",
    ),
    "neighbours mixed": (convolution, "seen = (here & (earlier >= j))", "seen = (here & (rows >= j))"),
    "neighbours mixed backwards": (convolution, "tl.where((behind >= j)[:, None], d_z, 0.0)", "d_z"),
    "neighbours mixed in the filter": (convolution, "(here & (earlier >= i))", "(here & (start + rows >= i))"),
    "no activation": (convolution, "z = z * tl.sigmoid(z)", "z = z"),
    "slope of a sigmoid": (convolution, "opened * (1.0 + z * (1.0 - opened))", "opened * (1.0 - opened)"),
    "anticausal": (convolution, "(rows[:, None] - j) * channels", "(rows[:, None] + j) * channels"),
    "one token's gradient": (convolution, "later = rows + j", "later = rows"),
    "filter's gradient reversed": (convolution, "part * SIZE + (SIZE - 1 - i)", "part * SIZE + i"),
    "one share of the filter's": (convolution, "n * tl.num_programs(0) + tl.program_id(0)", "n * tl.num_programs(0)"),
    "mean over the padded size": (
        gated_norm,
        "normed = value * tl.rsqrt(tl.sum(value * value, 1) / V",
        "normed = value * tl.rsqrt(tl.sum(value * value, 1) / BLOCK_V",
    ),
    "weight forgotten": (gated_norm, "normed * weight[None, :] * gate)", "normed * gate)"),
    "gate forgotten": (gated_norm, "* weight[None, :] * gate).to", "* weight[None, :]).to"),
    "no projection": (gated_norm, "inner - normed * (tl.sum(inner * normed, 1) / V)[:, None]", "inner"),
    "slope without its input": (gated_norm, "s + u * slope", "s + slope"),
    "gate's without the weight": (gated_norm, "outer * weight[None, :] * normed * slope", "outer * normed * slope"),
    "weight's without the gate": (gated_norm, "tl.sum(outer * normed * gate, 0)", "tl.sum(outer * normed, 0)"),
    "weight's of the last tile": (gated_norm, "total += tl.sum", "total = tl.sum"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_kernel_is_rejected(name, tmp_path, monkeypatch):
    module, right, wrong = MUTATIONS[name]
    source = Path(module.__file__).read_text()
    assert source.count(right) == 1, f"{right!r} is no longer in the kernel, or not once"
    file = tmp_path / "mutant.py"
    file.write_text(source.replace(right, wrong).replace("hf_fwp::", f"companion{list(MUTATIONS).index(name)}::"))
    spec = importlib.util.spec_from_file_location("hf_fwp.kernels.mutant", file)
    mutant = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, mutant)
    spec.loader.exec_module(mutant)
    operator = "short_convolution" if module is convolution else "gated_norm"
    monkeypatch.setattr(module, operator, getattr(mutant, operator))
    with pytest.raises(AssertionError, match="relative error"):
        convolved(STRICT_CONVOLUTION) if module is convolution else normed(STRICT_NORM)


def test_the_strict_problems_agree():
    convolved(STRICT_CONVOLUTION)
    normed(STRICT_NORM)


@pytest.mark.parametrize("layout", ["plain", "padded", "packed"])
def test_a_model_trains_with_them(layout, monkeypatch):
    """Loss and gradients are those of the path of many operations."""
    # of packed sequences longer ones: with few tokens after a start float32 has no five digits of some gradients
    model, ids = tiny_model(dtype=torch.float32), tokens(2, 17 if layout == "packed" else 9)
    given = {"input_ids": ids, "labels": ids, "use_cache": False}
    if layout == "padded":
        given["attention_mask"] = torch.ones_like(ids)
        given["attention_mask"][0, :4] = 0
    if layout == "packed":
        given["position_ids"] = torch.tensor([[*range(8), *range(9)]] * 2)
    results = []
    for kernels, dtype in ((True, torch.float32), (False, torch.float64)):
        monkeypatch.setattr(linear_class, "has_decode_kernel", lambda device_type, kernels=kernels: kernels)
        loss = model.to(dtype)(**given).loss
        grads = torch.autograd.grad(loss, list(model.parameters()))
        results.append({"loss": loss} | {n: x for (n, _), x in zip(model.named_parameters(), grads, strict=True)})
    assert_agrees(*results, 1e-5)


def test_a_model_compiles_without_graph_breaks():
    model, ids = tiny_model(dtype=torch.float32, num_hidden_layers=1), tokens(2, 9)
    parameters = list(model.parameters())

    def loss(ids):
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(ids)
    grads = (torch.autograd.grad(x, parameters) for x in (compiled, loss(ids)))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_opcheck(monkeypatch):
    monkeypatch.undo()  # opcheck compares runs, and NaN is not equal to NaN
    x, weight = torch.randn(1, 6, 5, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(convolution.short_convolution, (x, weight, torch.arange(6)[None], True), test_utils=checks)
    gate, scale = torch.randn(1, 6, 5, requires_grad=True), torch.randn(5, requires_grad=True)
    torch.library.opcheck(gated_norm.gated_norm, (x, gate, scale, 1e-6, "silu"), test_utils=checks)
